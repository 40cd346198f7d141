PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-slow test-peer fuzz test-gpu bench proof docs lint clean

setup: .venv/.done

.venv/.done: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node=2 -m sslr1.train configs/tiny.yaml log.name=demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses=8 --dist worksteal

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

PEERS = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["peers"])

test-peer: setup
	$(BIN)/pip install --quiet -c constraints.txt $$($(BIN)/python -c '$(PEERS)')
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m peer

# ten minutes of generated inputs for each reader of what others write, and of images of any shape
fuzz: setup
	for target in config reward shape tar; do $(BIN)/python -m tests.fuzz $$target --minutes 10 || exit 1; done

test-gpu: setup
	$(BIN)/python -m pytest -q -m gpu

bench: setup
	$(BIN)/python bench/

# about two and a half hours on two cores; goes on where it was stopped
proof: setup
	$(BIN)/python bench/proof.py
	$(BIN)/python bench/tables.py

docs: setup
	$(BIN)/python docs/make.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build runs *.egg-info sslr1/*.so
