"""Calibration text by the model itself: `pangu-quant calibrate` as a file, for launchers that start Python files."""

import sys

from ms_pangu_quant.__main__ import run

if __name__ == "__main__":
    run(["calibrate", *sys.argv[1:]])
