# Everything here sets itself up in .venv; it takes Python >= 3.10, a C++ compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc -type f)
PIP := $(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt

SOURCES := $(NATIVE) README.md LICENSE $(shell find pyfeat tests/archives .ci -type f -not -name "*.so" -not -name "*.pyc")

.PHONY: demo test lint bench wheel wheel-cuda test-wheel clean

demo: $(VENV)/demo.stamp
	$(BIN)/pyfeat demo --out demo --force

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests benchmarks -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	! grep -rnE '^\s*#\s*@' --include='*.py' pyfeat tests benchmarks

bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks

# For this machine and Python; those of a release come from .github/workflows/release.yml.
wheel: dist/wheel.stamp

wheel-cuda: dist/cuda/wheel.stamp

test-wheel: dist/wheel.stamp
	.ci/try_archive.sh $(BIN)/python dist/*.whl
	.ci/try_archive.sh $(BIN)/python dist/*.tar.gz
	if [ -f dist/cuda/wheel.stamp ]; then .ci/try_archive.sh $(BIN)/python dist/cuda/*.whl --cuda; fi

clean:
	rm -rf build dist $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'

$(VENV)/demo.stamp: $(BIN)/python $(NATIVE) .ci/constraints.txt
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/dev.stamp: $(BIN)/python $(NATIVE) .ci/constraints.txt
	$(PIP) --config-settings=cmake.define.PYFEAT_WARNINGS_AS_ERRORS=ON --editable '.[demo,hf,train]' --group dev --group proofs
	touch $@ $(VENV)/demo.stamp

$(VENV)/release.stamp: $(BIN)/python .ci/constraints.txt
	$(PIP) --group release
	touch $@

dist/wheel.stamp: $(VENV)/release.stamp $(SOURCES)
	.ci/build_archives.sh $(BIN)/python dist
	touch $@

dist/cuda/wheel.stamp: $(VENV)/release.stamp $(SOURCES)
	.ci/build_archives.sh $(BIN)/python dist/cuda --wheel -C cmake.define.PYFEAT_CUDA=ON -C build-dir=build/wheel-cuda
	touch $@
