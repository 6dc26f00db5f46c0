"""Compare a quantized checkpoint with its float one: `pangu-quant compare` as a file that launchers can start."""

import sys

from ms_pangu_quant.__main__ import run

if __name__ == "__main__":
    run(["compare", *sys.argv[1:]])
