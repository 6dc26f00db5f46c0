"""The frameworks are started before a test module imports them: they would write logs into the working directory."""

from ms_pangu_quant.network import runtime

runtime.start("cpu", "graph")

from tests.network.older_cpu import lend_kernels  # noqa: E402

lend_kernels()
