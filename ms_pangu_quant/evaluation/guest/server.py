"""The server of one sandbox: forks a process for each job, so that none has to start an interpreter.

    server.py candidate|tester CONTROL_FD PACKAGES

PACKAGES is a JSON object, name of a module -> the folder it is in, of what may be imported beside the standard library.
A job arrives on the control socket as JSON, with the descriptor of the channel between the job's two processes. A candidate
job is answered with how its process ended, a tester job with the verdict. This process never runs a candidate's code; the
forked one gives up its rights and, where the job says so, gets PID, mount and IPC namespaces of its own first.
"""

import ctypes
import importlib
import importlib.machinery
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time

import candidate
import tester
import wire

_PRELOADED = (  # what programs import most, loaded once; random is seeded in every job
    *("bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "hashlib", "heapq", "itertools"),
    *("json", "math", "operator", "queue", "random", "re", "statistics", "string", "sys", "threading", "typing"),
)
_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS = 1, 4, 8
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWPID = 0x20000, 0x8000000, 0x10000000, 0x20000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE = 1, 2, 4, 0x4000, 0x40000
_CAP_DAC_READ_SEARCH = 2
_GRACE = 1.0
_STATUS = struct.Struct("<idq")  # wait status, CPU seconds, peak resident KiB


class _Packages:
    """Finds modules by name, and no others of the folders they are in."""

    def __init__(self, folders):
        self.folders = folders

    def find_spec(self, name, path=None, target=None):
        if path is None and name in self.folders:
            return importlib.machinery.PathFinder.find_spec(name, [self.folders[name]])
        return None


def main(role, control, packages):
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the command line blocks signals, and children inherit that
    sys.path.pop(0)  # this folder is not the candidate's
    sys.meta_path.append(_Packages(packages))
    for name in _PRELOADED:
        importlib.import_module(name)
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    serve = _serve_candidate if role == "candidate" else _serve_tester
    while (received := _receive_job(control)) is not None:
        serve(*received, control)


def _receive_job(control):
    """(job, channel) or None when the controller has gone."""
    link = socket.socket(fileno=os.dup(control))
    try:
        start, descriptors, _, _ = socket.recv_fds(link, 1, 1)
    finally:
        link.close()
    if not start:
        return None
    payload = wire.receive(control)
    return None if payload is None else (json.loads(payload), descriptors[0])


# --- the tester -----------------------------------------------------------------------------------------------------


def _serve_tester(job, channel, control):
    pid = os.fork()
    if pid == 0:
        _limit(resource.RLIMIT_CPU, job["tester_cpu_seconds"], job["tester_cpu_seconds"] + 1)
        _limit(resource.RLIMIT_AS, job["tester_memory"], job["tester_memory"])
        tester.child(job, channel, control)
    os.close(channel)
    _, status = os.waitpid(pid, 0)
    if status:
        detail = f"the test's own process ended with status {status}"
        wire.send(control, json.dumps({"verdict": "infra_error", "detail": detail}).encode())


# --- the candidate --------------------------------------------------------------------------------------------------


def _serve_candidate(job, channel, control):
    output = os.memfd_create("output")
    reading, writing = os.pipe()
    folder = "/tmp" if job["namespaces"] else tempfile.mkdtemp(prefix="candidate-")
    supervisor = os.fork()
    if supervisor == 0:
        try:
            os.close(control)
            os.close(reading)
            _supervise(job, channel, output, writing, folder)
        except BaseException as error:
            os.write(writing, f"sandbox: {type(error).__name__}: {error}".encode()[:400])
        finally:
            os._exit(1)
    os.close(channel)
    os.close(writing)
    ended = _watch(control, reading)
    _end_all(supervisor)
    ended["output_full"] = os.fstat(output).st_size >= job["file_bytes"]
    os.close(output)
    os.close(reading)
    if not job["namespaces"]:
        shutil.rmtree(folder, ignore_errors=True)
    if ended.pop("orphaned", False):
        sys.exit()
    wire.send(control, json.dumps(ended).encode())


def _watch(control, reading):
    """How the candidate's process ended, once the controller asks for it: "stop" kills it, "wait" gives it a second."""
    while True:
        order = wire.receive(control)
        if order == b"usage":
            wire.send(control, json.dumps({"usage": _usage()}).encode())
            continue
        patience = _GRACE if order == b"wait" else 0
        reported = select.select([reading], [], [], patience)[0]
        ended = _ended(os.read(reading, 4096)) if reported else {"how": "stopped"}
        return {**ended, "orphaned": order is None}


def _ended(report):
    if len(report) != _STATUS.size:
        return {"how": "lost", "detail": report.decode("ascii", "backslashreplace")}
    status, cpu, peak = _STATUS.unpack(report)
    if os.WIFSIGNALED(status):
        return {"how": "signal", "code": os.WTERMSIG(status), "cpu": cpu, "peak_kib": peak}
    return {"how": "exit", "code": os.WEXITSTATUS(status), "cpu": cpu, "peak_kib": peak}


def _supervise(job, channel, output, writing, folder):
    """Set up what the candidate may see, start it, and report how it ended. Does not return."""
    os.setsid()
    for descriptor, target in ((os.open("/dev/null", os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(descriptor, target)
    if job["namespaces"]:
        _enter_namespaces(job)
        pid = os.fork()  # the first process of the PID namespace; when it ends, the kernel kills the others
        if pid:
            os.close(channel)
            os.waitpid(pid, 0)
            os._exit(0)
    if job["uid"] is not None:
        os.chown(folder, job["uid"], job["uid"])
        _become(job["uid"], job["may_read_all"])
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.chdir(folder)
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        _run_candidate(job, channel)
    os.close(channel)
    while True:
        ended, status, used = os.wait3(0)
        if ended == pid:
            os.write(writing, _STATUS.pack(status, used.ru_utime + used.ru_stime, used.ru_maxrss))
            os._exit(0)


def _enter_namespaces(job):
    flags = _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWIPC
    user, group = os.getuid(), os.getgid()
    if job["uid"] is None:
        flags |= _CLONE_NEWUSER
    _call("unshare", flags)
    if job["uid"] is None:
        _LIBC.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # else the maps belong to root
        for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{file}", "w") as map_file:
                map_file.write(text)
        _LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    private = _MS_NOSUID | _MS_NODEV
    _call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    for folder in (b"/tmp", b"/dev/shm"):
        _call("mount", b"tmpfs", folder, b"tmpfs", private, b"mode=1777,nr_inodes=4096,size=%d" % job["disk_bytes"])
    _call("mount", b"tmpfs", b"/proc", b"tmpfs", private | _MS_RDONLY, None)


def _become(uid, may_read_all):
    """Give up root; may_read_all keeps the one right to read files, for an interpreter in root's own folder."""
    os.setgroups([])
    _LIBC.prctl(_PR_SET_KEEPCAPS, int(may_read_all), 0, 0, 0)
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    _set_capabilities(1 << _CAP_DAC_READ_SEARCH if may_read_all else 0)


def _run_candidate(job, channel):
    import random

    os.setsid()
    if not job["may_read_all"]:
        _set_capabilities(0)
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _limit(resource.RLIMIT_CPU, job["cpu_seconds"], job["cpu_seconds"] + 1)
    _limit(resource.RLIMIT_AS, job["memory"], job["memory"])
    _limit(resource.RLIMIT_FSIZE, job["file_bytes"], job["file_bytes"])
    _limit(resource.RLIMIT_NOFILE, 256, 256)
    _limit(resource.RLIMIT_CORE, 0, 0)
    if job["processes"]:
        _limit(resource.RLIMIT_NPROC, job["processes"], job["processes"])
    random.seed(0)
    candidate.serve(job["program"], channel)


def _set_capabilities(mask):
    header = struct.pack("<Ii", 0x20080522, 0)  # version 3 of the interface, this process
    _call("capset", header, struct.pack("<6I", mask, mask, 0, 0, 0, 0))


def _limit(which, soft, hard):
    _, most = resource.getrlimit(which)
    hard = hard if most == resource.RLIM_INFINITY else min(hard, most)
    resource.setrlimit(which, (min(soft, hard), hard))


def _call(name, *arguments):
    if getattr(_LIBC, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


# --- what is left over ----------------------------------------------------------------------------------------------


def _end_all(supervisor):
    """Kill the supervisor and whatever it has left behind, which becomes this process's child."""
    os.kill(supervisor, signal.SIGKILL)
    os.waitpid(supervisor, 0)
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            for orphan in _descendants(depth=1):
                os.kill(orphan, signal.SIGKILL)
            time.sleep(0.0005)


def _descendants(depth=None):
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parents[int(entry)] = int(file.read().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    found, layer = [], {os.getpid()}
    while layer and depth != len(found):
        layer = {pid for pid, parent in parents.items() if parent in layer}
        found.append(layer)
    return [pid for level in found for pid in level]


def _usage():
    """Of the job's living threads: the seconds all have computed, and the most that one computed or waited to compute."""
    computed, busiest = 0, 0
    for pid in _descendants():
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/schedstat") as file:
                    on_cpu, on_queue, _ = map(int, file.read().split())
                computed, busiest = computed + on_cpu, max(busiest, on_cpu + on_queue)
        except (OSError, ValueError):
            continue
    return {"computed": computed / 1e9, "busiest": busiest / 1e9}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
