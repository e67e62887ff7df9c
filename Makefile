# Every target makes its own environment in .venv; nothing outside this folder is touched.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help install test demo lint clean

help: ## Show this list.
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

install: $(INSTALLED) ## Make .venv and install medvision and its tools in it.

$(INSTALLED): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[test,dev]'
	touch $@

test: $(INSTALLED) ## Run every test, on up to four cores at once.
	$(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal

demo: $(INSTALLED) ## Fetch public data, train, predict and report: the four lines of the README.
	$(BIN)/medvision sample data/
	$(BIN)/medvision train data/train -o runs/nodules $(if $(wildcard runs/nodules/state.json),--resume)
	$(BIN)/medvision predict runs/nodules data/series -o out
	$(BIN)/medvision report out --truth data/series_truth -o out/report.html

lint: $(INSTALLED) ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy medvision cli

clean: ## Remove the environment and what tools left behind; data, runs and out stay.
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
