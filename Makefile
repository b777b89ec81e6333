SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Part of the environment key, so that a moved or edited project rebuilds it.
INPUTS := settings.ini setup.py pyproject.toml constraints.txt
export MPLBACKEND := agg
export PYTHONUNBUFFERED := 1

# Run notebooks by their names; every other name is that of a study, which run_ablation runs.
RUNS := $(filter-out ablation,$(patsubst nbs/run_%.ipynb,%,$(wildcard nbs/run_*.ipynb)))
STUDIES := $(shell sed -n "s/.*study = 'lambda' *\# \(.*\)\\\\n\",/\1/p" nbs/run_ablation.ipynb)
STUDY ?= lambda
.PHONY: help venv demo $(RUNS) ablation reports ledger trace bench bench-full test test-all types lint faults sync hooks lab browser-test clean
help:
	@echo "make demo  train, attack, score and report on the embedded images"
	@echo "make table1 P='-p dataset omniglot -p root path/to/archives'   a table with parameters; also $(filter-out table1 cost data,$(RUNS))"
	@echo "make lambda P='-p dataset omniglot'   a study by its name: $(STUDIES)"
	@echo "make cost P='-p dataset cub -p preset paper'   time and memory that a table will take here"
	@echo "make table3 N=2   the same by torchrun in two processes, which share every training and evaluation"
	@echo "make test  sync check, linter, type check, notebook tests, pytest; make test-all  the slow tests as well; make lint, make types  one of them alone"
	@echo "make faults   kills, full disks, damaged files and dying workers, then hostile data for every reader, three quarters of an hour; writes reports/reliability.json"
	@echo "make reports   builds every page in reports/ from its results.json and the ledger, and reports/index.html, which leads to them"
	@echo "make ledger   brings finished runs of reports/store, or of S=another/reports/store, into reports/runs.jsonl, which is what git keeps of them"
	@echo "make trace REPORT=table1-glyphs-small ROW=act COLUMN=R@1   from a number to configuration, data, seed, versions and weights"
	@echo "make lab   JupyterLab, opened at its start page"
	@echo "make browser-test   notebooks, reports and pages in a real browser; needs node and Chromium"
	@echo "make docs  HTML pages in build/docs/html/: notebooks, API, equations, reports; needs npm for the formulas"
	@echo "make bench speed against its lower bounds, under 10 minutes; bench-full: the sizes of the papers, within an hour"

venv: $(VENV)/.ready

$(VENV)/.ready: $(INPUTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "expected Python 3.11 or newer, found %d.%d: run make with PYTHON=/path/to/python3.11" % v[:2])'
	@began=$$SECONDS; set -e; \
	if [ -z "$(NO_UV)" ] && command -v uv >/dev/null; then \
	  [ -x $(BIN)/python ] || uv venv -q --seed --python $(PYTHON) $(VENV); \
	  install="uv pip install -q --compile-bytecode --python $(BIN)/python"; \
	else \
	  [ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV); \
	  if [ -z "$(NO_UV)" ] && $(BIN)/python -m pip install -q uv; then install="$(BIN)/python -m uv pip install -q --compile-bytecode --python $(BIN)/python"; \
	  else install="$(BIN)/python -m pip install -q"; fi; \
	fi; \
	echo "installing the environment into $(VENV)"; \
	$$install -c constraints.txt -e '.[reports,dev]'; \
	echo "installation took $$((SECONDS-began)) s"
	@touch $@


# The pipe keeps the kernel's output in order when the caller sends it to a file.
PAPERMILL := $(BIN)/papermill --log-level ERROR --no-progress-bar --stdout-file /dev/stdout --stderr-file /dev/stderr

# A store of its own: the demo does the work although the results of the same runs are committed.
demo: venv
	@began=$$SECONDS; for table in table1 table2; do $(MAKE) --no-print-directory $$table P='-p out reports/demo' || exit 1; done; \
	cmp -s reports/demo/table1-glyphs-quick/table.csv reports/table1-glyphs-quick/table.csv && same="the same, byte for byte, as" || same="not the same (another machine or library version) as"; \
	echo "the table is $$same the committed one in reports/table1-glyphs-quick"; \
	echo "the work took $$((SECONDS-began)) s; open reports/demo/table1-glyphs-quick/index.html"

define run
@mkdir -p build; set -o pipefail; $(if $(N),$(BIN)/torchrun --standalone --nproc_per_node $(N) --no-python sh -c '$(PAPERMILL) nbs/run_$@.ipynb build/$@.$$RANK.ipynb "$$@"' sh $(1) $(P),$(PAPERMILL) nbs/run_$@.ipynb build/$@.ipynb $(1) $(P)) 2>&1 | cat
endef

$(RUNS): venv
	$(call run)

ablation: venv
	$(call run,-p study $(STUDY))

.DEFAULT:
	@$(MAKE) --no-print-directory ablation STUDY='$@'

# No training: pages from the results beside them.
reports: venv
	$(BIN)/python -c 'from robust_dml.papers import gallery; gallery.rewrite_all("reports")'

# S: another store; OLD=1: files from before there were hashes.
ledger: venv
	$(BIN)/python -c 'import sys; from robust_dml.runs import store; print(*store.share("reports", sys.argv[1], unsigned=bool(sys.argv[2])), sep="\n")' '$(S)' '$(OLD)'

# R@1 of ACT in a table, for example: make trace REPORT=table1-glyphs-small ROW=act COLUMN=R@1 MORE='--setting A'
trace: venv
	@$(BIN)/python -m robust_dml.report.trace 'reports/$(REPORT)' '$(ROW)' '$(COLUMN)' $(MORE)

bench: venv
	$(BIN)/python benchmarks/run.py

bench-full: venv
	$(BIN)/python benchmarks/run.py --full

sync: venv
	@$(BIN)/python tests/check_sync.py

# A commit that is out of sync is refused; notebooks merge cell by cell (the driver needs the environment on the path).
hooks: venv
	$(BIN)/nbdev_install_hooks
	@hook="$$(git rev-parse --git-path hooks)/pre-commit"; mkdir -p "$$(dirname "$$hook")"; \
	printf '#!/bin/sh\nexec make --no-print-directory sync\n' > "$$hook" && chmod +x "$$hook" && echo "$$hook runs make sync"

types: venv
	$(BIN)/mypy

lint: venv
	$(BIN)/ruff check --quiet

# One thread each: the work of a test is too small for threads, which wait for each other where cores are busy.
test: export OMP_NUM_THREADS := 1
test: sync lint types
	$(BIN)/nbdev_test --n_workers 2 --timing
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

# What takes a minute a test as well: deep networks, whole chains of runs.
test-all: export OMP_NUM_THREADS := 1
test-all: test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

faults: venv
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/campaign.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/readers.py --seconds 600

# Opens the start page. Figures belong into the notebooks here, so MPLBACKEND goes; .jupyter/ turns the question about news off. LAB: further options.
lab: export JUPYTER_CONFIG_PATH := $(CURDIR)/.jupyter$(if $(JUPYTER_CONFIG_PATH),:$(JUPYTER_CONFIG_PATH))
lab: venv
	env -u MPLBACKEND $(BIN)/jupyter lab --ServerApp.root_dir='$(CURDIR)' --LabApp.default_url=/lab/tree/nbs/index.ipynb $(LAB)

# Skipped with a sentence where node, npm or Chromium are absent; CI_REQUIRE_BROWSER=1 makes that a failure.
browser-test: venv
	@$(BIN)/python tests/browser/run.py $(T)

# Sphinx comes on top of the environment, with a stamp of its own, so that the tests do without it.
$(VENV)/.docs: $(VENV)/.ready
	@if [ -z "$(NO_UV)" ] && command -v uv >/dev/null; then install="uv pip install -q --python $(BIN)/python"; \
	elif [ -z "$(NO_UV)" ] && [ -x $(BIN)/uv ]; then install="$(BIN)/uv pip install -q --python $(BIN)/python"; \
	else install="$(BIN)/python -m pip install -q"; fi; \
	$$install -c constraints.txt -e '.[docs]'
	@touch $@

# A build that was stopped has no search index yet and begins anew: Sphinx would leave pages out of it.
.PHONY: docs
docs: export OMP_NUM_THREADS := 1
docs: $(VENV)/.docs
	@began=$$SECONDS; set -e; \
	[ -f build/docs/html/searchindex.js ] || rm -rf build/docs/doctrees; \
	$(BIN)/python docs/prepare.py build/docs/source; \
	$(BIN)/python -m sphinx -q -W --keep-going -b html -j auto -d build/docs/doctrees build/docs/source build/docs/html; \
	echo "the pages took $$((SECONDS-began)) s; open build/docs/html/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info
