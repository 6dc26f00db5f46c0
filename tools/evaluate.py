"""Score a checkpoint: `pangu-quant evaluate` as a file, for launchers such as msrun that start Python files."""

import sys

from ms_pangu_quant.__main__ import run

if __name__ == "__main__":
    run(["evaluate", *sys.argv[1:]])
