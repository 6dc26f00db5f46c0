"""Score a checkpoint: `pangu-quant evaluate` as a file, for launchers such as msrun that start Python files."""

import sys

from ms_pangu_quant.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
