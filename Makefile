# `make train` and `make test` set up .venv by themselves; nothing else on the machine is touched.
PYTHON ?= python3
VENV ?= .venv
PEERS ?= .venv-peers
ARGS ?= --env Hopper-v4 --sparsity 0.5

.PHONY: train test smoke benchmark

train: $(VENV)/installed
	$(VENV)/bin/python dst_td3.py $(ARGS)

test: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest

# A little of everything, in two minutes.
smoke: $(VENV)/installed
	$(VENV)/bin/python -m pytest tests/test_topology.py tests/test_agent.py tests/test_authors_update.py \
		tests/test_environments.py tests/test_rules.py tests/test_statistics.py tests/test_readme.py \
		tests/test_command_line.py tests/test_training.py tests/test_folders.py -k "not balance"

benchmark: $(VENV)/installed $(PEERS)/installed
	$(VENV)/bin/python benchmarks/benchmark.py --peers $(PEERS)/bin/python

$(PEERS)/installed: benchmarks/requirements-peers.txt requirements.txt constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r $< -c requirements.txt -c constraints.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation sparseprop==0.1.14
	touch $@

$(VENV)/installed: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; ok = (3, 11) <= v < (3, 14); \
		sys.exit(None if ok else f"Python 3.11 to 3.13 is needed, {v[0]}.{v[1]} is here: make PYTHON=python3.12")'
	@echo "installing PyTorch, MuJoCo and the rest of requirements.txt in $(VENV): 2 GB once installed, and several more"
	@echo "where pip takes PyTorch with CUDA (README says how to have the CPU build); some minutes, without a word"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $< -c constraints.txt
	touch $@
