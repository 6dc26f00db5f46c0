"""Generate text: `pangu-quant generate` as a file, for launchers such as msrun that start Python files."""

import sys

from ms_pangu_quant.__main__ import run

if __name__ == "__main__":
    run(["generate", *sys.argv[1:]])
