# make demo   the main job, from generated images to an INT8 engine and its accuracy proof
# make test   lint, types, import floors and the whole test suite
# make test-optional   what needs qemu, CMake, Chromium or a like tool; skips name what is missing
# make torture   broken, cut, hostile and interrupted: every row of docs/reliability.md
# make serve-demo   generated people in a gallery, and the page that searches it
# make docs   the generated reference: docs/api.md and docs/schemas
# make wheels   wheels for x86_64 and aarch64 and the source distribution, into dist/
# make gpu-check   on a machine with a GPU, nvcc and torch: the CUDA kernels, checked and timed
# Each makes .venv on first use and installs what it needs there; nothing outside this folder is touched.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt $(wildcard nformer_edge/ops/src/*)

.PHONY: help install demo serve-demo docs torture test test-optional wheels gpu-check lint format clean

help:
	@sed -n 's/^# //p' Makefile | head -9

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"nformer-edge needs Python 3.10 or later, got {v[0]}.{v[1]}: run make PYTHON=python3.11 ...")'
	@test -e $(BIN)/python || echo "First use: making $(VENV). PyTorch, ONNX Runtime and the native kernels take about 3 minutes and 1.5 GB."
	@test -e $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/nformer-edge demo -o demo

serve-demo: install
	$(BIN)/python export/service/demo.py demo build/serve-demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

torture: install
	cd tests && $(abspath $(BIN))/python -m torture -o ../docs/reliability.md

docs: install
	$(BIN)/python docs/generate.py

test-optional: install
	$(BIN)/python -m pytest -m optional

wheels:
	export/wheels.sh dist

gpu-check:
	$(PYTHON) plugins/gpu_check.py

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

format: install
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
