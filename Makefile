# What a contributor runs. All of it also works by hand: see the recipes.
python = .venv/bin/python

.PHONY: install check test test-one gpu map bits oracles

install:            ## .venv with what the tests need
	bash scripts/install.sh test

check: install      ## style, types and the plan of the house, in under a minute
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	$(python) -m pytest -q tests/test_house.py

test:               ## the quick suite, as continuous integration runs it
	bash scripts/test.sh

test-one: install   ## one file or test: make test-one T=tests/test_eval.py
	OMP_NUM_THREADS=1 $(python) -m pytest -q -x $(T)

gpu:                ## on a CUDA machine: every test of tests/gpu
	python3 -m pytest -q -rs tests/gpu

map:                ## every file with its lines and its first sentence
	@$(python) scripts/map.py

oracles:            ## other trainers' checkpoints in tests/fixtures/trained, made anew by them
	bash scripts/oracles.sh

bits:               ## every script's numbers to the bit: make bits OUT=after.json AGAINST=before.json
	$(python) tests/record_bits.py $(OUT) $(if $(AGAINST),--against $(AGAINST))
