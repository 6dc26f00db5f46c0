"""Starts a command of pangu-quant on several processes with MindSpore's msrun, shows what rank 0 says, and tells what
became of the others: `python -m ms_pangu_quant.job.msrun quantize --workers 8 -- CHECKPOINT --recipe w8a8 ...`.

msrun starts a process for each rank and one more, the scheduler, that lets them in. If a rank of this node ends badly msrun
ends the others; on other nodes ranks end because the connection is broken (job/ranks.py). Its own output and the ranks'
go to files. What is added here: the ranks' exit codes, which msrun keeps to itself, one message that says which rank was
first, a port that is free, an equal share of the CPUs for each rank, and that nothing is left behind.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from ms_pangu_quant.errors import PanguQuantError, RequestError
from ms_pangu_quant.job.arguments import Parser
from ms_pangu_quant.suggestion import did_you_mean_path

COMMANDS = ("quantize", "evaluate", "generate")
_CONTINUE = {
    "quantize": "Repeat it with --resume to go on where it stopped.",
    "evaluate": "Repeat it to go on where it stopped.",
    "generate": "",
}
_TOLD = re.compile(r"Worker process (\d+) exit with exception\. Error code: (-?\d+)")
_NOISE = re.compile(rb"\[(INFO|WARNING)\] [A-Z_]+\(\d+,[0-9a-f]+,")  # MindSpore's libraries, at any log level
_GRACE = 5.0  # seconds for msrun to end the ranks after one has failed; it would then wait minutes for its scheduler
_PORT = 8118  # msrun's own default


@dataclass(frozen=True)
class Job:
    """What msrun is told; the keys of configs/msrun/*.yaml and the options of the command line."""

    workers: int = field(default=2, metadata={"help": "ranks on all nodes together"})
    local_workers: int = field(default=0, metadata={"help": "ranks on this node; 0: all of them, on one node"})
    master_address: str = field(default="127.0.0.1", metadata={"help": "address or name of the first node"})
    master_port: int = field(default=0, metadata={"help": f"free port there; 0: any on one node, {_PORT} on several"})
    node_rank: int = field(default=0, metadata={"help": "number of this node, from 0, which is the first"})
    log_dir: str = field(default="", metadata={"help": "folder of the ranks' logs; else a temporary one, kept on failure"})
    timeout: int = field(default=600, metadata={"help": "seconds within which all ranks must have started"})
    threads: int = field(default=0, metadata={"help": "CPU threads of a rank; 0: this node's CPUs shared evenly"})
    rank_table: str = field(default="", metadata={"help": "rank table file of the Ascend cluster, for HCCL"})

    def __post_init__(self) -> None:
        """Raises RequestError for numbers that describe no job."""
        local = self.local_workers or self.workers
        if self.workers < 1 or not 1 <= local <= self.workers or self.workers % local:
            raise RequestError(
                f"msrun: got {self.workers} workers and {self.local_workers} on each node, wanted the same number on every "
                "node and at least one"
            )
        if not 0 <= self.node_rank < self.workers // local:
            raise RequestError(f"msrun: node_rank is {self.node_rank}, wanted 0 to {self.workers // local - 1}")
        if min(self.timeout, self.threads + 1, self.master_port + 1) < 1 or self.master_port > 65535:
            raise RequestError("msrun: timeout, threads and master_port: wanted a positive number, or 0 for the default")

    @property
    def local(self) -> int:
        return self.local_workers or self.workers

    @property
    def first_rank(self) -> int:
        """The first rank on this node."""
        return self.node_rank * self.local

    def log(self, folder: Path, rank: int) -> Path:
        return folder / f"worker_{rank}.log"


def main(arguments: Sequence[str] | None = None) -> int:
    """Raises SystemExit for --help and unknown options. Returns the exit code: 0, 2 for something the user can mend."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    try:
        command, job = _parse(arguments[:split])
        return run(job, command, ["-m", "ms_pangu_quant", command, *arguments[split + 1 :]])
    except PanguQuantError as error:
        print(f"msrun: error: {error}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str]) -> tuple[str, Job]:
    parser = Parser(
        prog="msrun",
        usage="%(prog)s COMMAND [options] -- arguments of pangu-quant COMMAND",
        description="Run a command of pangu-quant on several processes, on one node or many.",
        example="python -m ms_pangu_quant.job.msrun quantize --workers 2 -- \\\n    openPangu-Embedded-7B --recipe w8a8 "
        "--calibration chats.jsonl --output pangu-7b-w8a8",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("--config", type=Path, help="file of the options below, such as configs/msrun/two_nodes.yaml")
    for each in dataclasses.fields(Job):
        kind: Any = str if isinstance(each.default, str) else int
        parser.add_argument(f"--{each.name.replace('_', '-')}", type=kind, help=each.metadata["help"])
    given = vars(parser.parse_args(arguments))
    command, config = given.pop("command"), given.pop("config")
    options = {name: value for name, value in given.items() if value is not None}
    return command, Job(**{**(load_config(config) if config else {}), **options})


def load_config(path: Path) -> Mapping[str, Any]:
    """Raises RequestError naming file and key."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError(f"{path}: not readable as YAML: {error}{did_you_mean_path(path)}") from None
    kinds = {each.name: type(each.default) for each in dataclasses.fields(Job)}
    for key, value in raw.items() if isinstance(raw, dict) else [("", raw)]:
        if key not in kinds or type(value) is not kinds[key]:
            raise RequestError(
                f"{path}: {key}: {value!r}; wanted "
                + ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
            )
    return dict(raw)


def run(job: Job, command: str, program: Sequence[str]) -> int:
    """Run `python *program` on every rank of this node; command names it in messages. Returns an exit code."""
    scratch = Path(tempfile.mkdtemp(prefix="pangu-quant-msrun-"))
    logs = Path(job.log_dir) if job.log_dir else scratch
    temporary = scratch / "tmp"
    temporary.mkdir()
    try:
        logs.mkdir(parents=True, exist_ok=True)
        for rank in range(job.first_rank, job.first_rank + job.local):
            job.log(logs, rank).unlink(missing_ok=True)
        code = _Running(job, logs, temporary, program).wait()
    except OSError as error:
        raise RequestError(f"msrun: {error.filename or logs}: {error.strerror}; choose another --log-dir") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if code == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        return 0
    hint = _CONTINUE.get(command, "") if code != 2 else ""
    print(f"msrun: {command} did not finish. The logs are in {logs}. {hint}".rstrip(), file=sys.stderr)
    return code


class _Running:
    """One run of msrun, from start to end."""

    def __init__(self, job: Job, logs: Path, temporary: Path, program: Sequence[str]) -> None:
        self._job, self._logs = job, logs
        self._workers: dict[int, int] = {}  # rank -> process id
        self._stopped = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        with open(logs / "msrun.log", "wb") as output:
            self._msrun = subprocess.Popen(
                msrun_line(job, logs, program),
                env=environment(job, temporary),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> int:
        shown = _follow(self._job.log(self._logs, 0)) if self._job.node_rank == 0 else iter(int, 1)
        failed: tuple[int, int] | None = None
        deadline = float("inf")
        while self._msrun.poll() is None and time.monotonic() < deadline:
            next(shown)
            self._find_workers()
            failed = failed or self._first_failure()
            if failed or self._stopped:
                deadline = min(deadline, time.monotonic() + _GRACE)
            time.sleep(0.1 if len(self._workers) == self._job.local else 0.02)
        next(shown)
        self._kill_all()
        if self._stopped:
            return 128 + self._stopped
        if failed is None or failed[1] == -signal.SIGKILL:  # which may have been msrun's doing, after another's end
            failed = self._told_failure() or failed
        if failed:
            return self._explain(*failed)
        if self._msrun.returncode:
            print("msrun: a process ended before its work was done", file=sys.stderr)
            ranks = range(self._job.first_rank, self._job.first_rank + self._job.local)
            for path in (*(self._job.log(self._logs, rank) for rank in ranks), self._logs / "msrun.log"):
                _print_end(path)
        return 1 if self._msrun.returncode else 0

    def _stop(self, number: int, frame: object) -> None:
        self._stopped = number
        for process in self._workers.values():
            _signal_group(process, signal.SIGTERM)

    def _find_workers(self) -> None:
        if len(self._workers) == self._job.local:
            return
        with suppress(psutil.Error):
            for child in psutil.Process(self._msrun.pid).children():
                with suppress(psutil.Error, OSError, KeyError):  # it has ended, or has not begun
                    variables = child.environ()
                    if variables["MS_ROLE"] == "MS_WORKER":
                        self._workers[int(variables["RANK_ID"])] = child.pid

    def _first_failure(self) -> tuple[int, int] | None:
        """(rank, exit code) of a worker that has ended badly and that msrun has not waited for yet."""
        for rank, process in self._workers.items():
            status = _wait_status(process)
            if status:
                return rank, os.waitstatus_to_exitcode(status)
        return None

    def _told_failure(self) -> tuple[int, int] | None:
        """The same of one that msrun was quicker to wait for, which its log tells."""
        ranks = {process: rank for rank, process in self._workers.items()}
        told = _TOLD.findall((self._logs / "msrun.log").read_text(errors="replace"))
        return next(((ranks[int(process)], int(code)) for process, code in told if int(process) in ranks), None)

    def _explain(self, rank: int, code: int) -> int:
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        print(f"msrun: rank {rank} {how}; the other ranks were stopped", file=sys.stderr)
        if rank != 0 or self._job.node_rank:  # rank 0's log has been shown
            _print_end(self._job.log(self._logs, rank))
        return 2 if code == 2 else 1

    def _kill_all(self) -> None:
        for process in (*self._workers.values(), self._msrun.pid):  # each leads a group of its own
            _signal_group(process, signal.SIGKILL)
        self._msrun.wait()


def msrun_line(job: Job, logs: Path, program: Sequence[str]) -> list[str]:
    options = {
        "worker_num": job.workers,
        "local_worker_num": job.local,
        "master_addr": job.master_address,
        "master_port": _port(job),
        "node_rank": job.node_rank,
        "log_dir": logs,
        "cluster_time_out": job.timeout,
        "join": True,
        "tail_worker_log": job.workers,  # none: that is no rank's number
        **({"rank_table_file": job.rank_table} if job.rank_table else {}),
    }
    line = [sys.executable, "-m", "mindspore.parallel.cluster.run"]
    return [*line, *(f"--{name}={value}" for name, value in options.items()), "python", *program]


def environment(job: Job, temporary: Path) -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name != "LOCAL_DEFAULT_PATH"}
    cpus = len(os.sched_getaffinity(0))
    return {
        **variables,
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]),  # its "python"
        "OMP_NUM_THREADS": str(job.threads or max(1, cpus // job.local)),
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(temporary),
    }


def _port(job: Job) -> int:
    """Raises RequestError if the first node's port is in use."""
    if job.master_port == 0 and job.local < job.workers:
        job = dataclasses.replace(job, master_port=_PORT)
    if job.node_rank:
        return job.master_port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((job.master_address, job.master_port))
        except OSError as error:
            raise RequestError(
                f"msrun: {job.master_address}:{job.master_port}: {error.strerror}; the first node's address, and a free "
                "--master-port, are wanted"
            ) from None
        return int(probe.getsockname()[1])


def _follow(path: Path) -> Iterator[None]:
    """Each step prints what has been added to a log, in whole lines, without MindSpore's."""
    while not path.exists():
        yield
    with open(path, "rb") as log:
        rest = b""
        while True:
            *lines, rest = (rest + log.read()).split(b"\n")
            for line in lines:
                if not _NOISE.match(line):
                    sys.stdout.write(line.decode(errors="replace") + "\n")
            sys.stdout.flush()
            yield


def _print_end(path: Path, lines: int = 8) -> None:
    if not path.exists():
        return
    said = [line for line in path.read_bytes().splitlines() if line.strip() and not _NOISE.match(line)]
    for line in said[-lines:]:
        print(f"  {path.name}: {line.decode(errors='replace')}", file=sys.stderr)


def _wait_status(process: int) -> int | None:
    """The status with which a process has ended that its parent has not waited for yet."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[-1]) if fields[0] == "Z" else None


def _signal_group(leader: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


if __name__ == "__main__":
    sys.exit(main())
