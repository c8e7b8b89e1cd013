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
	touch $@

$(VENV)/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $< -c constraints.txt
	touch $@
