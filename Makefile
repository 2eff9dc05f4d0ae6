# Every target sets up its virtual environment first. PYTHON picks the interpreter, VENV the environment's folder.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
K_DIFFUSION := k-diffusion==0.1.1.post1
STAMP := $(VENV)/.fastcfg-installed
BIN := $(VENV)/bin
PROMPT ?= a red circle above a blue square
BUDGET ?= 240s
BENCH ?= bench
# 8 to 9 minutes on two cores. A file's tests share costly fixtures.
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: demo test test-oldest quick lint bench clean

demo: $(STAMP)
	$(BIN)/fastcfg sample "$(PROMPT)" --out samples.png

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# With the oldest torch that setup.py allows, and the Triton that its CUDA build requires: gigabytes, once.
test-oldest:
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check "torch==2.8.*" "triton==3.4.*" "numpy==2.2.*" -e ".[dev]"
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --no-deps $(K_DIFFUSION)
	$(OLDEST)/bin/python -m pytest $(PYTEST_ARGS)

quick: $(STAMP)
	$(BIN)/python -m pytest -m quick $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks --budget $(BUDGET) --out $(BENCH)

# The variable silences an advertisement that mkdocs-material prints.
.PHONY: docs
docs: $(VENV)/.fastcfg-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.fastcfg-docs: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf .venv .venv-oldest bench build dist fastcfg.egg-info samples.png .pytest_cache .mypy_cache .ruff_cache

# Where there is a C compiler this builds the native kernels, in kernels/.
$(STAMP): setup.py constraints.txt $(wildcard kernels/cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps $(K_DIFFUSION)
	touch $@
