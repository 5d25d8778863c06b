# make book    set up if needed, execute the chapters, build the site, print where it is
# make setup   the environment alone, .venv: for a notebook, hand-outs, the grader
# make pdf     the whole book as one file, solutions at its end (prints with Chromium)
# make serve   open the built site
# make test    set up if needed, check style, docstrings and types, run every test and notebook
# make results the measurements at full size: needs a GPU and CIFAR-10 (goes on where it was; LEASE=1)
# make lint    the checks of style, docstrings and types alone
# make format  bring code, notebooks and generated pages into their one form
# make clean   remove what was built (the environment stays)

.PHONY: book pdf serve test results lint format clean setup help
.DEFAULT_GOAL := help

# Another interpreter: make book PYTHON=/path/to/python3.12
CANDIDATES := $(PYTHON) python3.13 python3.12 python3.11 python3.14 python3 python
SUITABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

VENV := .venv
BIN := $(VENV)/bin
SITE := _build/html
JOBS := 2

# The environment is made anew when what it is made from changes, and only then.
KEY := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
INSTALLED := $(VENV)/installed-$(KEY)

help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(INSTALLED)

$(INSTALLED):
	@for python in $(CANDIDATES); do \
	  if $$python -c '$(SUITABLE)' >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "No Python 3.11 or newer with the modules venv and ensurepip was found"; \
	  echo "(on Debian and Ubuntu: apt install python3-venv)."; exit 1; \
	fi; \
	[ -x $(BIN)/python ] || { echo "Making $(VENV) with $$($$found --version)"; \
	  $$found -m venv $(VENV); }
	@echo "Installing into $(VENV): minutes and about 6 GB the first time, most of it PyTorch"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@# matplotlib announces its font cache on stderr, which would fail the first build
	@$(BIN)/python -c 'import matplotlib.font_manager' 2>/dev/null
	@rm -f $(VENV)/installed-* && touch $@

book: $(INSTALLED)
	$(BIN)/python book/tools/ledger.py --check
	$(BIN)/python book/tools/reference.py
	$(BIN)/python book/tools/execute.py
	DMD_TUTORIAL_STATIC=1 $(BIN)/jupyter-book build . -W --keep-going --all --quiet
	$(BIN)/python book/tools/slides.py
	@echo
	@echo "The book: $(abspath $(SITE)/index.html)   (make serve opens it)"

$(SITE)/index.html:
	$(MAKE) book

pdf: $(INSTALLED) $(SITE)/index.html
	$(BIN)/python book/tools/pdf.py $(SITE) _build/dmd-tutorial.pdf

serve: $(SITE)/index.html
	@echo "http://localhost:8000 (end with Ctrl-C)"
	@(sleep 1; $(BIN)/python -m webbrowser -t http://localhost:8000 >/dev/null) &
	@$(BIN)/python -m http.server 8000 --bind 127.0.0.1 --directory $(SITE) >/dev/null 2>&1

# One thread in each of the processes: two would fight over the same cores.
# Notebooks are executed by nbval, once: those that `make book` has just executed are not again.
test: lint
	$(BIN)/python book/tools/execute.py
	OMP_NUM_THREADS=1 DMD_TUTORIAL_STATIC=1 $(BIN)/python -m pytest tests \
	  -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Status 3: out of time, stages are left.
results: $(INSTALLED)
	@while true; do \
	  $(BIN)/python -m benchmarks.full_size --minutes 8.5 $(LEASE:%=--lease %) $(RESULTS); \
	  status=$$?; \
	  [ $$status = 3 ] || exit $$status; \
	done

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python book/tools/format_notebooks.py --check
	$(BIN)/python book/tools/ledger.py --check
	$(BIN)/python book/tools/timings.py --check
	$(BIN)/python book/tools/teaching.py --check
	$(BIN)/python book/tools/set_repository.py --check

format: $(INSTALLED)
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format --quiet .
	$(BIN)/python book/tools/format_notebooks.py
	$(BIN)/python book/tools/ledger.py
	$(BIN)/python book/tools/timings.py
	$(BIN)/python book/tools/teaching.py

clean:
	rm -rf _build dist *.egg-info book/package.md .pytest_cache .ruff_cache .mypy_cache .hypothesis
