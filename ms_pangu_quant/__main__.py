"""python -m ms_pangu_quant is the command pangu-quant."""

import sys

from ms_pangu_quant.cli import main

sys.exit(main())
