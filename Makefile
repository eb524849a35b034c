VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: install demo test check format bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Finetunes a real Llama on two devices: two GPUs if there are, else two processes on the CPU.
DEMO_DIR ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
DEMO_FLAGS ?=
demo: $(STAMP)
	$(BIN)/python recipes/fsdp2_qlora.py --devices 2 --output_dir $(DEMO_DIR) $(DEMO_FLAGS)

# Two files of tests at a time. On a machine with one GPU, `make test TEST_FLAGS=` runs one after another.
TEST_FLAGS ?= -n 2 --dist loadfile
test: $(STAMP)
	$(BIN)/python -m pytest $(TEST_FLAGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	for script in recipes/benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info runs
