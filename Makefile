# Everything a developer or a new user runs. `make demo` and `make test` set the machine up first:
# they need Python ≥ 3.11, a Rust toolchain and make, and fetch the rest.

PYTHON ?= python3
UV ?= $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
RUN = $(UV) run --frozen --no-sync
# One thread per process: several processes share the cores, and more threads fight for them.
export OMP_NUM_THREADS ?= 1
# torch looks up the name of each peer that connects: a silent name server must not stall that.
export RES_OPTIONS ?= timeout:1 attempts:1

.PHONY: help demo demo-server test test-slow test-oldest check setup format lint types rust bench bench-simulator bench-learning bench-links bench-server bench-server-learning digests clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

demo: setup ## three replica groups train, one is killed and heals
	$(RUN) torchft demo $(ARGS)

demo-server: setup ## a parameter server and its workers: one is killed, one joins, the server is killed
	$(RUN) torchft demo-server $(ARGS)

test: setup ## the Python and Rust tests
	cargo test --quiet --release -p torchft-quorum -p torchft-server
	$(RUN) pytest -m "not slow" $(ARGS)

test-slow: setup ## the long campaigns, seeds printed
	$(RUN) pytest -m slow -s --timeout 3600 $(ARGS)

test-oldest: setup ## the tests nearest to torch on the oldest supported one
	$(UV) venv --quiet --allow-existing .venv-oldest
	$(UV) pip install --quiet --python .venv-oldest "torch==2.7.0" numpy tqdm hypothesis psutil pytest pytest-timeout
	.venv-oldest/bin/python -m pytest -m "not slow" tests/integration/test_manager.py tests/integration/test_heals.py \
		tests/integration/test_doors.py tests/strategies tests/unit/test_process_group.py \
		tests/unit/test_ddp.py tests/unit/test_local_sgd.py tests/unit/test_checkpointing_http.py $(ARGS)

check: setup lint types test ## all that must pass before a change lands

setup: $(UV)
	@$(UV) sync --frozen --quiet

.uv/bin/uv:
	@$(PYTHON) -m venv .uv && .uv/bin/pip install --quiet uv

format: setup ## rewrite the sources in the project's format
	cargo fmt --all
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

lint: setup
	cargo fmt --all --check
	cargo clippy --quiet --release --workspace --all-targets -- -D warnings
	$(RUN) ruff format --check .
	$(RUN) ruff check .

types: setup
	$(RUN) mypy

digests: setup ## simulated and real nodes compute equal bits: a table
	$(RUN) python -m torchft.launch.digests $(ARGS)

bench: setup ## the figures in docs/benchmarks.md, each with its floor
	$(RUN) python benchmarks/run.py $(ARGS)

bench-simulator: setup ## the figures of the simulator alone
	$(RUN) python benchmarks/run.py simulator simulator_starts $(ARGS)

bench-learning: setup ## what communicating less costs in held-out loss: ten minutes
	$(RUN) python benchmarks/run.py learning $(ARGS)

bench-links: setup ## slow links: how much of the time groups train (root, iproute2)
	$(RUN) python benchmarks/links.py $(ARGS)

bench-server: setup ## the parameter server: time, bytes, memory, a kill, many workers: ten minutes
	$(RUN) python benchmarks/run.py server server_faults $(ARGS)

bench-server-learning: setup ## what it costs in held-out loss not to wait for the slowest
	$(RUN) python benchmarks/run.py server_learning $(ARGS)

clean: ## remove what was built
	cargo clean
	rm -rf .venv .venv-oldest .uv dist torchft/*.so .pytest_cache .mypy_cache .ruff_cache
