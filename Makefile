# Needs python3 and make. As root on Debian it installs what else is missing; otherwise it says
# what that is. PYTHON=python3.12 chooses another Python for .venv.

PYTHON ?= python3
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help demo test test-faults soak bench lint docs sql js clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.installed-demo ## events in a browser; ARGS=--check checks without one; PROXY=pushpin adds Pushpin
	@$(if $(filter pushpin,$(PROXY)),.ci/need pushpin)
	@.venv/bin/python -m pg_eventstream.demo $(PROXY:%=--proxy %) $(ARGS)

test: lint ## lint, then run the tests; ARGS goes to pytest
	@.ci/need pushpin node npm chromium pgbouncer
	.venv/bin/pytest --numprocesses=2 --dist=loadfile $(ARGS)

test-faults: lint ## faults of every kind, again and again; PG_EVENTSTREAM_TEST_SEED repeats a run
	@.ci/need pushpin node npm chromium pgbouncer
	PG_EVENTSTREAM_TEST_THOROUGH=1 .venv/bin/pytest --numprocesses=2 --dist=loadfile -m faults $(ARGS)

soak: .venv/.installed-test ## days of work in 10 minutes, with small faults; ARGS="--minutes 60 --calm"
	@.ci/need pushpin
	.venv/bin/python -m tests.soak $(ARGS)

bench: ## measure everything against its peers; ARGS=--quick for a rough idea
	@.ci/need pushpin
	@VENV=.venv-bench .ci/install bench
	.venv-bench/bin/python -m benchmarks $(ARGS)

lint: .venv/.installed-test ## ruff and mypy
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

docs: .venv/.installed-docs ## the documentation as HTML, in docs/_build; a warning is an error
	.venv/bin/python -m sphinx -nW --keep-going -q docs docs/_build
	@echo "Open docs/_build/index.html"

sql: .venv/.installed-test ## write the migrations as plain SQL, into migrations/
	@.venv/bin/python -m migrations.generate

js: .venv/.installed-test ## write the browser client's classic script from the module
	@.venv/bin/python -m tests.support.classic_script

clean: ## remove everything that is not source
	@if [ -d .demo/postgres/elsewhere ]; then rm -rf "$$(readlink .demo/postgres/elsewhere)"; fi
	rm -rf .venv .venv-bench .demo .test-servers build dist docs/_build *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed-%: pyproject.toml
	@.ci/install $*
