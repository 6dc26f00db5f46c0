"""An unmodified vLLM on the CPU, in the environment that `make served` makes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

PYTHON = ROOT / ".venv-served" / "bin" / "python"
SECONDS = 600  # until a server answers


class ServerFailed(Exception):
    """With the end of its log."""


@dataclass(frozen=True)
class Server:
    address: str

    def __call__(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Its JSON."""
        data = None if body is None else json.dumps({"model": "m", **body}).encode()
        request = urllib.request.Request(self.address + path, data=data, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:
            content = reply.read()
        return json.loads(content) if content else None


def command(*arguments: object) -> None:
    done = subprocess.run([sys.executable, "-m", "ms_pangu_quant", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@contextmanager
def serving(directory: Path, *options: str) -> Iterator[Server]:
    """While it runs on the directory alone; its log stands beside that."""
    if not PYTHON.exists():
        pytest.skip("no .venv-served: make served makes it")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    served = ["--model", str(directory), "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port)]
    log = directory.with_name(f"{directory.name}.log")
    with open(log, "w") as said:
        process = subprocess.Popen(
            [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", *served, "--enforce-eager", *options],
            env={**os.environ, **settings},
            stdout=said,
            stderr=said,
            cwd=directory.parent,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}")
    try:
        until = time.monotonic() + SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > until:
                raise ServerFailed(log.read_text()[-6000:])
            try:
                server("/health")
                break
            except OSError:
                time.sleep(1)
        yield server
    finally:
        for sent in (signal.SIGTERM, signal.SIGKILL):  # to its workers too
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sent)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
