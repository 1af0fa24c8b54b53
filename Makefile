# Everything here sets itself up in .venv; it takes Python >= 3.10, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc -type f)
PIP := $(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt

.PHONY: demo test lint bench clean

demo: $(VENV)/demo.stamp
	$(BIN)/pyfeat demo --out demo --force

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests benchmarks -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh')
	! grep -rnE '^\s*#\s*@' --include='*.py' pyfeat tests benchmarks

bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks

clean:
	rm -rf build dist $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'

$(VENV)/demo.stamp: $(BIN)/python $(NATIVE) .ci/constraints.txt
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/dev.stamp: $(BIN)/python $(NATIVE) .ci/constraints.txt
	$(PIP) --config-settings=cmake.define.PYFEAT_WARNINGS_AS_ERRORS=ON --editable '.[demo,hf]' --group dev
	touch $@ $(VENV)/demo.stamp
