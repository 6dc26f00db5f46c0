"""pangu-quant doctor"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.table import Table

from ms_pangu_quant.backends.cpu_kernels import library as kernels
from ms_pangu_quant.cli.console import AsJson, out, size

_PACKAGES = ("ms_pangu_quant", "mindspore", "mindformers", "numpy", "safetensors", "datasets", "sentencepiece")
_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "asimd", "asimddp", "i8mm")
_COSTS = {
    "portable": "no AVX2: int8 products run several times slower than the float32 ones could",
    "avx2": "no AVX512-VNNI: int8 products run about 4 times slower than with it",
}
_ASCEND = "import mindspore as ms; ms.set_device('Ascend'); ms.Tensor(1.0) + 1.0; print('available')"


def doctor_command(as_json: AsJson = False) -> None:
    """Show what this machine runs on, and what each missing piece costs.

    Example:
        pangu-quant doctor
    """
    found = diagnosis()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, value in found.items():
        if key != "missing":
            table.add_row(key.replace("_", " "), _text(value))
    out.print(table)
    for line in found["missing"]:
        out.print(f"- {line}", soft_wrap=True)
    if not found["missing"]:
        out.print("Nothing is missing.")


def diagnosis() -> dict[str, Any]:
    """What `doctor --json` prints. Memory in bytes; "missing" lists what is not there with what that costs."""
    import psutil

    memory = psutil.virtual_memory()
    missing: list[str] = []
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name, missing) for name in _PACKAGES},
        "cpu": _cpu_name(),
        "cpu_features": _cpu_features(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": {"total": memory.total, "available": memory.available},
        **_kernels(missing),
        "devices": {"cpu": "available", "ascend": _ascend(missing)},
        "environment": {key: value for key, value in os.environ.items() if key.startswith("MS_PANGU_QUANT_")},
    }
    return {**found, "missing": missing}


def _kernels(missing: list[str]) -> dict[str, Any]:
    command = kernels.compiler()
    built = kernels.library()
    named = None
    if command is not None:
        try:
            named = f"{command} ({kernels.compiler_version(command)})"
        except kernels.BuildError as error:
            named = f"{command} (cannot be run: {error})"
    else:
        missing.append("C++ compiler: the CPU kernels cannot be built here; an install of g++ gives them")
    if built is None:
        reason = f"switched off by {kernels.SETTING}" if kernels.failure() is None else kernels.failure()
        missing.append(f"CPU kernels: plain MindSpore operators are used, several times slower ({reason})")
    elif built.path in _COSTS:
        missing.append(f"CPU kernels: the {built.path} path is used; {_COSTS[built.path]}")
    return {
        "compiler": named,
        "kernels": None
        if built is None
        else {"path": built.path, "best": built.best, "threads": built.threads, "file": str(built.file)},
    }


def _version(name: str, missing: list[str]) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        missing.append(f"{name}: not installed; pip install ms_pangu_quant brings it")
        return None


def _ascend(missing: list[str]) -> str:
    """Asked in another process: a process keeps its first device."""
    try:
        done = subprocess.run([sys.executable, "-c", _ASCEND], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        missing.append("Ascend NPU: did not answer within two minutes")
        return "no answer"
    if done.returncode == 0 and done.stdout.strip().endswith("available"):
        return "available"
    lines = [line.strip() for line in done.stderr.splitlines() if "Error" in line]
    reason = lines[-1] if lines else f"exit code {done.returncode}"
    missing.append("Ascend NPU: everything runs on the CPU, and what is measured here is not the speed of an Atlas A2")
    return f"not available: {reason}"


def _cpu_name() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpu_features() -> list[str]:
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            flags = set(line.split(":", 1)[1].split())
            return [feature for feature in _FEATURES if feature in flags]
    return []


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return stream.read().splitlines()
    except OSError:
        return []


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{key} {size(part) if isinstance(part, int) and part > 2**20 else part}" for key, part in value.items()
        )
    return ", ".join(value) if isinstance(value, list) else str(value)
