# make demo · make test · make lint · make bench: each sets up .venv itself.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
EXTRAS := train,atoms,molecules,points,bench,dev
NVCC_PINS := nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85

# Without a C++ compiler everything still works on the plain-PyTorch kernels; with CI set that is an error.
CXX_FOUND := $(shell command -v $(firstword $(CXX)) 2>/dev/null)
ifneq ($(CXX_FOUND)$(CI),)
  export GEO_CPU := ON
else
  export GEO_CPU := OFF
endif
export GEO_CUDA ?= AUTO

NATIVE := CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: help
help:
	@echo "make demo        train an SE(3)-equivariant potential on ethanol and run molecular dynamics with it"
	@echo "make test        the test suite"
	@echo "make test-all    the test suite with the slow tests"
	@echo "make lint        ruff (lint and format) and mypy"
	@echo "make bench       the benchmarks that the targets are stated for"
	@echo "make cuda-check  compile the CUDA kernels (needs no GPU)"
	@echo "make simd-check  the AVX-512 kernels really use 512-bit registers"
	@echo "make sanitize    the op tests on CPU kernels built with the address and undefined-behaviour sanitizers"
	@echo "make sanitize-threads  tests of ops on several threads with the thread sanitizer"
	@echo "make clean       remove .venv and build"

# torch first, under the constraint: the kernels are compiled against the torch that will run them, while pip fetches the rest.
$(VENV)/.torch: constraints.txt
	@echo "== installing into $(VENV) (two or three minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch numpy "scikit-build-core>=0.11" "cmake>=3.24" ninja
	@touch $@

$(VENV)/.deps: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q $$($(BIN)/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print(*(r.replace(' ', '') for r in p['dependencies'] + [r for e in '$(EXTRAS)'.split(',') for r in p['optional-dependencies'][e]]))")
	@touch $@

$(VENV)/.native: $(VENV)/.torch pyproject.toml $(NATIVE)
	@if [ "$(GEO_CPU)" = OFF ]; then echo "== no C++ compiler: geo runs on its plain-PyTorch kernels"; fi
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -q --no-build-isolation --no-deps -e .
	@touch $@

.PHONY: install
install:
	@$(MAKE) --no-print-directory -j2 $(VENV)/.deps $(VENV)/.native

.PHONY: demo
demo: install
	$(BIN)/python examples/molecules.py

.PHONY: test test-all
test: install
	$(BIN)/python -m geo
	OMP_WAIT_POLICY=passive OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist worksteal -m "not slow"
test-all: install
	OMP_WAIT_POLICY=passive OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist worksteal

.PHONY: lint
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: bench
bench: install
	$(BIN)/python -m geo bench se_conv

# nvcc from PATH, else the pinned wheels in .venv (which lack the two links that nvcc's linker wants), else this fails.
.PHONY: cuda-check
cuda-check: $(VENV)/.deps
	@if ! command -v nvcc >/dev/null; then \
	  $(BIN)/pip install -q $(NVCC_PINS); \
	  cd $(VENV)/lib/python3*/site-packages/nvidia/cu13; ln -sfn lib lib64; ln -sf libcudart.so.13 lib/libcudart.so; \
	fi
	@nvcc=$$(command -v nvcc || ls $(CURDIR)/$(VENV)/lib/python3*/site-packages/nvidia/cu13/bin/nvcc); \
	echo "== compiling the CUDA kernels with $$($$nvcc --version | tail -n 1)"; rm -rf build/cuda-check; \
	PATH="$(CURDIR)/$(BIN):$$PATH" GEO_CPU=OFF GEO_CUDA=ON cmake -S . -B build/cuda-check -G Ninja \
	  -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCMAKE_CUDA_COMPILER=$$nvcc >/dev/null; \
	$(BIN)/cmake --build build/cuda-check

.PHONY: simd-check
simd-check: install
	$(BIN)/python csrc/simd_check.py

# Python itself is not instrumented, so the runtimes must be there first; leaks are not looked for (Python's are many).
# Left out: tests that start other processes, compile graphs, differentiate twice or compare runs, which reach no further
# kernel, and the checks for null and object sizes, which the address sanitizer makes, too. Calls in place of inline checks
# and -O1 at the end of the command: the compiler takes several times as long otherwise. The tests run on the widest vectors,
# which have the masks, and on the baseline. In a folder where simd-check does not look for what it checks.
SANITIZE := -fsanitize=address,undefined -fno-sanitize=vptr,null,object-size -fno-sanitize-recover=all -g1 \
  --param asan-instrumentation-with-call-threshold=0
SANITIZE_RULE := <CMAKE_CXX_COMPILER> <DEFINES> <INCLUDES> <FLAGS> -O1 -o <OBJECT> -c <SOURCE>
SANITIZE_SKIP := simd or bits or library or info or package or plain_pytorch or memory or compile or inductor or opcheck or derivatives
.PHONY: sanitize
sanitize: install
	PATH="$(CURDIR)/$(BIN):$$PATH" GEO_CPU=ON GEO_CUDA=OFF cmake -S . -B $(VENV)/sanitize -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCMAKE_CXX_FLAGS="$(SANITIZE)" \
	  -DCMAKE_CXX_COMPILE_OBJECT="$(SANITIZE_RULE)" >/dev/null
	$(BIN)/cmake --build $(VENV)/sanitize
	runtimes=$$(for name in libasan.so libubsan.so libstdc++.so; do $(firstword $(CXX)) -print-file-name=$$name; done); \
	for level in avx512 baseline; do \
	  LD_PRELOAD="$$(echo $$runtimes)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 GEO_SIMD=$$level \
	    GEO_LIBRARY_DIR=$(CURDIR)/$(VENV)/sanitize OMP_NUM_THREADS=2 \
	    $(BIN)/python -m pytest -q -p no:cacheprovider --capture=sys -m "not slow" -k "not ($(SANITIZE_SKIP))" tests/ops; \
	done

# Work is shared among plain threads (csrc/plain_threads.cpp): the thread sanitizer does not see what OpenMP waits for. The
# baseline copy of the leaf kernels alone is built, under the name of a processor without others: the levels share their
# launchers, which is where threads meet. A finding makes the exit status 66; none is suppressed.
SANITIZE_THREADS := (threads or hub or bad) and not (plan_hub or ten_runs or 70 or compile or plain_pytorch)
.PHONY: sanitize-threads
sanitize-threads: install
	PATH="$(CURDIR)/$(BIN):$$PATH" GEO_CPU=ON GEO_CUDA=OFF cmake -S . -B $(VENV)/sanitize-threads -G Ninja \
	  -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCMAKE_CXX_FLAGS="-fsanitize=thread -g1" \
	  -DCMAKE_CXX_COMPILE_OBJECT="$(SANITIZE_RULE)" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=baseline >/dev/null
	$(BIN)/cmake --build $(VENV)/sanitize-threads
	torch=$$($(BIN)/python -c "import os, torch; print(os.path.dirname(torch.__file__))"); \
	$(CXX) -std=c++17 -shared -fPIC -O1 -g1 -fsanitize=thread -DTORCH_TARGET_VERSION=0x020a000000000000 \
	  -isystem $$torch/include csrc/plain_threads.cpp -o $(VENV)/sanitize-threads/libplain_threads.so
	runtimes=$$(for name in libtsan.so libstdc++.so; do $(firstword $(CXX)) -print-file-name=$$name; done); \
	LD_PRELOAD="$$(echo $$runtimes) $(CURDIR)/$(VENV)/sanitize-threads/libplain_threads.so" \
	  OMP_NUM_THREADS=1 GEO_LIBRARY_DIR=$(CURDIR)/$(VENV)/sanitize-threads \
	  $(BIN)/python -m pytest -q -p no:cacheprovider --capture=sys -m "not slow" -k "$(SANITIZE_THREADS)" tests/ops

.PHONY: clean
clean:
	rm -rf $(VENV) build geo/_lib
