#!/usr/bin/env bash
# What docs/speed.md quotes of EquiformerV2 on a CPU: about twenty minutes of one core.
#
#   bash benchmarks/cpu.sh [RESULTS]        # JSONs, tables and figures; default: benchmarks/results
#
# PYTHON=.venv/bin/python     the interpreter, with fairchem_dens installed
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
results=${1:-benchmarks/results}
figures=$results/figures
[[ $results == benchmarks/results ]] && figures=docs/figures
mkdir -p "$results" "$figures"
export OMP_NUM_THREADS=1

measure() {  # a name, and what is varied
  local name=$1
  shift
  "$PYTHON" benchmarks/equiformer_v2.py --device cpu --structures 1 --warm-up 1 "$@" --out "$results/equiformer_v2_cpu$name.json"
}
plot() {  # a name, and the axis
  "$PYTHON" benchmarks/plot_equiformer_v2.py "$results/equiformer_v2_cpu_$1.json" --along "$1" --out "$figures/speed_$1.svg"
}
measure "" --layers 2 --natoms 132 --rounds 5 --errors --recompute activations none layers
measure _small --layers 2 --natoms 8 20 60 --modes inference training --rounds 5 --recompute activations none
measure _natoms --layers 1 --natoms 20 40 80 160 --rounds 3
measure _neighbors --layers 1 --natoms 60 --neighbors 5 10 20 40 --rounds 3
measure _lmax --layers 1 --natoms 60 --lmax 2 4 6 --rounds 3
measure _layers --layers 1 2 4 --natoms 20 --rounds 3
measure _precision --layers 1 --natoms 20 --precisions fp32 bf16 --rounds 3 --errors
for axis in natoms neighbors lmax layers; do plot "$axis"; done
