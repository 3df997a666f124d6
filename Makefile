# `make demo` and `make test` make .venv by themselves; they assume Python >= 3.10 and pip, nothing else.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt $(wildcard setup.py CMakeLists.txt csrc/*)
OUT ?= out/demo
JOBS ?= 2

.PHONY: demo test check docs venv vendor clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    built-in scenes, end to end: classifier, masker, explanations, report (in $(OUT))"
	@echo "make test    the test suite, in JOBS=2 processes"
	@echo "make check   ruff, formatting and types"
	@echo "make docs    the documentation, strictly, in site/"
	@echo "make venv    the virtual environment alone"
	@echo "make vendor  the libraries kept in the package, again from the npm registry (or FROM=a tarball)"

demo: $(VENV)/stamp
	$(BIN)/minexp demo --out $(OUT)

test: $(VENV)/stamp $(VENV)/vision
	@# A file's tests stay in one process, which shares what they make; a thread each, or processes get in each other's way.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

check: $(VENV)/stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

venv: $(VENV)/stamp $(VENV)/vision

# The environment without the package: made again only when a pinned version changes.
$(VENV)/base: constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.10 or newer is needed and none is on the PATH" >&2; exit 2; }
	@# Some systems ship Python without venv's own copy of pip; the system's pip then installs one.
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(PIP) install -q -c constraints.txt torch numpy setuptools ninja
	@touch $@

# What `--model torchvision:…`, `timm:…` and `hf:…` load, and a peer of the circuits; --no-deps, because they would choose
# a torch.
$(VENV)/vision: $(VENV)/base
	$(PIP) install -q -c constraints.txt --no-deps torchvision timm zennit zennit-crp
	$(PIP) install -q -c constraints.txt transformers
	@touch $@

# --no-build-isolation: the extension is compiled against the torch installed here. Where that fails, the package
# is installed without it, and its operators run on plain PyTorch.
$(VENV)/stamp: $(VENV)/base $(INPUTS)
	@command -v $${CXX:-c++} >/dev/null || \
		echo "minexp: no C++ compiler found; the operators will run on plain PyTorch (slower, same results)"
	@echo "minexp: installing into $(VENV)"
	@$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev]' || { \
		echo "minexp: the C++ extension did not build; the operators will run on plain PyTorch"; \
		MINEXP_BUILD=0 $(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev]'; }
	@touch $@

vendor: $(VENV)/stamp
	$(BIN)/python -m minexp.report.vendored $(FROM)

clean:
	rm -rf $(VENV) build dist site *.egg-info minexp/*.so
