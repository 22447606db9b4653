# Two commands: `make demo` sets up and runs the whole pipeline, `make test` sets up and
# runs the tests. Both need Python >= 3.11 and nothing else; after the installation
# neither needs the network. PYTHON=... chooses the interpreter, VENV=... the folder,
# TORCH_ARGS=... what pip is told besides when it installs torch (another index, say).

PYTHON ?= python3
VENV ?= .venv
TORCH_ARGS ?=
CONFIG ?= examples/end_to_end.yaml
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test test-fast lint setup setup-dev clean

demo: setup
	@start=$$(date +%s); \
	$(BIN)/mtk flow run end_to_end --config $(CONFIG) || exit $$?; \
	echo "make demo: the pipeline took $$(( $$(date +%s) - start )) s"

test: setup-dev lint
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test-fast: setup-dev lint
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

lint: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check --output-format concise .
	$(BIN)/mypy

setup: $(VENV)/.mtk-hf

setup-dev: $(VENV)/.mtk-dev

# torch comes first and by its exact pin, so that nothing else chooses its build.
$(VENV)/.mtk-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mtk needs Python 3.11 or newer; choose one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@start=$$(date +%s); set -e; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	echo "installing mtk[$*] into $(VENV) ..."; \
	$(PIP) install $(TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"; \
	$(PIP) install -c constraints.txt -e '.[$*]'; \
	touch $@; \
	echo "installation took $$(( $$(date +%s) - start )) s"

clean:
	rm -rf $(VENV) runs
