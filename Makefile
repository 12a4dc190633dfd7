# Thin: each target is a line or two over `python -m ...`. Variables that are
# meant to be set: PYTHON (any Python >= 3.12), EXTRAS (of setup.cfg, such as
# dev,cuda13), TESTS (paths), SUITE (of bench: cpu, length, paper, gpu), ARGS
# (more flags of the program).

VENV := .venv
CONSTRAINTS := constraints.txt
EXTRAS := dev
TESTS :=
SUITE := cpu
ARGS :=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRAS)
AOT := $(VENV)/aot

# pyenv's own copies come last: its shims refuse versions that are not selected.
PYTHONS = $(PYTHON) python3.12 python3.13 python3.14 python3 python \
  $(wildcard $(shell pyenv root 2>/dev/null)/versions/3.1[2-9]*/bin/python3)
IS_USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))

# Huge pages for large allocations: a training step on two cores takes about a
# fifth less time, which would go into page faults. `make ... GLIBC_TUNABLES=`
# does without.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

.PHONY: help setup setup_aot train train_long test drill lint format bench \
  bench_training reproducibility kernel_report figures doctor clean

help:  ## list the targets
	@sed -n 's/^\([a-z_]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: $(STAMP)  ## install everything into .venv

setup_aot: $(AOT)/.installed  ## what compiles for devices that are not there

train: setup  ## train a small DeltaNet on this machine; re-run to resume
	$(BIN)/python -m experiments.train_lm --config=laptop \
	  --workdir=runs/laptop $(ARGS)

train_long: setup  ## a larger one over byte pairs, an hour on two cores
	test -e runs/laptop_tokenizer.json || $(BIN)/python -m \
	  experiments.train_tokenizer --vocab_size=4096 \
	  --output=runs/laptop_tokenizer.json
	$(BIN)/python -m experiments.train_lm --config=laptop_long \
	  --workdir=runs/laptop_long $(ARGS)

test: setup  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	  $(TESTS) $(ARGS)

drill: setup  ## run the minutes-long tests: kills and restarts
	RECORD_DRILLS=1 $(BIN)/python -m pytest -m drill $(TESTS) $(ARGS)

lint: setup  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## sort imports and format
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

bench: setup  ## time the implementations of every op
	$(BIN)/python -m experiments.benchmark_kernels --suite=$(SUITE) \
	  --output=results/kernels_$(SUITE).jsonl $(ARGS)

bench_training: setup  ## time training: the paper's 1.3B models, on a GPU
	$(BIN)/python -m experiments.benchmark_training --suite=throughput \
	  --output=results/throughput.jsonl $(ARGS)

reproducibility: setup  ## say whether training repeats itself bit for bit
	$(BIN)/python -m experiments.check_reproducibility \
	  --output=results/reproducibility.jsonl $(ARGS)

kernel_report: setup setup_aot  ## what the GPU kernels take of a GPU
	$(BIN)/python -m experiments.kernel_report --target=h200 $(ARGS)

figures: setup  ## draw the figures of results/
	$(BIN)/python -m experiments.plot_results $(ARGS)

doctor: setup  ## say which implementation of every op runs here, and why
	$(BIN)/python -m experiments.doctor

clean:  ## remove caches and build output; runs and environments stay
	rm -rf build *.egg-info .pytest_cache .ruff_cache
	find pallas_kernels deltanet_jax experiments tests -name __pycache__ \
	  -prune -exec rm -rf {} +

# The stamp is written last, so that an interrupted set-up is done again.
$(STAMP): setup.cfg pyproject.toml $(CONSTRAINTS)
	@$(BIN)/python -c '$(IS_USABLE)' 2>/dev/null \
	  && $(BIN)/python -m pip --version >/dev/null 2>&1 && exit 0; \
	for python in $(PYTHONS); do \
	  if "$$python" -c '$(IS_USABLE)' 2>/dev/null; then \
	    exec "$$python" -m venv --clear $(VENV); \
	  fi; \
	done; \
	echo 'error: no Python 3.12 or newer with the venv module was found;' \
	  'install one (apt install python3.12-venv, pyenv install 3.12, or' \
	  'https://www.python.org/downloads), or name it:' \
	  'make setup PYTHON=/path/to/python3.12' >&2; exit 1
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	@touch $@

# In a folder of its own: with the CUDA plugin in the environment, all starts of
# JAX on a machine without a GPU would complain.
$(AOT)/.installed: $(CONSTRAINTS) | setup
	rm -rf $(AOT)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --target $(AOT) $$(grep -E '^(jax-cuda13|nvidia|libtpu)[-=]' \
	  $(CONSTRAINTS))
	@touch $@
