# make demo | example | test | test-all | fuzz | soak | chaos | bench | docs | lint | format

PYTHON ?= python3
PORT ?= 8001
VENV = .venv
BIN = $(VENV)/bin

.PHONY: demo example test test-all fuzz soak chaos bench docs lint format

demo: $(VENV)/demo
	@$(BIN)/sse-relay-server --embedded --debug --host 127.0.0.1 --port $(PORT)

example: $(VENV)/example
	@EVENTS_PORT=$(PORT) $(BIN)/python examples/board/run.py

test: $(VENV)/test
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not heavy" $(ARGS)

# With those that take long, some four minutes more, and without leaving out one whose program is not installed.
test-all: $(VENV)/test
	SSE_RELAY_TEST_ALL=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Writes the tables and the chart of docs/fanout.md; make bench ARGS="--streams 5000".
bench: $(VENV)/test
	$(BIN)/python benchmarks/fanout.py $(ARGS)

# Another seed at each time, and ten times as much of it as in the tests: a million requests in some minutes.
fuzz: SEED ?= $(shell date +%s)
fuzz: TIMES ?= 10
fuzz: $(VENV)/test
	@echo "To repeat this: make fuzz SEED=$(SEED) TIMES=$(TIMES)"
	SSE_RELAY_FUZZ_SEED=$(SEED) SSE_RELAY_FUZZ_TIMES=$(TIMES) $(BIN)/pytest -n 2 tests/test_fuzz.py

# Some ten minutes: this many rounds on each broker; the tests take 18.
soak: ROUNDS ?= 120
soak: $(VENV)/test
	SSE_RELAY_SOAK_ROUNDS=$(ROUNDS) $(BIN)/pytest -s tests/test_soak.py

# Another seed at each time; two minutes, half of them on each broker.
chaos: SEED ?= $(shell date +%s)
chaos: SECONDS ?= 120
chaos: $(VENV)/test
	@echo "To repeat this: make chaos SEED=$(SEED) SECONDS=$(SECONDS)"
	SSE_RELAY_CHAOS_SEED=$(SEED) SSE_RELAY_CHAOS_SECONDS=$(SECONDS) $(BIN)/pytest -s tests/test_chaos.py

# From README.md, docs/ and the code; a link that leads nowhere ends it.
docs: $(VENV)/docs
	$(BIN)/sphinx-build -q -W --keep-going -c docs -d build/docs . site

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
$(VENV)/docs: EXTRAS = docs
$(VENV)/example: EXTRAS = postgres,embedded,django,jwt
$(VENV)/example: MORE = "django-htmx>=1.29"
$(VENV)/demo $(VENV)/docs $(VENV)/example $(VENV)/test: setup.py
	@echo "Installing into $(VENV) ($(EXTRAS)): a minute or two at the first time ..."
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --disable-pip-version-check -e ".[$(EXTRAS)]" $(MORE)
	@touch $@
