# Sluice: `make` explains the targets. Every one but help, dist and clean prepares .venv first.
.DEFAULT_GOAL := help
.PHONY: help setup demo up test test-compose test-full faults check format bench bench-streamer bench-gateway protos lock dist clean
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
DIST := dist
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_VENV := .venv-bench
BENCH_READY := $(BENCH_VENV)/.ready
# Many tests wait for something; more than two at once only makes the others late.
TEST_PROCESSES ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check

help: ## Explain the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(READY) ## Make .venv with what requirements/ pins (once; quick afterwards)

$(READY): requirements/lock.txt requirements/torch.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 13) else f"Sluice runs on Python 3.11 to 3.13; {sys.executable} is {v.major}.{v.minor}. Try: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "No venv here: on Debian, apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing what requirements/lock.txt pins into $(VENV) (a few minutes the first time)"
	@$(PIP) install -qq -r requirements/lock.txt
	@$(BIN)/python requirements/has_torch.py || $(PIP) install -qq -r requirements/torch.txt
	@$(PIP) install -qq --no-deps --no-build-isolation --editable .
	@$(PIP) check
	@touch $@

demo: setup ## Train, serve and classify real digits; ends by itself (SLUICE_DATA=FOLDER: full MNIST from there)
	@$(BIN)/sluice demo

up: setup ## Start Triton, streamer and gateway; Ctrl-C stops all of it
	@$(BIN)/sluice up

test: setup ## The tests CI runs, with a real Triton; less than 10 minutes
	$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadgroup -m "not slow and not containers"

test-compose: setup ## Build the images and run the line in containers, where there is an engine
	$(BIN)/pytest -m containers

test-full: setup ## All tests, the slow ones too
	$(BIN)/pytest

faults: setup ## Inject faults into a gateway and write docs/faults.md (a few minutes)
	@$(BIN)/python -m tests.faults.report

check: setup ## Lint, format, types, import directions, generated code
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q tests/protos

format: setup ## Apply the formatter and the linter's own fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup ## Measure streamer and gateway; writes benchmarks/results/
	$(BIN)/python -m benchmarks

bench-streamer: setup ## Measure the streamer against what one would use instead; writes benchmarks/results/streamer.md
	@$(MAKE) --no-print-directory $(BENCH_READY) || echo "going on without mosaicml-streaming" >&2
	$(BIN)/python -m benchmarks.streamer

bench-gateway: setup ## Measure the gateway against Triton asked directly; writes benchmarks/results/gateway.md
	$(BIN)/python -m benchmarks.gateway

$(BENCH_READY): requirements/bench.txt $(READY)
	@rm -rf $(BENCH_VENV)
	@$(BIN)/python -m venv --without-pip $(BENCH_VENV)
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  $(BIN)/python -c "$$site" > "$$($(BENCH_VENV)/bin/python -c "$$site")/behind.pth"
	@$(PIP) --python $(BENCH_VENV)/bin/python install -qq --ignore-installed --no-deps -r requirements/bench.txt
	@touch $@

protos: setup ## Compile protos/**/*.proto again
	$(BIN)/python -m protos.generate

lock: setup ## Choose the versions in requirements/lock.txt anew
	$(PIP) install --quiet pip-tools
	$(BIN)/pip-compile --quiet --upgrade --strip-extras --extra dev --allow-unsafe --all-build-deps \
	  --unsafe-package torch --unsafe-package pip -c requirements/constraints.txt -c requirements/torch.txt \
	  --no-emit-index-url --no-emit-find-links --no-header --no-annotate -o requirements/lock.txt pyproject.toml
	sed -i -e '/^sluice @/d' -e '/considered to be unsafe/,$$d' requirements/lock.txt

dist: ## Pack the committed sources into dist/sluice-VERSION.tar.gz, from which make demo and make test work
	@git rev-parse --verify -q HEAD >/dev/null || { echo "make dist packs what git has committed, and this is no clone" >&2; exit 1; }
	@git diff --quiet HEAD || echo "note: changes that are not committed are left out" >&2
	@mkdir -p $(DIST)
	@version=$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -1); \
	  git archive --format=tar.gz --prefix=sluice-$$version/ -o $(DIST)/sluice-$$version.tar.gz HEAD && ls -sh $(DIST)/sluice-$$version.tar.gz

clean: ## Remove .venv and everything made by building and testing; keeps models, runs and the cache
	rm -rf $(VENV) $(BENCH_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
