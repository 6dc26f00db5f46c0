"""What can become of one sample, and what a program to be judged consists of."""

from __future__ import annotations

from dataclasses import dataclass

PASS, UNCLOSED = "pass", "unclosed_thought"
VERDICTS = (  # infra_error says nothing about the sample: it is retried, and never counted as a failure
    *(PASS, "wrong_answer", "exception", "syntax_error", "timeout", "out_of_memory", "output_limit", "crash", "early_exit"),
    *("no_code", UNCLOSED, "infra_error"),
)


@dataclass(frozen=True)
class Program:
    """A candidate and its test.

    source      what the candidate's process runs.
    preamble    trusted source the test stands on: imports, or the helpers a prompt defines.
    test        trusted source; passes if it ends without an exception.
    names       functions of the candidate that the test calls.
    in_process  the test needs the candidate's classes, so that it can only run in the candidate's own process.
    cpu_factor  how many times the usual limit of time it may take.
    """

    source: str
    preamble: str
    test: str
    names: tuple[str, ...]
    in_process: bool = False
    cpu_factor: int = 1


@dataclass(frozen=True)
class Outcome:
    """detail is one line of ASCII; oracle is "two_process" or, where the test ran beside the candidate, "in_process"."""

    verdict: str
    detail: str = ""
    oracle: str = "two_process"


@dataclass(frozen=True)
class Limits:
    """Of one candidate. cpu_seconds decides; wall_seconds is the time it may neither compute nor wait for a processor.

    memory is address space in bytes; file_bytes limits each file and what is printed; disk_bytes its private /tmp.
    processes counts threads too.
    """

    cpu_seconds: int = 15
    wall_seconds: float = 45.0
    memory: int = 2 << 30
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20
    processes: int = 64
    tester_cpu_seconds: int = 120
    tester_memory: int = 4 << 30


@dataclass(frozen=True)
class Isolation:
    """kind is "bubblewrap" or "rlimits"; description says in words what a program was kept from."""

    kind: str
    description: str
    uid: int | None = None
