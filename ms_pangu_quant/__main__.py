"""Where a process begins: `pangu-quant`, `python -m ms_pangu_quant` and the files in tools/.

Ctrl-C and SIGTERM are waited for by a thread and end the process at once. Python's own way, an exception in the main
thread, does not work here: MindSpore's libraries abort when their import is interrupted, and while they compile a graph
they swallow exceptions and turn Ctrl-C into SIGTERM. Nothing has to be unwound, since a file that is being written has a
temporary name. The signals must be blocked before NumPy starts its threads, so nothing heavy is imported above.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from ms_pangu_quant import installation
from ms_pangu_quant.job import ranks
from ms_pangu_quant.network import runtime

_STOPS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """Do one command, arguments as on the command line, and exit with its code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # threads and child processes inherit it
    threading.Thread(target=_wait, daemon=True).start()
    if os.environ.get(ranks.ROLE) == "MS_SCHED":
        runtime.schedule()
        sys.exit(0)
    try:
        from ms_pangu_quant.cli import main
    except ModuleNotFoundError as error:
        message = installation.missing_module(error)
        if message is None:
            raise
        print(f"pangu-quant: error: {message}", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(arguments))


def _wait() -> None:
    code, what = _STOPS[signal.Signals(signal.sigwait(_STOPS))]
    clear = "\x1b[?25h\r\x1b[K" if sys.stderr.isatty() else ""  # the cursor, which a progress bar hides
    os.write(2, f"{clear}pangu-quant: {what}\n".encode())  # a print could wait for a lock
    runtime.remove_logs()
    os._exit(code)


if __name__ == "__main__":
    run()
