# One environment in .venv, or in $(VENV). Tested versions are pinned in constraints.txt.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RUN := $(BIN)/llmrecipes

.DEFAULT_GOAL := help
.PHONY: help setup demo real life check test test-faults test-all bench-setup bench bench-full clean

help:  ## this text
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# torch first and by its exact version: a range would fetch the newest build and gigabytes of CUDA with it.
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,data]'
	touch $@

setup: $(VENV)/.done  ## create the environment and install

# A map of 4 x 3 towns: so few facts are learned in two minutes.
DEMO_TEXT := $(foreach name,ja_towns en_towns ja_people en_people arithmetic,data/demo/text/$(name).jsonl)
data/demo/.done: $(VENV)/.done
	$(RUN) data demo --output data/demo/text --width 4 --depth 3 --overwrite true
	$(RUN) data tokenizer --input $(DEMO_TEXT) --output data/demo/tokenizer --vocab_size 2000 --sample_bytes 2_000_000 --overwrite true
	$(RUN) data tokenize --input $(DEMO_TEXT) --tokenizer data/demo/tokenizer --output_dir data/demo/shards --overwrite true
	touch $@

# The life-cycle: each line is a stage. What is done is not done again; what was stopped goes on where it was.
SEED := runs/dense_pretrain_cpu
EXPERTS := runs/lora_towns_cpu runs/lora_people_cpu runs/lora_arithmetic_cpu
CHAT := runs/router_train_cpu runs/sft_cpu runs/dpo_cpu
EVALUATE := $(RUN) evaluate --config recipes/eval/held_out.yaml

$(SEED)/DONE: data/demo/.done
	$(RUN) fit --config recipes/cpu/dense_pretrain.yaml
runs/lora_towns_cpu/DONE: $(SEED)/DONE
	$(RUN) fit --config recipes/cpu/lora_expert.yaml
runs/lora_people_cpu/DONE: $(SEED)/DONE
	$(RUN) fit --config recipes/cpu/lora_expert.yaml --config recipes/cpu/lora_expert_people.yaml
runs/lora_arithmetic_cpu/DONE: $(SEED)/DONE
	$(RUN) fit --config recipes/cpu/lora_expert.yaml --config recipes/cpu/lora_expert_arithmetic.yaml
models/demo_experts/model.yaml: $(EXPERTS:%=%/DONE)
	rm -rf models/demo_experts
	$(RUN) merge lora $(SEED) models/demo_experts --experts $(EXPERTS)
runs/router_train_cpu/DONE: models/demo_experts/model.yaml
	$(RUN) fit --config recipes/cpu/router_train.yaml
runs/sft_cpu/DONE: runs/router_train_cpu/DONE
	$(RUN) fit --config recipes/cpu/sft.yaml
runs/dpo_cpu/DONE: runs/sft_cpu/DONE
	$(RUN) fit --config recipes/cpu/dpo.yaml
runs/%/evaluation/held_out/summary.json: runs/%/DONE
	$(EVALUATE) --model runs/$*

# One thread: a second one helps models as small as these on a quiet machine only, and halves their speed where it has
# to wait for its core (docs/log.md). The figures then do not depend on the number of cores either.
demo: export OMP_NUM_THREADS ?= 1
demo: $(CHAT:%=%/evaluation/held_out/summary.json)  ## from nothing to a chat model of experts: the whole life-cycle, and what each stage changed
	$(RUN) report $(SEED) $(EXPERTS) $(CHAT) --output runs/report --title "make demo"
	@echo
	@echo "page with every figure  runs/report/report.html"
	@echo "which domain goes where runs/router_train_cpu/routing.png"
	@echo "what it wrote as it learned, the last of it: $(SEED)/samples/"
	@cat "$$(ls $(SEED)/samples/*.txt | tail -1)"

CORPUS ?= ../shared/data/corpus
REAL_TEXT := $(foreach name,ja_wiki ja_novel ja_docs en,$(CORPUS)/$(name).jsonl.gz)
REAL ?= data/real
VOCAB ?= 16000
SAMPLE ?= 30_000_000
real: $(VENV)/.done  ## tokenizer and shards of a real corpus (CORPUS=folder); then see recipes/cpu/real_corpus.yaml
	$(RUN) data tokenizer --input $(REAL_TEXT) --output $(REAL)/tokenizer --vocab_size $(VOCAB) --sample_bytes $(SAMPLE)
	$(RUN) data tokenize --input $(REAL_TEXT) --tokenizer $(REAL)/tokenizer --output_dir $(REAL)/shards

# The same life-cycle on real text: recipes/life, laid over recipes/cpu. docs/real_run.md has what was measured.
comma := ,
LIFE_DOMAINS := ja_wiki ja_novel ja_dialogue en math
LIFE_TEXT := $(LIFE_DOMAINS:%=$(CORPUS)/%.jsonl.gz)
LIFE_SOURCES := $(foreach name,$(LIFE_DOMAINS),"$(name)": ["$(CORPUS)/$(name).jsonl.gz"]$(comma))
LIFE_EXPERTS := runs/life_lora_ja_wiki runs/life_lora_ja_novel runs/life_lora_math
LIFE_CHAT := runs/life_router runs/life_sft runs/life_dpo
LIFE_FIT = $(RUN) fit --config recipes/cpu/$(1).yaml --config recipes/life/$(1).yaml

data/life/.done: $(VENV)/.done
	$(RUN) data tokenizer --input $(LIFE_TEXT) --output data/life/tokenizer --vocab_size 6000 --sample_bytes 10_000_000 --overwrite true
	$(RUN) data mix --config recipes/data/life.yaml --sources '{$(LIFE_SOURCES)}'
	$(foreach name,$(LIFE_DOMAINS),$(RUN) data tokenize --input data/life/text/$(name)/*.jsonl.gz --tokenizer data/life/tokenizer --output data/life/shards/$(name) --overwrite true && ) \
	$(RUN) data tokenize --input data/life/text/valid/*.jsonl.gz --tokenizer data/life/tokenizer --output_dir data/life/shards/valid --overwrite true
	touch $@
runs/life_seed/DONE: data/life/.done
	$(call LIFE_FIT,dense_pretrain)
runs/life_lora_%/DONE: runs/life_seed/DONE
	$(call LIFE_FIT,lora_expert) --name life_lora_$* --data.init_args.train '{"data/life/shards/$*": 1.0}'
models/life_experts/model.yaml: $(LIFE_EXPERTS:%=%/DONE)
	rm -rf models/life_experts
	$(RUN) merge lora runs/life_seed models/life_experts --experts $(LIFE_EXPERTS)
runs/life_router/DONE: models/life_experts/model.yaml
	$(call LIFE_FIT,router_train)
runs/life_sft/DONE: runs/life_router/DONE
	$(call LIFE_FIT,sft)
runs/life_dpo/DONE: runs/life_sft/DONE
	$(call LIFE_FIT,dpo)
runs/%/evaluation/life/summary.json: runs/%/DONE
	$(RUN) evaluate --config recipes/eval/life.yaml --model runs/$*

life: $(patsubst %,%/evaluation/life/summary.json,runs/life_seed $(LIFE_CHAT))  ## the whole life-cycle on a real corpus (CORPUS=folder) and real questions: half an hour; docs/real_run.md
	$(RUN) report runs/life_seed $(LIFE_EXPERTS) $(LIFE_CHAT) --output runs/life_report --title "make life: real text"

check: $(VENV)/.done  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One file's tests stay together, because they share runs that are expensive to make. Three of them for two cores:
# many tests wait for a timeout or for a disk. WORKERS=0: one after the other.
WORKERS ?= 3
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
FAULTS := tests/faults tests/slurm tests/run/test_many_ends.py
test: $(VENV)/.done  ## the tests of everything but test-faults, some cases of each large matrix: under ten minutes on two cores
	$(PYTEST) $(FAULTS:%=--ignore=%)

test-faults: $(VENV)/.done  ## killed, stopped and lost processes, full disks, damaged files, a Slurm cluster: five minutes
	$(PYTEST) $(FAULTS)

test-all: $(VENV)/.done  ## both, large matrices whole: before a release
	$(PYTEST) --all

# The libraries we compare with, in an environment of their own; see docs/performance.md.
PEERS ?= .venv-peers
$(PEERS)/.done: constraints.txt benchmarks/peers.txt benchmarks/peers-needs.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --requirement benchmarks/peers-needs.txt
	$(PEERS)/bin/python -m pip install --quiet --no-deps --requirement benchmarks/peers.txt
	touch $@

bench-setup: $(VENV)/.done $(PEERS)/.done  ## environment of the libraries we compare with, shared weights and data
	$(BIN)/python -m benchmarks.inputs
	$(PEERS)/bin/python -m benchmarks.prepare_peers

bench: bench-setup  ## speed and memory against them, the short form: some minutes
	$(BIN)/python -m benchmarks --peers $(PEERS)/bin/python --table docs/performance.md

bench-full: bench-setup  ## every row of docs/performance.md: an hour or two on a quiet machine
	$(BIN)/python -m benchmarks --peers $(PEERS)/bin/python --table docs/performance.md --full

clean:  ## remove the environment, the demo's data and its runs
	rm -rf $(VENV) $(PEERS) data/demo $(SEED) $(EXPERTS) $(CHAT) models/demo_experts runs/report
