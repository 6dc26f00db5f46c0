"""docs/extend.md is executed: its files, its edits, its tests and its commands, all in one copy of the package."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from markdown_it import MarkdownIt
from safetensors.numpy import load_file

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.block import Block
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.evaluation.tasks import Task
from ms_pangu_quant.formats.reader import Format

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/extend.md").read_text(encoding="utf-8")
SECTIONS = ("An algorithm", "A scheme", "An architecture", "A format", "A task")
MINI = "ms_pangu_quant/assets/openpangu-mini"
VALIDATION = "ms_pangu_quant/assets/validation.jsonl"


@dataclasses.dataclass(frozen=True)
class Fence:
    """language python, what "title", file a.py of "```python title=a.py"; the last two are "" without a file."""

    language: str
    what: str
    file: str
    content: str


def sections() -> dict[str, str]:
    """Of the page, by heading."""
    parts = re.split(r"(?m)^## (.+)\n", PAGE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def fences(text: str) -> list[Fence]:
    tokens = [token for token in MarkdownIt().parse(text) if token.type == "fence"]
    said = ((re.fullmatch(r"(\w+)(?: (\w+)=(\S+))?", token.info), token.content) for token in tokens)
    return [Fence(info[1], info[2] or "", info[3] or "", content) for info, content in said if info]


def listed(section: str) -> set[str]:
    """The files of the table at the head of a section."""
    head = sections()[section].partition("```")[0]
    return set(re.findall(r"(?m)^\| `([^`]+)` \|", head.partition("| file | what |")[2]))


def edited(source: str, edit: str) -> str:
    """Hunks between lines of @@: what they keep and take away stands in the source once, line by line."""
    lines = source.splitlines()
    for hunk in re.split(r"(?m)^@@\n", edit):
        marked = [(line[:1] or " ", line[1:]) for line in hunk.splitlines()]
        old, new = ([line for mark, line in marked if mark != other] for other in "+-")
        places = [start for start in range(len(lines)) if lines[start : start + len(old)] == old]
        assert len(places) == 1, f"found {len(places)} times:\n{hunk}"
        assert {mark for mark, _ in marked} <= set(" +-")
        lines[places[0] : places[0] + len(old)] = new
    return "\n".join(lines) + "\n"


def words(section: str, command: str) -> list[list[str]]:
    """The section's commands that begin so."""
    shell = "\n".join(fence.content for fence in fences(sections()[section]) if fence.language == "bash")
    return [shlex.split(line) for line in shell.splitlines() if line.startswith(command)]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The package with what the page adds to it."""
    folder = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__", "assets")
    for name in ("ms_pangu_quant", "configs", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    assets = folder / "ms_pangu_quant/assets"
    assets.mkdir()
    for asset in (ROOT / "ms_pangu_quant/assets").iterdir():
        (assets / asset.name).symlink_to(asset)
    for name in ("served.yaml", "benchmarks"):  # which are added to
        (assets / name).unlink()
    shutil.copytree(ROOT / "ms_pangu_quant/assets/benchmarks", assets / "benchmarks")
    for name in (
        "pyproject.toml",
        "docs/formats.md",
        "ms_pangu_quant/assets/served.yaml",
        "tests/conftest.py",
        "tests/network/conftest.py",
        "tests/network/older_cpu.py",
        "tests/unit/conftest.py",
        "tests/unit/test_consumers.py",
        "tests/unit/test_tasks.py",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for fence in fences(PAGE):
        path = folder / fence.file
        if fence.what == "title":
            assert not path.exists()
            path.write_text(fence.content, encoding="utf-8")
        if fence.what == "edit":
            path.write_text(edited(path.read_text(encoding="utf-8"), fence.content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(copy) -> Callable[..., str]:
    """python -m with these arguments in the copy; returns what was printed. `code` is the exit status that is wanted."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}

    def run(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, *([] if arguments[0] == "-c" else ["-m"]), *arguments],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1500,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    return run


def run_pytest(run: Callable[..., str], *arguments: str, code: int = 0) -> str:
    out = run("pytest", "-p", "no:cacheprovider", "-x", *arguments, code=code)
    assert code or re.search(r"(?m)^\.+ *\[100%\]$|\b\d+ passed", out), out
    return out


# --- the lists of files ---------------------------------------------------------------------------------------------


def test_the_page_has_a_section_for_each_thing_that_can_be_added():
    assert tuple(sections()) == SECTIONS


@pytest.mark.parametrize("section", SECTIONS)
def test_the_listed_files_are_those_that_the_section_writes_and_edits(section):
    written = [fence for fence in fences(sections()[section]) if fence.file]
    assert listed(section) == {fence.file for fence in written}
    for fence in written:
        assert (fence.what, (ROOT / fence.file).exists()) in (("title", False), ("edit", True))
        line = next(line for line in sections()[section].splitlines() if line.startswith(f"| `{fence.file}`"))
        assert line.endswith("; new |") == (fence.what == "title")


def test_what_the_page_writes_has_the_style_of_the_package(copy, run):
    python = sorted({fence.file for fence in fences(PAGE) if fence.file.endswith(".py")})
    assert len(python) > 10
    run("ruff", "check", "--no-cache", *python)
    run("ruff", "format", "--check", "--no-cache", *python)


@pytest.mark.parametrize(
    ("edit", "said"),
    [("-b\n+c\n", "found 0"), ("-a\n", "found 2"), ("-x\n+y\n@@\n-x\n", "found 0"), (" x\n-a\n+\n", "found 0")],
)
def test_an_edit_of_what_is_not_there_once_is_none(edit, said):
    with pytest.raises(AssertionError, match=said):
        edited("a\nx\na = 1\na\n", edit)


def test_an_edit_takes_the_place_of_what_it_quotes():
    assert edited("a\nb\n\nc\n", " a\n-b\n+d\n\n@@\n c\n+e\n") == "a\nd\n\nc\ne\n"


# --- an algorithm ---------------------------------------------------------------------------------------------------


def test_the_algorithms_test_passes(run):
    run_pytest(run, *words("An algorithm", "pytest")[0][1:])


def test_the_algorithms_test_would_notice_a_slip(copy, run):
    """The example's tests are held to what the page asks of tests."""
    path = copy / "ms_pangu_quant/quantizers/refit.py"
    source = path.read_text(encoding="utf-8")
    try:
        for right, wrong in (("(q * q).sum(axis=2)", "(w * w).sum(axis=2)"), ("np.where(gains, ", "np.where(True, ")):
            assert right in source
            path.write_text(source.replace(right, wrong), encoding="utf-8")
            run_pytest(run, "tests/unit/test_refit.py", code=1)
    finally:
        path.write_text(source, encoding="utf-8")


def test_the_algorithm_quantizes_the_embedded_checkpoint_with_less_error_in_every_layer(copy, run):
    commands = words("An algorithm", "pangu-quant quantize")
    assert len(commands) == 2
    errors = {}
    for command in commands:
        run("ms_pangu_quant", *command[1:])
        output = command[command.index("--output") + 1]
        report = json.loads((copy / output / "quantization_report.json").read_text(encoding="utf-8"))
        errors[output] = [block["weight_error"] for block in report["blocks"]]
    assert errors["refit"]
    for refit, rtn in zip(errors["refit"], errors["rtn"], strict=True):
        assert refit
        assert all(refit[site] < rtn[site] for site in rtn)


# --- a scheme and an architecture, which MindSpore computes ---------------------------------------------------------


def test_the_tests_of_scheme_and_architecture_pass(run):
    run_pytest(run, *(words(section, "pytest")[0][1] for section in ("A scheme", "An architecture")))


def test_the_schemes_recipe_quantizes_the_embedded_checkpoint_and_its_result_is_sound_and_computed(copy, run):
    printed = {command[1]: run("ms_pangu_quant", *command[1:]) for command in words("A scheme", "pangu-quant")}
    assert list(printed) == ["quantize", "verify", "compare", "generate"]
    assert "w4a4: sound, 28 quantized layers" in printed["verify"]
    description = json.loads((copy / "w4a4/quantization_description.json").read_text(encoding="utf-8"))
    assert set(description.values()) == {"W4A4_DYNAMIC", "FLOAT"}
    four = float(re.search(r"mean KL +(\S+) nats", printed["compare"])[1])
    (copy / "eight.yaml").write_text((copy / "configs/w4a4.yaml").read_text(encoding="utf-8").replace(": w4a4", ": w4a8"))
    run("ms_pangu_quant", "quantize", MINI, "--recipe", "eight.yaml", "--output", "eight")
    compared = run("ms_pangu_quant", "compare", MINI, "eight", "--data", VALIDATION, "--limit", "10", "--json")
    assert 0 < json.loads(compared)["kl_mean"] < four < 0.1
    assert printed["generate"].strip()


def test_a_format_that_no_program_computes_the_scheme_from_is_refused(run):
    run("ms_pangu_quant", "quantize", MINI, "--recipe", "w4a4", "--output", "no", "--format", "ascend", code=2)


QWEN2 = MappingProxyType(
    {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "sliding_window": 64,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    }
)
IDS = [5, 17, 3, 40, 9, 9, 22]
LOGITS = f"""
import numpy as np
from pathlib import Path
from ms_pangu_quant.network import runtime
runtime.start()
from ms_pangu_quant.inference.model import load
for name in ("qwen2", "qwen2-w8a8"):
    np.save(name, load(Path(name), kv_cache_tokens=64).logits({IDS}))
"""


def test_a_checkpoint_of_the_architecture_is_read_quantized_verified_and_computed(copy, run, forward):
    """The logits are those of the forward pass in numpy, which knows of no architecture."""
    written = f"write_checkpoint(Path('qwen2'), {dict(QWEN2)}, seed=3, dtype='float32')"
    run("-c", f"from pathlib import Path\nfrom tools.dev.make_checkpoint import write_checkpoint\n{written}")
    run("ms_pangu_quant", "quantize", "qwen2", "--recipe", "w8a8_rtn", "--output", "qwen2-w8a8")
    assert "qwen2-w8a8: sound, 14 quantized layers" in run("ms_pangu_quant", "verify", "qwen2-w8a8", "--against", "qwen2")
    config = json.loads((copy / "qwen2-w8a8/config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["bias"], config["output_bias"]) == ("PanguEmbedded", True, False)
    run("-c", LOGITS)
    wanted = qwen2_logits(load_file(copy / "qwen2/model.safetensors"), forward)
    floats, rounded = np.load(copy / "qwen2.npy"), np.load(copy / "qwen2-w8a8.npy")
    assert np.abs(floats - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert 0 < np.linalg.norm(rounded - wanted) < 0.05 * np.linalg.norm(wanted)


def qwen2_logits(tensors: Mapping[str, np.ndarray], forward) -> np.ndarray:
    """Of Qwen2's defaults for what its config.json does not say."""
    known = {"model_type": "PanguEmbedded", "output_bias": False, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
    config = ModelConfig.from_dict({**QWEN2, **known}, where="test")
    assert {name for name in tensors if name.endswith("_proj.bias")} == {
        f"model.layers.{index}.self_attn.{name}_proj.bias" for index in range(2) for name in "qkv"
    }
    hidden = tensors[layout.EMBEDDING][IDS].astype(np.float64)
    for index in range(config.num_hidden_layers):
        prefix = layout.block_prefix(index)
        block = {name: tensors[prefix + name] for name in layout.block_shapes(config)}
        hidden, _ = forward(Block(config, block), hidden)
    normed = hidden / np.sqrt((hidden**2).mean(axis=1, keepdims=True) + 1e-6) * tensors[layout.FINAL_NORM]
    return normed @ tensors[layout.EMBEDDING].T.astype(np.float64)


# --- a format -------------------------------------------------------------------------------------------------------


def functions(protocol: type) -> set[str]:
    return {name for name in vars(protocol) if not name.startswith("_") and callable(getattr(protocol, name))}


def test_the_formats_module_has_the_six_functions_of_the_protocol_and_the_page_names_them():
    text = sections()["A format"]
    (module,) = (fence.content for fence in fences(text) if fence.what == "title")
    made = {node.name for node in ast.parse(module).body if isinstance(node, ast.FunctionDef)}
    assert made == functions(Format)
    assert len(made) == 6
    prose = next(part for part in text.split("\n\n") if part.startswith("`encode`"))
    assert set(re.findall(r"`(\w+)`", prose)) == made


def test_the_format_loses_nothing(copy, run):
    quantize, verify, export = (words("A format", f"pangu-quant {name}")[0] for name in ("quantize", "verify", "export"))
    run("ms_pangu_quant", *quantize[1:])
    assert "plain: sound, 28 quantized layers" in run("ms_pangu_quant", *verify[1:])
    run("ms_pangu_quant", *export[1:])
    run("ms_pangu_quant", "quantize", MINI, "--recipe", quantize[quantize.index("--recipe") + 1], "--output", "direct")
    assert (copy / "back/SHA256SUMS").read_bytes() == (copy / "direct/SHA256SUMS").read_bytes()


def test_the_page_of_formats_has_the_rows_that_were_added(run):
    run_pytest(run, "tests/unit/test_consumers.py", "-k", "documentation")


# --- a task ---------------------------------------------------------------------------------------------------------


def test_the_page_names_every_field_of_a_task():
    text = sections()["A task"]
    source = next(fence.content for fence in fences(text) if fence.file.endswith("tasks/arithmetic.py"))
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    (made,) = (call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Task")
    given = {keyword.arg for keyword in made.keywords}
    left_out = set(re.findall(r"`(\w+)`, which", text)) | set(re.findall(r"and `(\w+)`:", text))
    assert given | left_out == {field.name for field in dataclasses.fields(Task)}
    assert not given & left_out


def test_the_tasks_references_pass_and_wrong_answers_do_not(run):
    run_pytest(run, "tests/unit/test_tasks.py", "-k", "arithmetic")
