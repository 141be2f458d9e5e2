# make serve   a tri-mode model on http://127.0.0.1:8000     make test   all tests
# Both set up .venv by themselves: Python 3.11 or newer, make and a network to the package registry.

VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# make serve MODEL=<folder or hub name> REPLICAS=2 PORT=8000 REDIS_URL=redis://... POLICY=threshold
MODEL     ?=
REPLICAS  ?= 1
PORT      ?= 8000
REDIS_URL ?=
POLICY    ?= threshold

# make train OUT=<folder for the run; started again, it goes on from there>
OUT       ?= .run/train

.PHONY: serve test test-gpu lint format bench bench-gpu evaluate train clean help

help:
	@sed -n '1,2p' Makefile; echo; grep -E '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 12

# torch on its own and first: a bare requirement of it would pull gigabytes of CUDA packages.
$(READY): pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (about two minutes the first time) =="
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Triad needs Python 3.11 or newer; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch numpy
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

serve: $(READY) ## serve the embedded model, or MODEL, on http://127.0.0.1:$PORT
	@echo "== starting Triad on http://127.0.0.1:$(PORT) (Ctrl-C stops it) =="
	@PATH="$(CURDIR)/$(BIN):$$PATH" MODEL="$(MODEL)" REPLICAS="$(REPLICAS)" PORT="$(PORT)" \
		REDIS_URL="$(REDIS_URL)" POLICY="$(POLICY)" bash cluster/serve.sh

test: $(READY) ## run every test
	@echo "== tests =="
	@$(BIN)/python -m pytest $(ARGS)

test-gpu: $(READY) ## the kernels and the CUDA runner on a GPU, in full shapes
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu: torch sees no CUDA device")'
	@$(BIN)/python -m pytest tests/replicas/kernels tests/replicas/model/cuda $(ARGS)

lint: $(READY) ## ruff, mypy, import contracts
	@echo "== lint =="
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

format: $(READY) ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(READY) ## tokens a second of each mode by concurrency, engine alone
	@$(BIN)/python -m benchmarks.modes $(ARGS)

bench-gpu: $(READY) ## all that is measured on a GPU, in one run of at most 9 minutes
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

evaluate: $(READY) ## quality and tokens per forward of the embedded checkpoint, by task family and mode
	@$(BIN)/python -m replicas.training.evaluate $(ARGS)

train: $(READY) ## train the embedded checkpoint again, from nothing (hours on a CPU)
	@$(BIN)/python -m replicas.training.train --out $(OUT) $(ARGS)

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
