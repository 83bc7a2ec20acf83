# Everything a developer or a new user runs. `make demo` and `make test` set the machine up first:
# they need Python ≥ 3.11, a Rust toolchain and make, and fetch the rest.

PYTHON ?= python3
UV ?= $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
RUN = $(UV) run --frozen --no-sync
# One thread per process: several processes share the cores, and more threads fight for them.
export OMP_NUM_THREADS ?= 1
# torch looks up the name of each peer that connects: a silent name server must not stall that.
export RES_OPTIONS ?= timeout:1 attempts:1

.PHONY: help demo demo-server test test-slow test-upstream test-oldest check setup wheel docs format lint types bench bench-simulator bench-learning bench-links bench-server bench-server-learning digests clean

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

test-upstream: setup ## tests of PyTorch's torchft, out of its wheels, run here: an hour; writes docs/compatibility.md
	PYTHONPATH=tests $(RUN) python -m upstream.run $(ARGS)

test-oldest: setup ## the tests nearest to torch on the oldest supported one
	$(UV) venv --quiet --allow-existing .venv-oldest
	$(UV) pip install --quiet --python .venv-oldest "torch==2.7.0" numpy tqdm hypothesis psutil pytest pytest-timeout
	.venv-oldest/bin/python -m pytest -m "not slow" tests/integration/test_manager.py tests/integration/test_heals.py \
		tests/integration/test_wrappers.py tests/strategies tests/integration/test_process_group.py \
		tests/unit/test_ddp.py tests/unit/test_local_sgd.py tests/integration/test_checkpointing_http.py $(ARGS)

check: setup lint types docs test ## all that must pass before a change lands

# Says what it fetches and builds, and how long that takes; says nothing when all is there.
setup: $(UV)
	@$(UV) sync --frozen --check --quiet 2>/dev/null || { \
	if [ -d .venv ]; then echo "Setting up: what has changed since the last time (a Rust build takes about a minute on two cores)."; \
	else echo "Setting up, once: PyTorch and other packages are fetched (about 2 GB), then the Rust part is built: two to four minutes on two cores."; fi; \
	$(UV) sync --frozen && echo "Set up: everything is in .venv."; }

.uv/bin/uv:
	@echo "Setting up, once: uv, which fetches the rest, is installed into .uv (some seconds)."
	@$(PYTHON) -m venv .uv && .uv/bin/pip install --quiet --disable-pip-version-check uv

# Zig links against the C library of 2018, so that a wheel runs on any Linux since. Another machine:
# make wheel TARGET=aarch64-unknown-linux-gnu, after rustup target add aarch64-unknown-linux-gnu.
TARGET ?= $(shell rustc -vV | sed -n 's/^host: //p')
DIST ?= dist
wheel: $(UV) ## a wheel for any Linux, an sdist, and a list of what is in it (SBOM), in dist/
	$(UV) run --frozen --isolated --only-group wheel maturin build --release --zig \
		--compatibility manylinux_2_28 --target $(TARGET) --out $(DIST)
	$(UV) run --frozen --isolated --only-group wheel maturin sdist --out $(DIST)
	@$(PYTHON) -c "import glob, os, zipfile; w = zipfile.ZipFile(max(glob.glob('$(DIST)/*.whl'), key=os.path.getmtime)); \
	[open('$(DIST)/' + n.split('/')[-1], 'wb').write(w.read(n)) for n in w.namelist() if '/sboms/' in n]"
	@ls -l $(DIST)

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

docs: $(UV) ## the documents as a site, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(UV) run --frozen --isolated --only-group docs mkdocs build

digests: setup ## simulated and real nodes compute equal bits: a table
	$(RUN) python -m torchft.verify.digests $(ARGS)

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
	rm -rf .venv .venv-* .uv dist torchft/*.so .pytest_cache .mypy_cache .ruff_cache
