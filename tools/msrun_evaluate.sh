#!/usr/bin/env bash
# HumanEval and MBPP on several processes: each answers its share of the problems; rank 0 scores them.
# Options before -- are the job's (--help lists them, configs/msrun/ has examples), those after it pangu-quant evaluate's. Example:
#   tools/msrun_evaluate.sh --workers 8 -- openPangu-7B-w8a8 --tasks humaneval --output results/w8a8 --device ascend
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m ms_pangu_quant.job.msrun evaluate "$@"
