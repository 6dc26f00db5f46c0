"""Compare a quantized checkpoint with its float one: `pangu-quant compare` as a file that launchers can start."""

import sys

from ms_pangu_quant.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
