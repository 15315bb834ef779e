#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the CUDA tests, then the benchmarks. Within ten minutes: each step has
# its own limit, and what a step has written by then stays.
#
#   bash benchmarks/gpu.sh [RESULTS]        # JSONs, a log and a summary; default: benchmarks/results/gpu
#
# PYTHON=python     the interpreter; if fairchem_dens is not installed there, this checkout is used
# WHEELS=.whl       a folder of wheels of what else is missing there, for machines without a network
# TRAJECTORIES=     a folder of .traj files for the loss curves; none are drawn without it
# STEPS="a b"       some of the steps only
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-.whl}
TRAJECTORIES=${TRAJECTORIES:-}
STEPS=${STEPS:-}
results=${1:-benchmarks/results/gpu}
mkdir -p "$results"
results=$(cd "$results" && pwd)

if ! (cd / && "$PYTHON" -c "import fairchem_dens.register") 2>/dev/null; then
  venv=$(mktemp -d)/venv
  "$PYTHON" -m venv --without-pip --system-site-packages "$venv" || exit 1
  site=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
  # A virtual environment of a virtual environment sees only the outermost packages: name them all.
  "$PYTHON" -c "import sys; print(*(p for p in sys.path if p.endswith('-packages')), sep='\n')" > "$site/outer.pth"
  printf '%s\n%s/startup\nimport fairchem_dens.compat\n' "$PWD" "$PWD" > "$site/zz_checkout.pth"
  if compgen -G "$WHEELS/*.whl" > /dev/null; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$site" "$WHEELS"/*.whl || exit 1
  fi
  PYTHON=$venv/bin/python
fi

rm -f "$results/failed"
step() {  # a name, seconds at most, and a command whose output is kept
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  if [[ -n $STEPS && " $STEPS " != *" $name "* ]]; then return; fi
  timeout --kill-after=10 "$limit" "$@" > "$results/$name.log" 2>&1 \
    || { echo "   $name failed or took $limit s, see $name.log"; tail -20 "$results/$name.log"; echo "$name" >> "$results/failed"; }
  echo "== $name: $((SECONDS - start)) s"
}

"$PYTHON" - > "$results/machine.json" <<'PY' || exit 1
import json, platform
import torch
assert torch.cuda.is_available(), "no CUDA device"
versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
print(json.dumps({"device": torch.cuda.get_device_name(), "versions": versions}, indent=2))
PY
cat "$results/machine.json"
capability=$("$PYTHON" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
# Compiling is what tests of kernels do most, and what benchmarks need first: both on several cores.
for precision in bfloat16 float16 tf32 float32; do
  step "compile_$precision" 150 "$PYTHON" -P tests/support/compile_kernels.py "$capability" "$precision" &
done
for tests in cuda kernels/test_edges.py kernels/test_nodes.py kernels/test_neighbours.py kernels/test_choice.py; do
  step "tests_$(basename "$tests" .py)" 160 \
    "$PYTHON" -P -m pytest -q -m cuda -p no:cacheprovider -rA "tests/$tests" &
done
wait
step kernels 80 "$PYTHON" -P benchmarks/kernels.py --precisions bf16 fp16 tf32 fp32 --errors \
  --rounds 7 --repeats 3 --out "$results/kernels.json"
step equiformer_v2 110 "$PYTHON" -P benchmarks/equiformer_v2.py --precisions bf16 fp16 tf32 fp32 \
  --rounds 5 --out "$results/equiformer_v2.json"
step largest_batch 50 "$PYTHON" -P benchmarks/largest_batch.py --precisions bf16 --gib 80 \
  --out "$results/largest_batch.json"
if [[ -n $TRAJECTORIES ]]; then
  step same_training 90 "$PYTHON" -P benchmarks/same_training.py "$TRAJECTORIES" --steps 200 --layers 4 --lmax 6 \
    --channels 128 --out "$results/same_training.json"
fi
step training_step 35 "$PYTHON" -P benchmarks/training_step.py --device cuda \
  --precisions bf16 --rounds 5 --out "$results/training_step.json"
step equiformer 50 "$PYTHON" -P benchmarks/equiformer.py --device cuda \
  --configs aspirin aspirin_baseline aspirin_l3 --out "$results/equiformer.json"
step reading 15 "$PYTHON" -P benchmarks/reading.py --out "$results/reading.json"
tail -n 15 "$results"/*.log
! [ -e "$results/failed" ]
