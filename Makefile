# One entry for each development action. `make setup` first.
PYTHON = .venv/bin/python

.PHONY: setup test fuzz slow lint format types ci bench-quantize bench-decode bench-plan bench-replay bench-calibration reference build clean

setup:           ## a virtual environment with all that development needs
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet -e '.[dev]'

test:            ## the suite, a few minutes
	$(PYTHON) -m pytest -n 2

fuzz:            ## every parser with 100,000 inputs that nobody meant, some minutes
	$(PYTHON) tests/fuzz.py --runs 100000

slow:            ## tests at full-size shapes: minutes, and 8 GB of disk
	$(PYTHON) -m pytest -m slow

lint:            ## style, common mistakes, and which room imports which
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports

format:          ## put the code in form
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

types:
	.venv/bin/mypy

ci:              ## what a change must pass
	.ci/run

bench-quantize:  ## the quantiser beside bitsandbytes'
	$(PYTHON) benchmarks/quantize_speed.py

bench-decode:    ## decode on the embedded model beside transformers'
	$(PYTHON) benchmarks/decode_tiny.py

bench-plan:      ## predicted against measured memory, of the store named by STORE
	$(PYTHON) benchmarks/plan_accuracy.py $(STORE)

bench-calibration: ## an expert measured, routing replayed, bytes spread over experts
	$(PYTHON) benchmarks/calibration_speed.py

bench-replay:    ## recorded routing through caches of every size
	$(PYTHON) benchmarks/replay_tiny.py

reference:       ## docs/commands.md, from the commands themselves
	$(PYTHON) -m qmix.commands.reference

build:           ## the distribution files
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
