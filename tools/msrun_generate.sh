#!/usr/bin/env bash
# Generate text with a model that is cut over several processes (tensor parallel).
# Options before -- are the job's (--help lists them, configs/msrun/ has examples), those after it pangu-quant generate's. Example:
#   tools/msrun_generate.sh --workers 2 -- openPangu-7B-w8a8 --prompt "Write a sort in Python." --device ascend
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m ms_pangu_quant.job.msrun generate "$@"
