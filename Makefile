# Two commands, each complete on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

quickstart: .venv/ready
	$(BIN)/inbrief quickstart

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/pyright

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

.PHONY: quickstart test lint types
