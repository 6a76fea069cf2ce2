# `make demo` and `make test` need python3 (3.10 or newer), a C++ compiler and make; everything else goes into .venv.
PYTHON ?= python3
RUN = .venv/bin/python -m

.PHONY: help demo test lint bench clean

help:  ## what can be made
	@sed -n 's/^\([a-z]*\):.*## /\1: /p' Makefile

demo: .venv/ready  ## distil the embedded teacher into runs/demo
	$(RUN) rapm.train --output_dir runs/demo

test: .venv/ready  ## all tests; fails where they cover less than 90% of rapm/
	$(RUN) pytest -n auto --dist loadfile --no-loadscope-reorder --cov --cov-report=term

lint: .venv/ready  ## ruff: rules and format
	$(RUN) ruff check .
	$(RUN) ruff format --check .

bench: .venv/ready  ## benchmarks
	$(RUN) pytest benchmarks/ --benchmark-only

clean:  ## remove build products and caches; .venv and runs stay
	rm -rf build dist *.egg-info .coverage .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# torch on its own first: no other package's looser requirement may choose the build.
.venv/ready: requirements/ci.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(RUN) pip install "$$(grep '^torch==' requirements/ci.txt)"
	$(RUN) pip install -r requirements/ci.txt
	$(RUN) pip install --no-build-isolation --no-deps -e .
	touch $@
