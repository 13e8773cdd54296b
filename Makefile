# make demo   set everything up and make the bundled presenter speak; prints the path of the video
# make test   set everything up, lint, and run the tests
# make lint   ruff and mypy
# PYTHON=python3.12 chooses another interpreter; VENV=DIR another place for the environment.
# Without PYTHON: python3.11, or the machine's python3 where that is newer.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
OUT ?= out
WORKERS ?= 2

.PHONY: demo test lint clean system-packages
.DELETE_ON_ERROR:

demo: $(STAMP)
	@mkdir -p $(OUT)
	$(BIN)/avatard run --image examples/presenter.png --audio examples/welcome.wav --to $(OUT)/demo.mp4 --overwrite
	@echo "$(abspath $(OUT))/demo.mp4"

# Threads that wait sleep instead of spinning: on a busy machine the tests then take half as long.
test: export OMP_WAIT_POLICY ?= PASSIVE
# One thread for each worker and each process that it starts: they are as many as the cores already.
test: export OMP_NUM_THREADS ?= 1
test: $(STAMP) system-packages lint
	$(BIN)/pytest -q -n $(WORKERS) $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer, or say PYTHON=/path/to/python3"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11: say PYTHON=python3.12, or another newer one"; exit 2; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || { echo "the venv module is missing: apt-get install python3-venv"; exit 2; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

system-packages:
	@sh scripts/system-packages

clean:
	rm -rf $(VENV) $(OUT) build dist
