# Needs python3 and make. As root on Debian it installs all other programs that are missing;
# otherwise it lists them. PYTHON=python3.12 uses another Python for .venv, and VENV=DIRECTORY
# another directory.

PYTHON ?= python3
VENV ?= .venv
export PYTHON VENV

# Tests start hundreds of processes, which need not compile the same modules again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo quick test test-faults coverage soak bench lint format docs sql js clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-demo ## show events in a browser; ARGS=--check runs a check without one; PROXY=pushpin adds Pushpin
	@$(if $(filter pushpin,$(PROXY)),.ci/need pushpin)
	@$(VENV)/bin/python -m pg_eventstream.demo $(PROXY:%=--proxy %) $(ARGS)

quick: $(VENV)/.installed-test ## run the tests that need only Python and its wheels; ARGS is passed to pytest
	$(VENV)/bin/pytest --numprocesses=2 --dist=loadfile tests/unit tests/integration tests/endpoint $(ARGS)

test: lint ## lint, then run all tests; ARGS is passed to pytest
	@.ci/need pushpin node npm chromium "chromium-headless-shell?" pgbouncer nginx curl prometheus redis-server
	$(VENV)/bin/pytest --numprocesses=4 --dist=loadfile $(ARGS)

test-faults: lint ## run the tests with faults, many times; PG_EVENTSTREAM_TEST_SEED repeats a run
	@.ci/need pushpin node npm chromium "chromium-headless-shell?" pgbouncer nginx curl prometheus redis-server
	PG_EVENTSTREAM_TEST_THOROUGH=1 $(VENV)/bin/pytest --numprocesses=2 --dist=loadfile -m faults $(ARGS)

soak: $(VENV)/.installed-dev ## simulate days of work in 10 minutes, with small faults; ARGS="--minutes 60 --calm"
	@.ci/need pushpin
	$(VENV)/bin/python -m tests.soak $(ARGS)

bench: ## run the benchmarks, also of other libraries; ARGS=--quick for rough figures
	@.ci/need pushpin
	@VENV=.venv-bench .ci/install bench
	.venv-bench/bin/python -m benchmarks $(ARGS)

coverage: $(VENV)/.installed-dev ## run the same tests as quick and list the lines and branches that they miss
	$(VENV)/bin/coverage erase
	$(VENV)/bin/coverage run -m pytest --numprocesses=2 --dist=loadfile tests/unit tests/integration tests/endpoint $(ARGS)
	$(VENV)/bin/coverage combine --quiet
	$(VENV)/bin/coverage report

lint: $(VENV)/.installed-dev ## ruff, mypy, spelling, and the syntax of the CI description
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/typos
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/ci.yml

format: $(VENV)/.installed-dev ## format the code, and fix what ruff can fix
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

docs: $(VENV)/.installed-docs ## build the documentation as HTML in docs/_build; warnings are errors
	$(VENV)/bin/python -m sphinx -nW --keep-going -q docs docs/_build
	@echo "Open docs/_build/index.html"

sql: $(VENV)/.installed-dev ## write the migrations as plain SQL, into migrations/
	@$(VENV)/bin/python -m migrations.generate

js: $(VENV)/.installed-dev ## write the browser client's classic script from the module
	@$(VENV)/bin/python -m tests.support.classic_script

clean: ## remove everything that is not source
	@if [ -d .demo/postgres/elsewhere ]; then rm -rf "$$(readlink .demo/postgres/elsewhere)"; fi
	rm -rf .venv .venv-bench .demo .test-servers build dist docs/_build *.egg-info .mypy_cache .ruff_cache .pytest_cache .nox .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed-%: pyproject.toml
	@.ci/install $*
