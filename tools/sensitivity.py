"""Rank layers by what they cost when quantized: `pangu-quant sensitivity` as a file, for launchers of Python files."""

import sys

from ms_pangu_quant.__main__ import run

if __name__ == "__main__":
    run(["sensitivity", *sys.argv[1:]])
