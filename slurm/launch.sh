# shellcheck shell=bash
# Sourced by the jobs of this folder: one training, until it is done, stopped and saved, or beyond repair.
#
# `train WORDS...` takes the words of `llmrecipes fit` and sets
#   RUN      its run folder, which comes from the recipe's name and never from a job's number
#   RESULT   done | stopped (saved before the time limit or a pre-emption) | asked (by a STOP file)
#            | nodes (too few healthy ones) | failed
#   CODE     exit code of the last launch
# Exit codes of srun do not tell: whichever rank ends first has the others killed. Files in the run folder do.
set -uo pipefail

ME=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
ME=${ME:-$SLURM_JOB_ID}
MAX_ATTEMPTS=${MAX_ATTEMPTS:-3} # launches from the same checkpoint
MAX_RESTARTS=${MAX_RESTARTS:-100}
STRIKES=2 # failures that a node is allowed
RUN='' RESULT='' CODE=0

say() { echo "[$(date '+%F %T') job $ME, restart ${SLURM_RESTART_COUNT:-0}] $*"; }

newest() { readlink "$RUN/checkpoints/latest" 2>/dev/null || echo "the beginning"; }

# Nodes of the job that are not known to be bad and, where there is reason to ask, answer.
healthy_nodes() { # ask?
  local node
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    grep -qxF "$node" "$RUN/bad_nodes" && continue
    # shellcheck disable=SC2086  # the check is a command and its words
    if [ "$1" = no ] || timeout 60 srun --overlap --quiet --nodes=1 --ntasks=1 --nodelist="$node" \
      ${HEALTH_CHECK:-true} </dev/null >/dev/null 2>&1; then
      echo "$node"
    else
      echo "$node" >>"$RUN/bad_nodes"
      say "node $node does not answer or fails its check: it goes to $RUN/bad_nodes" >&2
    fi
  done
}

# The node to blame for a failed launch: Slurm's word first, then that of the ranks, then how a task ended.
culprit() {
  {
    sed -nE 's/^srun: error: Node failure on ([^ ,]+).*/\1/p' "$RUN/launch.txt"
    sed -nE 's/^.*error: .*rank [0-9]+ \(pid [0-9]+ on ([^) .]+)[^)]*\).*/\1/p' "$RUN/launch.txt"
    sed -nE 's/^srun: error: ([^: ]+): tasks? [0-9,-]+: (Killed|Segmentation fault|Bus error|Aborted|Out Of Memory).*/\1/p' \
      "$RUN/launch.txt"
  } | head -n 1
}

launch() { # number of the launch, nodes, words of fit...
  local number=$1 nodes=$2
  shift 2
  # A port of its own for each launch: the last one's may still be held.
  export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0} * 31 + number * 101) % 20000))
  export MASTER_ADDR=${nodes%%,*}
  say "launch $number on $nodes from $(newest), MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT"
  rm -f "$RUN/STOPPED"
  # --overlap: the step of a node that died may hold its CPUs for ever. --cpus-per-task: srun does not inherit it.
  srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_NTASKS" --nodelist="$nodes" \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 --wait=60 \
    llmrecipes fit "$@" </dev/null 2>&1 | tee "$RUN/launch.txt"
  CODE=${PIPESTATUS[0]}
}

train() { # words of fit...
  local attempt=0 number=0 ask=${HEALTH_CHECK:+yes} before node nodes
  RESULT=failed
  RUN=$(llmrecipes check "$@" --run_folder) || { CODE=2 && return; }
  mkdir -p "$RUN"
  touch "$RUN/bad_nodes"
  # Neither %1 nor a requeue waits for the last process of the job before: its owner's lock is asked for.
  flock --timeout 300 "$RUN/.lock" true || say "somebody still trains in $RUN"
  : >"$RUN/strikes"
  while [ "$attempt" -lt "$MAX_ATTEMPTS" ]; do
    nodes=$(healthy_nodes "${ask:-no}" | paste -sd,)
    if [ "$(tr ',' '\n' <<<"$nodes" | grep -c .)" -lt "$SLURM_JOB_NUM_NODES" ]; then
      RESULT=nodes CODE=1
      return
    fi
    before=$(newest)
    number=$((number + 1))
    launch "$number" "$nodes" "$@"
    say "launch $number ended with $CODE at $(newest)"
    if [ -e "$RUN/DONE" ]; then
      RESULT='done' CODE=0
      return
    elif [ -e "$RUN/STOPPED" ]; then
      RESULT=stopped CODE=0
      grep -q "\"why\": \"file\"" "$RUN/STOPPED" && RESULT=asked
      return
    elif [ "$CODE" = 138 ]; then # SIGUSR1 while Python started
      RESULT=stopped CODE=0
      return
    elif [ "$CODE" = 2 ]; then # the user's mistake, which the log explains
      return
    fi
    [ "$CODE" = 0 ] && CODE=1
    ask=yes
    node=$(culprit)
    if [ -n "$node" ]; then
      echo "$node" >>"$RUN/strikes"
      if [ "$(grep -cxF "$node" "$RUN/strikes")" -ge "$STRIKES" ]; then
        say "node $node failed $STRIKES times: it goes to $RUN/bad_nodes"
        echo "$node" >>"$RUN/bad_nodes"
      fi
    fi
    if [ "$(newest)" != "$before" ]; then
      attempt=0 # it came further: another fault
      : >"$RUN/strikes"
    elif [ "$(sort -u "$RUN/strikes" | grep -c .)" -ge 2 ]; then
      say "different nodes failed after the same checkpoint: the program or the data, not a node"
      return
    fi
    attempt=$((attempt + 1))
    sleep "${RETRY_PAUSE:-5}"
  done
  say "gave up after $attempt launches that came no further than $(newest)"
}

bad_nodes() { sort -u "$RUN/bad_nodes" | paste -sd,; }

# What a job that stands alone does after `train`: goes back into the queue, or leaves bad nodes behind.
requeue_or_end() { # this script
  case $RESULT in
  'done') say "done: $RUN" ;;
  asked) say "stopped on request at $(newest); submit it again to go on" ;;
  stopped)
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
      say "stopped at $(newest) after $MAX_RESTARTS restarts"
      exit 1
    fi
    say "saved at $(newest): back into the queue"
    scontrol requeue "$ME"
    sleep 300 # the requeue ends this script
    exit 1
    ;;
  nodes)
    # A running job cannot be told to avoid a node: it is sent again, without those.
    if [ "${GENERATION:-0}" -lt 5 ]; then
      say "too few healthy nodes; sent again without $(bad_nodes)"
      # Slurm notices a dead node later than this script, and would put this job back into the queue beside the new one.
      scontrol update JobId="$ME" Requeue=0
      GENERATION=$((${GENERATION:-0} + 1)) sbatch --export=ALL --exclude="$(bad_nodes)" \
        ${SLURM_ARRAY_TASK_ID:+--array="$SLURM_ARRAY_TASK_ID"} "$@"
    fi
    ;;
  *) say "failed with $CODE at $(newest)" ;;
  esac
  exit "$CODE"
}

# What a task of a chain does: the next one goes on, or there is none.
hand_over_or_end() {
  local bad pending
  bad=$(bad_nodes)
  if [ -n "$bad" ]; then
    for pending in $(squeue --noheader --array --states=PENDING --jobs="$SLURM_ARRAY_JOB_ID" --format=%i); do
      scontrol update JobId="$pending" ExcNodeList="$bad" && say "$pending will avoid $bad"
    done
  fi
  case $RESULT in
  stopped) say "saved at $(newest): the next task of the chain goes on" ;;
  nodes) say "too few healthy nodes: the next task of the chain gets others" ;;
  *)
    say "$RESULT at $(newest): the rest of the chain is cancelled"
    scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"
    ;;
  esac
  exit "$CODE"
}
