"""Builds the C++ kernels with this machine's compiler, once, and loads them.

The library lies in the user's cache under a name made of a hash of its sources, its flags and the compiler, so a new
version of any of them is a new file. It is compiled in a temporary folder beside it and renamed when it is whole, by one
process at a time. All instruction sets are in one library; the one that is used is chosen when it is loaded.

Environment:
  MS_PANGU_QUANT_KERNELS  auto (default): the best path of this CPU; vnni, avx2, portable: that one; off: plain operators.
  MS_PANGU_QUANT_CACHE    folder of the library; default $XDG_CACHE_HOME/ms_pangu_quant or ~/.cache/ms_pangu_quant.
  CXX                     compiler; default the first of c++, g++, clang++ that exists.
  OMP_NUM_THREADS         threads; default as many as CPUs this process may use.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT

from ms_pangu_quant.errors import BackendError

PATHS = ("portable", "avx2", "vnni")  # in the order of the library's numbers
SETTING, CACHE = "MS_PANGU_QUANT_KERNELS", "MS_PANGU_QUANT_CACHE"
_SOURCES = Path(__file__).parent
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wno-psabi")
# Linear layers, the Hadamard matrix and GPTQ promise the exact bits of the operations as written; the others may use fused
# multiply-add.
_UNITS = {
    "parallel.cc": (),
    "linear.cc": ("-ffp-contract=off",),
    "hadamard.cc": ("-ffp-contract=off",),
    "layer.cc": ("-ffp-contract=fast",),
    "matrix.cc": ("-ffp-contract=fast",),
    "bfloat16.cc": (),
    "gptq.cc": ("-ffp-contract=off", "-fno-math-errno"),
    "scale.cc": ("-ffp-contract=off",),
    "mean.cc": ("-ffp-contract=off", "-fno-math-errno"),
    "limits.cc": (),
    "block.cc": (),
}
_TIMEOUT = 600  # seconds for all sources together
_INTEGER, _POINTER = ctypes.c_int64, ctypes.c_void_p
_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "pangu_pack_w8": (_POINTER, _INTEGER, _INTEGER),
    "pangu_pack_w4": (_POINTER, _INTEGER, _INTEGER, _INTEGER),
    "pangu_pack_scale": (_POINTER, _INTEGER, _INTEGER),
    "pangu_pack_f32": (_POINTER, _INTEGER, _INTEGER),
    "pangu_transpose_w4": (_POINTER, _POINTER, _INTEGER, _INTEGER),
    "pangu_best_scale": (*[_POINTER] * 3, *[_INTEGER] * 6, _POINTER),
    "pangu_power_means": (*[_POINTER] * 3, *[_INTEGER] * 5, *[_POINTER] * 2),
    "pangu_gptq_block": (*[_POINTER] * 5, *[_INTEGER] * 4, _POINTER, _POINTER),
}
_OF_BFLOAT16: dict[str, tuple[type, ...]] = {  # not on every machine
    "pangu_pack_bfloat16": (_POINTER, _INTEGER, _INTEGER),
    "pangu_bfloat16_columns": (_POINTER, *[_INTEGER] * 6, _POINTER),
    "pangu_bfloat16_product": (_POINTER, *[_INTEGER] * 4, _POINTER, *[_INTEGER] * 3, _POINTER, *[_INTEGER] * 3),
}


class BuildError(Exception):
    """There is no compiler, or it failed; the message says which and what it printed."""


@dataclass(frozen=True)
class Library:
    """file: the shared object; functions: its C interface; best: the fastest path this CPU has."""

    file: Path
    functions: ctypes.CDLL
    best: str

    @property
    def path(self) -> str:
        """The path in use."""
        return PATHS[self.functions.pangu_isa()]

    @property
    def bfloat16(self) -> bool:
        """Whether products of bfloat16 are faster here than those of float32."""
        return bool(self.functions.pangu_bfloat16())

    @property
    def threads(self) -> int:
        return int(self.functions.pangu_threads(0))


_built: Library | None = None
_failure: str | None = None


def library() -> Library | None:
    """The loaded library with the path that SETTING asks for; None for plain operators.

    Where it cannot be built, says so on the standard error, once, and returns None. Raises BackendError for a setting that
    does not exist or that this CPU cannot run.
    """
    global _built, _failure
    wanted = os.environ.get(SETTING, "auto")
    if wanted not in ("auto", "off", *PATHS):
        raise BackendError(f"{SETTING}: got {wanted!r}, wanted auto, off, {', '.join(PATHS)}")
    if wanted == "off":
        return None
    if _built is None and _failure is None:
        try:
            _built = _load(build())
        except BuildError as error:
            _failure = str(error)
            print(
                f"pangu-quant: the CPU kernels cannot be built, so plain MindSpore operators are used, which are several "
                f"times slower. {_failure}",
                file=sys.stderr,
            )
    if _built is None:
        return None
    if wanted != "auto" and PATHS.index(wanted) > PATHS.index(_built.best):
        raise BackendError(f"{SETTING}: this CPU has no {wanted}; its best path is {_built.best}")
    _built.functions.pangu_select(-1 if wanted == "auto" else PATHS.index(wanted))
    return _built


def kernels() -> Library:
    """The library, which was there when the backend was chosen."""
    found = library()
    if found is None:
        raise BackendError("the CPU kernels were switched off after the network's backend had been chosen")
    return found


def failure() -> str | None:
    """Why library() could not build, if it tried."""
    return _failure


def compiler() -> str | None:
    """Path of the C++ compiler, or None."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def compiler_version(command: str) -> str:
    """First line of what the compiler says about itself. Raises BuildError if it cannot be run."""
    try:
        done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command} --version: {error}") from None
    return done.stdout.splitlines()[0].strip() if done.stdout else ""


def cache_folder() -> Path:
    if os.environ.get("MS_PANGU_QUANT_CACHE"):
        return Path(os.environ["MS_PANGU_QUANT_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "ms_pangu_quant"


def build() -> Path:
    """The library's file, compiled if the cache does not have it. Raises BuildError."""
    folder = cache_folder()
    stem = f"kernels-{platform.machine()}-{_source_hash()}"
    command = compiler()
    if command is None:
        for file in sorted(folder.glob(f"{stem}-*.so")):  # another compiler's result is as good
            return file
        wanted = os.environ.get("CXX") or "c++, g++ or clang++"
        raise BuildError(f"No C++ compiler: {wanted} is not on the PATH.")
    version = compiler_version(command)
    file = folder / f"{stem}-{hashlib.sha256(f'{command} {version}'.encode()).hexdigest()[:12]}.so"
    if not file.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                if not file.exists():
                    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
                        os.replace(_compile(command, Path(scratch)), file)
        except OSError as error:
            raise BuildError(f"{folder}: {error.strerror or error}; set {CACHE} to another folder.") from None
    return file


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process of a machine compiles while the others, the ranks of a job, wait for its result."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks: each compiles for itself
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _compile(command: str, scratch: Path) -> Path:
    print("pangu-quant: building the CPU kernels (once, about 20 s)", file=sys.stderr)
    objects = {unit: str(scratch / f"{unit}.o") for unit in _UNITS}
    _run([command, *_FLAGS, *flags, "-c", str(_SOURCES / unit), "-o", objects[unit]] for unit, flags in _UNITS.items())
    out = scratch / "kernels.so"
    _run([[command, "-shared", "-pthread", *objects.values(), "-o", str(out)]])
    return out


def _run(lines: Iterable[list[str]]) -> None:
    """Runs all at once and waits for every one, also where one fails: the folder that the others write to goes then."""
    deadline = time.monotonic() + _TIMEOUT
    with ExitStack() as running:  # leaving it waits for those that nothing else has waited for
        started = [
            (line, running.enter_context(subprocess.Popen(line, stdout=PIPE, stderr=STDOUT, text=True))) for line in lines
        ]
        faults = [fault for line, process in started if (fault := _fault(line, process, deadline))]
    if faults:
        raise BuildError(faults[0])


def _fault(line: list[str], process: subprocess.Popen[str], deadline: float) -> str | None:
    """Waits for a compiler; what became of it, None if all is well."""
    try:
        output, _ = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"{' '.join(line)} did not end within {_TIMEOUT} s."
    if process.returncode:
        return f"{' '.join(line)} failed with exit code {process.returncode}:\n{output.strip()}"
    return None


def _load(file: Path) -> Library:
    try:
        functions = ctypes.CDLL(str(file))
    except OSError as error:
        raise BuildError(f"{file}: {error}; delete the file to have it built again.") from None
    for name, arguments in (_ARGUMENTS | _OF_BFLOAT16).items():
        if name in _ARGUMENTS or hasattr(functions, name):
            function = getattr(functions, name)
            function.argtypes, function.restype = arguments, None
    functions.pangu_peak.argtypes, functions.pangu_peak.restype = (ctypes.c_int,), ctypes.c_double
    functions.pangu_bandwidth.argtypes, functions.pangu_bandwidth.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_double
    functions.pangu_threads(_threads())
    return Library(file, functions, PATHS[functions.pangu_best_isa()])


def _threads() -> int:
    """As the user asked; 0: one for each CPU. MindSpore sets OMP_NUM_THREADS to 1 in C; os.environ does not see it."""
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(text) if text.isdecimal() else 0


def _source_hash() -> str:
    digest = hashlib.sha256(repr((_FLAGS, _UNITS)).encode())
    for file in sorted(_SOURCES.iterdir()):
        if file.suffix in (".cc", ".h"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
