# make            what there is
# make run        rank the sample photos into out/ (no PyTorch needed)
# make test       lint, format, types, tests
# make test-slow  what is too heavy for every day
# make fuzz      damaged files for everything that reads files; MINUTES=10
# make docs       the pages of docs/ as HTML, in build/docs; needs no network once installed
# make count      lines of code outside the tests, by folder (REVISION=… of a commit)
# PYTHON=python3.12 make …  with another interpreter (3.11 or newer)

PYTHON ?= python3
# The users' environment stays as small as theirs; the tests have another.
RUN := .venv
TEST := .venv-test
BUILD := setup.cfg pyproject.toml
PACKAGE := $(BUILD) $(shell find dsgnn runtime export benchmarks -type f -not -path '*/__pycache__/*')

.PHONY: help run fuzz test test-slow lint docs count clean

help:
	@sed -n 's/^# make/make/p' Makefile

run: $(RUN)/.installed
	$(RUN)/bin/dsgnn-run runtime/samples/*.jpg --out out
	@echo "The ranked photos are in out/: overlays to look at, results.json to read."

test: lint
	$(TEST)/bin/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

# As many inputs as the time allows; see tests/fuzz.py for one target or another seed.
fuzz: $(TEST)/.installed
	$(TEST)/bin/python tests/fuzz.py --minutes $(or $(MINUTES),10)

test-slow: $(TEST)/.installed
	$(TEST)/bin/python -m pytest -m slow

lint: $(TEST)/.installed
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .

# The variable silences an advertisement for another tool.
docs: $(TEST)/.installed
	NO_MKDOCS_2_WARNING=1 $(TEST)/bin/python -m mkdocs build --strict

count:
	@$(PYTHON) tests/count_code.py $(REVISION)

# A build folder left by an earlier build would bring deleted modules back.
$(RUN)/.installed: $(PACKAGE)
	test -x $(RUN)/bin/python || $(PYTHON) -m venv $(RUN)
	rm -rf build
	$(RUN)/bin/python -m pip install --quiet '.[cpu]'
	touch $@

# The stubs alone: TensorRT, which they ask for, has its libraries elsewhere than on PyPI.
$(TEST)/.installed: $(BUILD)
	test -x $(TEST)/bin/python || $(PYTHON) -m venv $(TEST)
	$(TEST)/bin/python -m pip install --quiet --editable '.[dev]'
	$(TEST)/bin/python -m pip install --quiet --no-deps 'tensorrt-stubs>=10.13'
	$(TEST)/bin/python -c 'from dsgnn.export.web.npm import fetch_runtime; fetch_runtime()' || \
		echo "the tests of the browser are skipped, and the docs lack its page" >&2
	touch $@

clean:
	rm -rf $(RUN) $(TEST) build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache
