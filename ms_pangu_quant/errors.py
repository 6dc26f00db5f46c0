"""The errors a user can cause, and can mend.

Each message says what is wrong, where, what was found, what was wanted and, where it helps, what to do. The command line
prints it as one line and exits with 2; anything that is not a PanguQuantError is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 400  # characters without a space that a message repeats


class PanguQuantError(Exception):
    """Something outside the program is wrong: a file, a setting, the disk, the machine. The message becomes one_line()."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(message: str) -> str:
    """One line that a terminal can show, whatever a file put into it: control characters are escaped, and what is longer
    than any path is cut in its middle."""
    line = "".join(each if each.isprintable() else repr(each)[1:-1] for each in " ".join(message.split()))
    return re.sub(rf"\S{{{_LONGEST},}}", lambda found: f"{found[0][:200]}...{found[0][-100:]}", line)


@contextmanager
def located(where: str, kind: type[PanguQuantError] | None = None) -> Iterator[None]:
    """An error from inside says `where` first, and is one of this kind."""
    try:
        yield
    except PanguQuantError as error:
        raise (kind or type(error))(f"{where}{error}") from None


class CheckpointError(PanguQuantError):
    """A checkpoint directory that cannot be used: damaged, inconsistent, of another architecture, or quantized already."""


class RecipeError(PanguQuantError):
    """A recipe that is malformed, or that asks for what the model or the runtime cannot do."""


class DataError(PanguQuantError):
    """Calibration or evaluation data that is malformed, empty, unsuitable or a benchmark in disguise."""


class OutputError(PanguQuantError):
    """An output directory that cannot be written, is in use, or belongs to another run."""


class BackendError(PanguQuantError):
    """This machine or this installation cannot run what was asked for."""


class EndpointError(PanguQuantError):
    """A server that is away, refuses, or answers what cannot be used. status: its HTTP status, where it refused."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class RankLostError(PanguQuantError):
    """Another process of the job has ended, so that this one cannot go on. Its own error says what to mend."""

    exit_code = 1


class RequestError(PanguQuantError):
    """An argument of a call or a command that makes no sense for this model."""
