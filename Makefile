# Needs only make and Python 3.11 or newer; everything lands in .venv. `make clean` removes all of it.
#
#   make serve ARGS="--port 9000"     make test ARGS="-k cache"     make PYTHON=/path/to/python3.12 serve
#
# TORCH is what pip is asked for first. On Linux the registry's torch carries CUDA libraries of several
# gigabytes; for the small CPU build name PyTorch's CPU wheel index:
#   make serve TORCH="torch==2.13.0 --index-url <the CPU index shown on pytorch.org>"

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11 python,$(if \
	$(shell $(name) -c 'import sys; print(sys.version_info >= (3, 11) or "")' 2>/dev/null),$(name))))
TORCH ?= torch==2.13.0
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check
FRAME := pyproject.toml constraints-dev.txt

.PHONY: setup serve test quick lint types bench test-gpu docs clean
.DEFAULT_GOAL := setup

setup: $(VENV)/.dev  ## all that development needs, in .venv
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 12

serve: $(VENV)/.serve  ## an OpenAI-compatible server on 127.0.0.1:8000
	$(BIN)/triptych serve $(ARGS)

test: lint types  ## lint, types and every test that needs no GPU
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

quick: $(VENV)/.dev  ## unit tests and laws, in seconds
	$(BIN)/python -m pytest -q -n 2 tests/unit tests/laws $(ARGS)

lint: $(VENV)/.dev  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## mypy, strict
	$(BIN)/mypy

bench: $(VENV)/.dev  ## docs/curves.md and docs/gpu.md from committed rows; ARGS: names of benchmarks
	$(BIN)/python -m benchmarks $(or $(ARGS),curves)

test-gpu: $(VENV)/.dev  ## tests that need an NVIDIA GPU; SANITIZE=1: every kernel under compute-sanitizer
ifdef SANITIZE
	$(BIN)/python tests/gpu/under_sanitizer.py $(ARGS)
else
	$(BIN)/python -m pytest -q -m gpu $(ARGS)
endif

docs: $(VENV)/.dev  ## write the generated pages again
	$(BIN)/python docs/generate.py

clean:  ## remove .venv and all caches
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Stamps: set up once, and again when the frame changes. torch comes first and by itself, because
# a looser requirement of any other package would otherwise choose the build.
$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "Triptych needs Python 3.11 or newer and found none." \
		"Install one, or name it: make PYTHON=/path/to/python3.12 serve" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "$(PYTHON) is no" \
		"Python 3.11 or newer. Name one: make PYTHON=/path/to/python3.12 serve" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version); the first time takes some minutes."
	@$(PYTHON) -m venv $(VENV) || { echo "Python's venv module is not complete;" \
		"on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.torch: $(VENV)/.created Makefile
	$(INSTALL) $(TORCH)
	@touch $@

$(VENV)/.serve: $(VENV)/.torch $(FRAME)
	$(INSTALL) -c constraints-dev.txt -e ".[server,cpu,grammar]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(FRAME)
	$(INSTALL) -c constraints-dev.txt -e ".[server,cpu,grammar,bench,dev]"
	@touch $@ $(VENV)/.serve
