"""msrun.py: options and configs; and real jobs of processes that do not need MindSpore, which msrun starts all the same."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.job import msrun
from ms_pangu_quant.job.msrun import Job

SHIPPED = ("two_workers", "one_node", "two_nodes")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_configs_are_jobs(root, name):
    folder = root / "configs" / "msrun"
    assert sorted(path.stem for path in folder.glob("*.yaml")) == sorted(SHIPPED)
    job = Job(**msrun.load_config(folder / f"{name}.yaml"))
    assert (job.workers, job.local) == {"two_workers": (2, 2), "one_node": (8, 8), "two_nodes": (16, 8)}[name]


def test_options_go_before_those_of_the_config(root):
    config = str(root / "configs" / "msrun" / "two_nodes.yaml")
    command, job = msrun._parse(["quantize", "--config", config, "--node-rank", "1", "--master-address", "10.0.0.5"])
    assert command == "quantize"
    assert (job.node_rank, job.master_address, job.workers, job.first_rank) == (1, "10.0.0.5", 16, 8)
    line = msrun.msrun_line(job, root, ["-m", "ms_pangu_quant", "quantize", "--resume"])
    assert {"--worker_num=16", "--local_worker_num=8", "--node_rank=1", "--master_addr=10.0.0.5"} <= set(line)
    assert line[-5:] == ["python", "-m", "ms_pangu_quant", "quantize", "--resume"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"workers": 0}, "got 0 workers"),
        ({"workers": 3, "local_workers": 2}, "same number on every node"),
        ({"workers": 2, "local_workers": 4}, "got 2 workers and 4"),
        ({"workers": 2, "node_rank": 1}, "node_rank is 1, wanted 0 to 0"),
        ({"timeout": 0}, "timeout"),
        ({"master_port": 70000}, "master_port"),
    ],
)
def test_numbers_that_describe_no_job_are_refused(settings, said):
    with pytest.raises(RequestError, match=said):
        Job(**settings)


@pytest.mark.parametrize("text", ["worker: 2", "workers: two", "workers: true", "- 2", "{"])
def test_a_config_with_anything_unknown_is_refused_with_its_name(text, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=r"job\.yaml: "):
        msrun.load_config(path)


def test_a_port_in_use_is_an_error_at_once(tmp_path, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert msrun.main(["generate", "--workers", "2", "--master-port", str(port), "--", "x"]) == 2
    assert f"127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


def test_the_cpus_are_shared_and_the_frameworks_log_folder_is_not(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCAL_DEFAULT_PATH", "/somewhere")
    cpus = len(os.sched_getaffinity(0))
    variables = msrun.environment(Job(workers=2), tmp_path)
    assert variables["OMP_NUM_THREADS"] == str(max(1, cpus // 2))
    assert "LOCAL_DEFAULT_PATH" not in variables
    assert msrun.environment(Job(workers=64), tmp_path)["OMP_NUM_THREADS"] == "1" or cpus >= 128
    assert msrun.environment(Job(workers=2, threads=3), tmp_path)["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("command", msrun.COMMANDS)
def test_each_script_has_help_that_names_the_options(root, command):
    script = root / "tools" / f"msrun_{command}.sh"
    done = subprocess.run([script, "--help"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0
    for option in ("--config", "--workers", "--local-workers", "--master-address", "--node-rank", "--log-dir", "-- arg"):
        assert option in done.stdout


PROGRAM = """
import os, signal, sys, time
rank = os.environ["RANK_ID"] if os.environ["MS_ROLE"] == "MS_WORKER" else "scheduler"
print("[INFO] DISTRIBUTED(1,7f,python):noise", flush=True)
print("hello from", rank, flush=True)
if rank == "0":
    open(__file__ + ".greeted", "w").close()
while not os.path.exists(__file__ + ".greeted"):
    time.sleep(0.01)
if rank == "1":
    {}
if "{}":
    time.sleep(3600 if rank != "scheduler" else 0)  # a job that waits for it does not end
"""
ENDS = {
    "well": ("pass", "", 0, []),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "wait", 1, ["rank 1 was killed (SIGKILL)", "hello from 1"]),
    "with an error": ("sys.exit('what is wrong')", "wait", 1, ["rank 1 ended with exit code 1", "what is wrong"]),
    "with the user's error": ("print('mend this'); sys.exit(2)", "wait", 2, ["rank 1 ended with exit code 2", "mend this"]),
}


# A job is seconds of CPU time, most of it for msrun to import MindSpore.
@pytest.mark.parametrize("end", [end if end == "killed" else pytest.param(end, marks=pytest.mark.slow) for end in ENDS])
def test_a_job_ends_as_its_ranks_do_and_says_which_was_first(end, tmp_path, capsys):
    does, waits, code, said = ENDS[end]
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(does, waits))
    assert msrun.run(Job(workers=2, log_dir=str(tmp_path / "logs")), "quantize", [str(script)]) == code
    shown = capsys.readouterr()
    assert shown.out == "hello from 0\n"
    assert all(text in shown.err for text in said)
    assert ("did not finish" in shown.err) == (code != 0)
    assert ("--resume" in shown.err) == (code == 1)
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {
        "msrun.log",
        "scheduler.log",
        "worker_0.log",
        "worker_1.log",
    }


@pytest.mark.slow
def test_a_rank_that_msrun_waited_for_first_is_named_all_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(msrun, "_wait_status", lambda process: None)
    test_a_job_ends_as_its_ranks_do_and_says_which_was_first("killed", tmp_path, capsys)


def test_msruns_log_tells_which_rank_ended_and_how(tmp_path):
    (tmp_path / "msrun.log").write_text(
        "[ERROR] ME(7:1,MainProcess):2026 [_api.py:364] Worker process 41 exit with exception. Error code: -9.\n"
        "[ERROR] ME(7:1,MainProcess):2026 [_api.py:364] Worker process 40 exit with exception. Error code: 1.\n"
    )
    running = object.__new__(msrun._Running)
    running._logs, running._workers = tmp_path, {0: 40, 1: 41}
    assert running._told_failure() == (1, -9)
    running._workers = {0: 50}
    assert running._told_failure() is None


@pytest.mark.slow
def test_a_job_that_is_stopped_takes_all_its_processes_with_it(root, tmp_path):
    script, scratch = tmp_path / "program.py", tmp_path / "scratch"
    script.write_text(PROGRAM.format("pass", "wait") + "print('slept', flush=True)\n")
    scratch.mkdir()
    code = (
        "import sys; from ms_pangu_quant.job import msrun; "
        f"sys.exit(msrun.run(msrun.Job(workers=2), 'evaluate', [{str(script)!r}]))"
    )
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "hello from 0\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=500) == 128 + signal.SIGTERM
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(script) not in running
    assert {path.name for path in tmp_path.iterdir()} - {"program.py.greeted"} == {"program.py", "scratch"}
