# One environment in .venv, or in $(VENV). Tested versions are pinned in constraints.txt.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RUN := $(BIN)/llmrecipes
DEMO ?= data/demo
CORPUS ?= ../shared/data/corpus

.DEFAULT_GOAL := help
.PHONY: help setup demo real check test bench clean

help:  ## this text
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# torch first and by its exact version: a range would fetch the newest build and gigabytes of CUDA with it.
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(VENV)/.done  ## create the environment and install

$(DEMO)/.done: $(VENV)/.done
	$(RUN) data demo --output $(DEMO)/text
	$(RUN) data tokenizer --input $(DEMO)/text/*_*.jsonl $(DEMO)/text/arithmetic.jsonl --output $(DEMO)/tokenizer --vocab_size 4096
	$(RUN) data tokenize --input $(DEMO)/text/*_*.jsonl $(DEMO)/text/arithmetic.jsonl --tokenizer $(DEMO)/tokenizer --output_dir $(DEMO)/shards
	touch $@

demo: $(DEMO)/.done  ## from nothing to a trained little mixture of experts: corpus, tokenizer, shards, training
	$(RUN) fit --config recipes/cpu/moe_pretrain.yaml
	@echo
	@echo "run folder  runs/moe_pretrain_cpu"
	@echo "loss curve  runs/moe_pretrain_cpu/loss.png"
	@echo "samples     runs/moe_pretrain_cpu/samples/"
	@ls runs/moe_pretrain_cpu/samples | tail -1 | xargs -I{} cat runs/moe_pretrain_cpu/samples/{}

check: $(VENV)/.done  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(VENV)/.done  ## all tests
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest

clean:  ## remove the environment, the demo's data and its runs
	rm -rf $(VENV) $(DEMO) runs/moe_pretrain_cpu
