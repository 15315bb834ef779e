#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the CUDA tests, then the benchmarks.
#
#   bash benchmarks/gpu.sh [RESULTS]        # JSONs, a log and a summary; default: benchmarks/results/gpu
#
# PYTHON=python   the interpreter; if fairchem_dens is not installed there, this checkout is used
# WHEELS=.whl     a folder of wheels of what else is missing there, for machines without a network
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-.whl}
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

failed=0
step() {  # a name, and a command whose output is kept
  local name=$1
  shift
  echo "== $name"
  "$@" > "$results/$name.log" 2>&1 || { echo "   failed, see $name.log"; tail -20 "$results/$name.log"; failed=1; }
}

"$PYTHON" - > "$results/machine.json" <<'PY' || exit 1
import json, platform
import torch
assert torch.cuda.is_available(), "no CUDA device"
versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
print(json.dumps({"device": torch.cuda.get_device_name(), "versions": versions}, indent=2))
PY
cat "$results/machine.json"
step cuda_tests "$PYTHON" -P -m pytest -q -m cuda -p no:cacheprovider -rA tests/cuda
step training_step "$PYTHON" -P benchmarks/training_step.py --device cuda \
  --precisions fp32 tf32 fp16 bf16 --out "$results/training_step.json"
step equiformer "$PYTHON" -P benchmarks/equiformer.py --device cuda --configs aspirin aspirin_baseline aspirin_l3 \
  --out "$results/equiformer.json"
step reading "$PYTHON" -P benchmarks/reading.py --out "$results/reading.json"
tail -n 15 "$results"/*.log
exit $failed
