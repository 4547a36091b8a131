# `make demo` and `make test` do everything on a fresh machine that has Python 3.11 or newer.
# One environment serves all targets: besides PyTorch, what only tests and checks need is small, and one is simpler.

# The first of these that runs and is new enough; `make PYTHON=/path/to/python3 demo` takes another.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/installed

export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow gpu style quality wheel-check tables loading-routes docs clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/make \1: \2/p' Makefile

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found. Install one, or name it: make PYTHON=/path/to/python3 demo" >&2; exit 1; }
	@test -x $(BIN)/pip || { echo "Making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear .venv; }
	@echo "Installing packages into .venv (PyTorch is large, this takes some minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt -e ".[train,test]"
	@touch $@

demo: $(STAMP)  ## reconstruct the bundled clip and generate a video with the bundled weights
	@$(BIN)/leanvae demo

# `make test SHUFFLE=17` runs them in another order, drawn from that number.
test: $(STAMP)  ## all tests that need neither a GPU, nor the Hub, nor much time
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow and not gpu and not hub" -n auto --maxprocesses 4 --dist loadfile \
		$(if $(SHUFFLE),--shuffle $(SHUFFLE))

test-slow: $(STAMP)  ## the tests that take minutes
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "slow and not gpu and not hub"

# `make gpu GPU_PYTHON=python3` takes the packages of that Python and installs nothing: build/gpu stands for the package.
GPU_OUT := $(or $(OUT),outputs/gpu)
gpu: $(if $(GPU_PYTHON),,$(STAMP))  ## tests and benchmarks that need a GPU, files in outputs/gpu (GPU_ARGS=--rehearse: tiny, on CPU)
	@rm -rf build/gpu && mkdir -p build/gpu/diffusers_leanvae $(GPU_OUT)
	@ln -s $(CURDIR)/src/diffusers_leanvae/* $(CURDIR)/pipelines $(CURDIR)/training build/gpu/diffusers_leanvae/
	@export PYTHONPATH=$(CURDIR)/build/gpu$${PYTHONPATH:+:$$PYTHONPATH}; status=0; \
	$(or $(GPU_PYTHON),$(BIN)/python) -m pytest -m gpu --junitxml=$(GPU_OUT)/gpu_tests.xml \
		$$(grep -rl 'mark\.gpu' tests --include='test_*.py') || status=$$?; \
	$(or $(GPU_PYTHON),$(BIN)/python) benchmarks/gpu.py --output $(GPU_OUT)/bench_gpu.json $(GPU_ARGS) || status=$$?; \
	exit $$status

style: $(STAMP)  ## fix and format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

quality: $(STAMP)  ## check style, types and the import rule
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_imports.py

# Fresh environments of the Pythons that are found; `make wheel-check WHEEL_ARGS="--python /path/to/python3"` takes others.
wheel-check: $(STAMP)  ## install the wheel into fresh environments, and run its commands there and the demo
	$(BIN)/python scripts/check_wheel.py $(WHEEL_ARGS)

tables: $(STAMP)  ## write the tables of README.md, model_card.md, docs/ and results/README.md from results/
	$(BIN)/python scripts/render_tables.py

# The installed release of diffusers, and the two others that are supported.
loading-routes: $(STAMP)  ## measure the ways of loading a pushed model by every supported release of diffusers
	for version in 0.41.0 0.42.0; do $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input --no-deps \
		--upgrade --target build/diffusers-$$version diffusers==$$version || exit 1; done
	$(BIN)/python benchmarks/loading_routes.py --diffusers build/diffusers-0.41.0 --diffusers build/diffusers-0.42.0

# A stamp of its own, so that no other target waits for these packages.
DOCS_STAMP := .venv/docs-installed
$(DOCS_STAMP): $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt -e ".[docs]"
	@touch $@

docs: $(DOCS_STAMP)  ## build the site with the API reference into build/site, without a warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove what building and testing left (.venv, runs/ and outputs/ stay)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
