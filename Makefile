# Each target works as the first command in a fresh clone: Python 3.11 or newer and make are all it needs.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/installed
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: install demo app browser test docs test-oldest lint format sanitize fuzz bench clean

install: $(STAMP)

# .ci/constraints.txt pins what was tested; pyproject.toml holds the ranges that should work
$(STAMP): pyproject.toml setup.py .ci/constraints.txt $(wildcard coeff_diffusers/backends/csrc/*)
	@echo "[1/3] A Python environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/3] torch, diffusers and the other packages, then the kernels for CPUs: some minutes the first time"
	@$(PY) -m pip install --disable-pip-version-check --constraint .ci/constraints.txt --editable ".[dev]"
	@$(PY) -c "from coeff_diffusers.backends import cpu; print('[3/3] Kernel for CPUs:', cpu.instruction_set() or \
		'none (docs/speed.md says why); torch computes instead, in more time')"
	@touch $@

demo: $(STAMP)
	$(PY) examples/demo.py

app: $(STAMP)
	$(VENV)/bin/coeff-diffusers app

# tests/test_app.py clicks the app's page in a Chromium or Chrome, and says that it skips where there is none
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable chrome
browser:
	@if [ -n "$$(for name in $(BROWSERS); do command -v $$name; done)" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get update --quiet=2 && apt-get install --quiet=2 --yes --no-install-recommends chromium; \
	else echo "There is no Chromium or Chrome: the tests of the app's page are skipped."; fi

# two processes at once, for a test computes with one thread; a file's tests share what they have built, and the slowest
# files come first
test: $(STAMP)
	$(PY) -m pytest $(PARALLEL)

# the site, in build/site; a page, a heading or a name that is linked and not there is an error,
# which --quiet would let pass
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

# the lower bounds that pyproject.toml states
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --constraint .ci/oldest.txt --editable ".[test,plot]"
	$(VENV)-oldest/bin/python -m pytest $(PARALLEL)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror coeff_diffusers/backends/csrc/* tests/sanitize/*.cpp
	$(VENV)/bin/mypy
	$(PY) .ci/audit.py

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i coeff_diffusers/backends/csrc/* tests/sanitize/*.cpp

# the CPU kernel, for the instructions of this CPU, under the address and undefined-behaviour sanitizers: a minute
SECONDS ?= 15
sanitize: build/sanitize/kernel
	$< $(SECONDS)

build/sanitize/kernel: tests/sanitize/kernel.cpp coeff_diffusers/backends/csrc/kernel.h
	mkdir -p $(@D)
	$(CXX) -std=c++17 -O1 -g -march=native -fopenmp -fsanitize=address,undefined -fno-sanitize-recover=all \
		-I coeff_diffusers/backends/csrc $< -o $@ -Wl,--no-as-needed -lgomp

# hostile coefficient files; goes on where it was stopped
SEED ?= 0
MUTANTS ?= 10000
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) tests/fuzz/fuzz.py --seed $(SEED) --mutants $(MUTANTS)

bench: $(STAMP)
	$(PY) examples/benchmarks/attention.py
	$(PY) examples/benchmarks/unet.py

clean:
	rm -rf $(VENV) $(VENV)-oldest outputs build dist *.egg-info coeff_diffusers/backends/*.so
