"""Find a recipe that meets a target: `pangu-quant tune` as a file, for launchers of Python files."""

import sys

from ms_pangu_quant.__main__ import run

if __name__ == "__main__":
    run(["tune", *sys.argv[1:]])
