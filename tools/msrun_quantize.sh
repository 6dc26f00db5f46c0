#!/usr/bin/env bash
# Quantize on several processes: each sees its share of the calibration data and rounds some layers of each block.
# Options before -- are the job's (--help lists them, configs/msrun/ has examples), those after it pangu-quant quantize's. Example:
#   tools/msrun_quantize.sh --workers 2 -- openPangu-7B --recipe w8a8 --calibration chats.jsonl --output openPangu-7B-w8a8
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m ms_pangu_quant.job.msrun quantize "$@"
