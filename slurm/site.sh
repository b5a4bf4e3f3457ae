# The variables block of every job in this folder: what your cluster is like. The one file to edit besides a recipe.
# `llmrecipes submit` reads it, jobs read it again on their nodes, and before a plain sbatch you do: . slurm/site.sh

# ---- what sbatch must know here; these win over the #SBATCH lines of the files
# export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=mylab

# ---- how software is found: modules, and the environment that `make setup` made
# module load cuda
VENV=${VENV:-.venv}

# ---- the network between nodes, such as ib0 or bond0; empty = torch takes the one that the host name belongs to
INTERFACE=${INTERFACE:-}

# ---- a command that must succeed on each node before a training starts there, such as: nvidia-smi --list-gpus
HEALTH_CHECK=${HEALTH_CHECK:-}

# ------------------------------------------------------------------------------------------ nothing to edit from here on
case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
export VENV INTERFACE HEALTH_CHECK
export PATH="$VENV/bin:$PATH"
if [ -n "$INTERFACE" ]; then
  export NCCL_SOCKET_IFNAME="$INTERFACE" GLOO_SOCKET_IFNAME="$INTERFACE"
fi
mkdir -p logs # where the #SBATCH lines put output: Slurm does not make folders, and says nothing
