"""report/: the pages say what the results say, need no network, and refuse what cannot be compared."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ms_pangu_quant
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.cli import main
from ms_pangu_quant.errors import DataError
from ms_pangu_quant.evaluation import statistics
from ms_pangu_quant.evaluation.lengths import lengths_of
from ms_pangu_quant.evaluation.samples import write_json, write_records
from ms_pangu_quant.evaluation.sandbox import RLIMITS, find_isolation
from ms_pangu_quant.evaluation.summary import scores, summarize
from ms_pangu_quant.evaluation.tasks import TASKS, load_problems
from ms_pangu_quant.evaluation.verdict import Limits
from ms_pangu_quant.inference.sampling import decoding_of
from ms_pangu_quant.mixed.sensitivity import GroupSensitivity, Sensitivity
from ms_pangu_quant.report.budgets import curve
from ms_pangu_quant.report.comparison import compare, compare_together
from ms_pangu_quant.report.page import Report, write
from ms_pangu_quant.report.results import load_runs
from ms_pangu_quant.report.roofline import load_device, prefill_seconds
from ms_pangu_quant.report.speed import load_speeds

MINI = Path(ms_pangu_quant.__file__).parent / "assets/openpangu-mini"
MODES = ("slow_think", "no_think")
PASSES = {  # result -> task -> mode -> which of 12 problems pass
    "float": {"mini": {"slow_think": "111111111100", "no_think": "111110000000"}},
    "w8a8": {"mini": {"slow_think": "111111111010", "no_think": "111110000000"}},
    "w4a8": {"mini": {"slow_think": "111110000000", "no_think": "000000000000"}},
}
HOSTILE = "</pre><script>alert(1)</script>\x1b[31m\udc80 {{ 7 * 7 }}"


def make(folder, name: str, passes=None, precision="bfloat16", text="```python\npass\n```", problems=None, more=None):
    """What evaluate would have left, with chosen verdicts: 1 passes, 0 fails, T never ends its thought, L fails in a loop.

    more: (mode, task_id) -> fields of a sample in place of the usual.
    """
    problems = problems or {"mini": load_problems(TASKS["mini"])}
    samples, results = [], []
    for task, modes in (passes or PASSES[name]).items():
        for mode, verdicts in modes.items():
            for task_id, bit in zip(problems[task].by_id, verdicts, strict=False):
                sample = {"task": task, "mode": mode, "task_id": task_id, "sample_id": 0, "prompt": "zero_shot_instruct/v1"}
                sample |= {"completion": f"[unused16]hm[unused17]{text}", "answer": text, "tokens": 9, "thought_tokens": 3}
                sample |= {"answer_tokens": 4, "finish_reason": "eos", "repetitive": bit == "L", "closed": bit != "T"}
                sample |= {
                    "settings": {"max_new_tokens": 50, "temperature": 0.0},
                    **(more or (lambda *names: {}))(mode, task_id),
                }
                samples.append(sample)
                verdict = {"1": "pass", "T": "unclosed_thought"}.get(bit, "wrong_answer")
                line = {key: sample[key] for key in ("task", "mode", "task_id", "sample_id")}
                line |= {"verdict": verdict, "rule": "fenced", "oracle": "two_process", **lengths_of(sample)}
                results.append({**line, "decoding": decoding_of(sample["settings"])})
    output = folder / name
    write_records(output / "samples.jsonl", samples)
    write_records(output / "results.jsonl", results)
    limits, isolation = vars(Limits()), vars(find_isolation(RLIMITS))
    summary = {"entries": summarize(results, samples, problems), "sandbox": {**isolation, "limits": limits}, "versions": {}}
    write_json(output / "summary.json", summary)
    blocks = [{"output_error": 0.01 * (index + 1)} for index in range(4)]
    recipe = None if precision == "bfloat16" else {"recipe": {"text": "scheme: w8a8\n"}, "blocks": blocks}
    provenance = {"model": name, "precision": precision, "checkpoint_bytes": 1000, "checkpoint_sha256": "f" * 64}
    write_json(
        output / "run.json", {**provenance, "recipe": recipe, "device": "cpu", "machine": "m", "versions": {"numpy": "1"}}
    )
    return output


@pytest.fixture
def three(tmp_path):
    return [make(tmp_path, name, precision="bfloat16" if name == "float" else "W8A8") for name in PASSES]


class Page(HTMLParser):
    """The page's text, its tags, and every address that a browser might fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.tags, self.addresses, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name.split(":")[-1] in ("src", "href", "data", "action")]
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def test_the_comparison_is_the_statistics_of_the_paired_problems(three):
    found = {(each.cell, each.run.name): each for each in compare(load_runs(three), 0.9)}
    assert len(found) == 4
    w8 = found[("mini", "slow_think", "greedy"), "w8a8"]
    assert (w8.flips.lost, w8.flips.gained, w8.problems) == (("Mini/9",), ("Mini/10",), 12)
    assert (w8.p, w8.difference.value, w8.retention.ratio.value) == (1, 0, 1)
    w4 = found[("mini", "slow_think", "greedy"), "w4a8"]
    assert w4.p == statistics.mcnemar(5, 0)
    assert w4.retention.ratio.value == pytest.approx(0.5)
    assert [each.p_holm for each in found.values()] == statistics.holm([each.p for each in found.values()])
    assert [each.retention_holm for each in found.values()] == statistics.holm(
        [each.retention.p for each in found.values()]
    )
    assert w4.tokens.value == 0


LOOPS = {  # 12 problems each: float loops as often as w8a8, on others; w4a8's thoughts do not end
    "float": {"mini": {"slow_think": "11111111LLL0"}},
    "w8a8": {"mini": {"slow_think": "1111111L11LL"}},
    "w4a8": {"mini": {"slow_think": "1TTTTTTTTTLT"}},
}


def test_loops_and_thoughts_without_end_are_compared_by_problem(tmp_path):
    runs = load_runs([make(tmp_path, name, LOOPS[name]) for name in LOOPS])
    (w8, w4) = compare(runs, 0.9)
    loops, thoughts = w8.faults["loops"], w4.faults["unclosed_thoughts"]
    assert (loops.reference, loops.new, loops.difference.value) == ((3, 12), (3, 12), 0)
    assert (loops.flips.lost, loops.flips.gained, loops.p) == (("Mini/8", "Mini/9"), ("Mini/7", "Mini/11"), 1)
    assert (thoughts.reference, thoughts.new) == ((0, 12), (10, 12))
    assert thoughts.p == statistics.mcnemar(0, 10)
    assert thoughts.p_holm == statistics.holm([1, thoughts.p])[1]
    assert thoughts.difference == statistics.score_difference([0] * 12, [0, *[1] * 9, 0, 1])


def test_exchanging_the_runs_negates_the_paired_shares(tmp_path):
    runs = load_runs([make(tmp_path, name, LOOPS[name]) for name in LOOPS])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        (there,), (back,) = (compare([runs[a], runs[b]], 0.9) for a, b in ((one, other), (other, one)))
        for name in there.faults:
            forth, again = there.faults[name], back.faults[name]
            assert (forth.reference, forth.new, forth.p) == (again.new, again.reference, again.p)
            ends = (forth.difference.value, forth.difference.low, forth.difference.high)
            assert ends == pytest.approx((-again.difference.value, -again.difference.high, -again.difference.low), abs=1e-9)


def test_the_first_screen_shows_that_the_float_model_loops_too(tmp_path):
    runs = load_runs([make(tmp_path, name, LOOPS[name]) for name in LOOPS])
    html, markdown = write(Report(runs[:2]), tmp_path / "two")
    looped = "Answers that loop: float 3 of 12, w8a8 3 of 12. No difference is more than chance gives; float does it too."
    for text in (" ".join("".join(Page(html.read_text("utf-8")).words).split()), markdown.read_text("utf-8")):
        assert looped in text.split("Accuracy")[0]
        assert "Thoughts that do not end: none (float 0 of 12, w8a8 0 of 12)." in text
    (_, markdown) = write(Report(runs), tmp_path / "three")
    assert "More often than float, and more than chance gives: w4a8 (p .004)." in markdown.read_text("utf-8")


def test_what_one_mode_alone_shows_is_not_drowned_in_the_others(tmp_path):
    """Twelve loops in one mode, and as many fewer in the other: over all there is nothing to see."""
    passes = {
        "float": {"mini": {"slow_think": "1" * 12, "no_think": "L" * 12}},
        "w8a8": {"mini": {"slow_think": "L" * 12, "no_think": "1" * 12}},
    }
    _, markdown = write(Report(load_runs([make(tmp_path, name, passes[name]) for name in passes])), tmp_path / "report")
    text = markdown.read_text("utf-8")
    assert (
        "Answers that loop: float 12 of 24, w8a8 12 of 24. No difference is more than chance gives; float does it too."
        in text
    )
    assert "By itself, w8a8 in Mini slow_think differs by +100.0 points, more than chance gives (p <.001)." in text
    assert "By itself, Mini no_think differs by +100.0 points, more than chance gives (p <.001)." in text


def test_all_modes_together_are_problems_and_not_answers(three):
    """A problem's answers in two modes count as one observation; what differs from it is not the sum."""
    (w8, w4) = compare_together(load_runs(three), 0.9)
    assert (w8.problems, w8.passed.reference, w8.passed.new) == (12, (15, 24), (15, 24))
    bits = [
        [(int(a) + int(b)) / 2 for a, b in zip(*PASSES[name]["mini"].values(), strict=True)] for name in ("float", "w4a8")
    ]
    assert w4.difference == statistics.score_difference(*bits)
    assert w4.p == statistics.sign_flip(*bits)
    assert [w8.p_holm, w4.p_holm] == statistics.holm([w8.p, w4.p])
    assert w8.needed == statistics.problems_needed(*w8.scores, 0.9, level=0.05 / 2)
    assert w4.needed is None


def strip(output: Path) -> Path:
    """As an earlier version has written it."""
    summary = json.loads((output / "summary.json").read_text())
    for entry in summary["entries"]:
        for name in ("decoding", "max_new_tokens", "loops", "unclosed_thoughts"):
            del entry[name]
    write_json(output / "summary.json", summary)
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    write_records(
        output / "results.jsonl",
        [{name: value for name, value in line.items() if name not in ("decoding", "repetitive")} for line in lines],
    )
    return output


def test_what_an_earlier_version_did_not_write_is_not_known(tmp_path):
    outputs = [strip(make(tmp_path, name, LOOPS[name])) for name in LOOPS]
    html, markdown = write(Report(load_runs(outputs)), tmp_path / "report")
    for path in (html, markdown):
        text = " ".join("".join(Page(path.read_text("utf-8")).words).split())
        assert "Answers that loop: not known." in text
        assert "Thoughts that do not end: float 0 of 12, w8a8 0 of 12, w4a8 10 of 12." in text  # which the verdicts say


OWN = {"max_new_tokens": 50, "temperature": 0.6, "top_p": 0.95}


def drawn(folder, name: str, bits: str) -> Path:
    return make(folder, name, {"mini": {"slow_think": bits}}, more=lambda *names: {"settings": OWN})


def of_checkpoint(output: Path, sha256: str) -> Path:
    write_json(output / "run.json", {**json.loads((output / "run.json").read_text()), "checkpoint_sha256": sha256})
    return output


def test_greedy_answers_are_not_compared_with_drawn_ones(tmp_path):
    runs = load_runs([make(tmp_path, "float"), of_checkpoint(drawn(tmp_path, "w8a8", "1" * 12), "e" * 64)])
    assert compare(runs, 0.9) == compare_together(runs, 0.9) == []
    _, markdown = write(Report(runs), tmp_path / "report")
    text = markdown.read_text("utf-8")
    assert (
        "w8a8, Mini slow_think: drawn otherwise (temperature 0.6, top-p 0.95) than float (greedy), and compared with"
        in text
    )
    assert "| Mini | slow_think, temperature 0.6, top-p 0.95 | w8a8 | 12/12 |" in text
    assert "Against" not in text


def test_greedy_and_drawn_answers_of_one_checkpoint_stand_beside_each_other(tmp_path):
    """Two directories of each: one result, and a comparison for each way of drawing."""
    outputs = []
    for name, bits in (("float", "111111111111"), ("w8a8", "111111111100")):
        outputs += [make(tmp_path, name), drawn(tmp_path / "drawn", name, bits)]
    for output in outputs[2:]:
        of_checkpoint(output, "e" * 64)
    runs = load_runs(outputs, ["float", "float drawn", "w8a8", "w8a8 drawn"])
    assert [(run.name, len(run.entries)) for run in runs] == [("float", 3), ("w8a8", 3)]
    found = {each.cell: each for each in compare(runs, 0.9)}
    assert found["mini", "slow_think", "greedy"].passed.new == (10, 12)
    assert found["mini", "slow_think", "temperature 0.6, top-p 0.95"].passed.reference == (12, 12)
    assert [each.cell.decoding for each in compare_together(runs, 0.9)] == ["greedy", "temperature 0.6, top-p 0.95"]
    html, markdown = write(Report(runs), tmp_path / "report")
    assert Page(html.read_text("utf-8")).open == []
    assert "- w8a8 (temperature 0.6, top-p 0.95) solves 10 of 12 problems, float 12: 2 fewer" in markdown.read_text("utf-8")


def test_answers_of_unknown_decoding_are_compared_and_the_page_says_so(three, tmp_path):
    strip(three[1])
    assert [each.cell.decoding for each in compare(load_runs(three), 0.9)] == ["greedy"] * 4
    _, markdown = write(Report(load_runs(three)), tmp_path / "report")
    assert "w8a8, Mini no_think: it is not known how its answers were drawn; taken to be greedy" in markdown.read_text(
        "utf-8"
    )


def test_other_limits_of_tokens_are_told(tmp_path):
    def short(*names):
        return {"settings": {"max_new_tokens": 20, "temperature": 0.0}}

    runs = load_runs([make(tmp_path, "float"), make(tmp_path, "w8a8", more=short)])
    _, markdown = write(Report(runs), tmp_path / "report")
    assert "Mini no_think: w8a8's answers end at 20 tokens, float's at 50" in markdown.read_text("utf-8")


ANSWERS = st.lists(  # (problem, tokens, verdict) of each
    st.tuples(st.sampled_from("abc"), st.integers(0, 20), st.sampled_from(["pass", "wrong_answer", "infra_error"])),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(ANSWERS)
def test_a_curve_of_budgets_is_its_definition_never_falls_and_ends_at_the_run_itself(answers):
    results = [{"task_id": name, "tokens": tokens, "verdict": verdict} for name, tokens, verdict in answers]
    found, judged = curve(results), [each for each in answers if each[2] != "infra_error"]
    if not judged:
        assert found is None
        return
    names = {name for name, _, _ in judged}

    def mean(value):
        """Over the problems, of the mean over a problem's answers."""
        by_name = ([value(*each[1:]) for each in judged if each[0] == name] for name in names)
        return sum(sum(values) / len(values) for values in by_name) / len(names)

    for budget in range(22):
        wanted = mean(lambda tokens, verdict: min(tokens, budget)), mean(lambda t, v: t <= budget and v == "pass")  # noqa: B023
        assert found.at(budget) == pytest.approx(wanted)
    points = found.points()
    assert points == sorted(points)
    assert [passed for _, passed in points] == sorted(passed for _, passed in points)
    scored = scores(results)
    assert points[-1] == pytest.approx((mean(lambda tokens, verdict: tokens), sum(scored.values()) / len(scored)))


def test_the_page_has_what_a_budget_buys_where_tokens_are_known(tmp_path):
    def sized(mode, task_id):
        return {"tokens": 10 * (1 + int(task_id.split("/")[1]))}

    outputs = [make(tmp_path, name, more=sized) for name in ("float", "w8a8")]
    html, markdown = write(Report(load_runs(outputs)), tmp_path / "report")
    text = markdown.read_text("utf-8")
    assert "| benchmark | mode | result | 8 tokens | 16 tokens | 32 tokens | 64 tokens | 120 tokens |" in text
    assert "| Mini | no_think | w8a8 | 0.0 (8) | 8.3 (16) | 25.0 (29) | 41.7 (50) | 41.7 (65) |" in text
    assert "What a budget of tokens buys" in html.read_text("utf-8")
    lines = [json.loads(line) for line in (outputs[0] / "results.jsonl").read_text().splitlines()]
    assert curve([{**lines[0], "tokens": None}, *lines[1:]]) is None


def test_the_page_is_one_file_that_loads_nothing_and_is_well_formed(three, tmp_path):
    html, _ = write(Report(load_runs(three)), tmp_path / "report")
    text = html.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert all(address.startswith("#") for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import", text)
    assert page.tags.count("svg") == 5
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"#0[1-7]0303|#010101|#020202", text), "a stand-in colour was left in a plot"


def test_both_pages_tell_the_scores_the_flips_and_where_they_come_from(three, tmp_path):
    html, markdown = write(Report(load_runs(three), title="A title & more"), tmp_path / "report")
    words = " ".join("".join(Page(html.read_text(encoding="utf-8")).words).split())
    for text in (words, markdown.read_text(encoding="utf-8")):
        for wanted in ("10/12", "83.3", "5/12", "Mini/9", "Mini/10", "zero_shot_instruct/v1", "f" * 64):
            assert wanted in text, wanted
        for wanted in ("A title & more", "12 of its 300 problems, not the whole benchmark", TASKS["mini"].sha256[:16]):
            assert wanted in text, wanted
        assert "resource limits; files, network and other processes are reachable" in text or "are reachable" in text
        assert "w4a8 solves 5 of 24 (12 problems in 2 modes), float 15: 10 fewer (" in text


def test_what_a_model_wrote_cannot_become_part_of_the_page(tmp_path):
    runs = load_runs([make(tmp_path, "float", text=HOSTILE), make(tmp_path, "w8a8", text=HOSTILE)])
    html, markdown = write(Report(runs), tmp_path / "report")
    text = html.read_text(encoding="utf-8")
    assert "script" not in Page(text).tags
    assert "{{ 7 * 7 }}" in text
    assert "\x1b" not in text + markdown.read_text(encoding="utf-8")
    fenced = [line for line in markdown.read_text(encoding="utf-8").splitlines() if "<script>" in line]
    assert fenced
    assert all(line.startswith("    ") for line in fenced)


def test_the_same_results_give_the_same_bytes(three, tmp_path):
    first = [path.read_bytes() for path in write(Report(load_runs(three)), tmp_path / "a")]
    assert [path.read_bytes() for path in write(Report(load_runs(three)), tmp_path / "b")] == first


def test_a_reference_that_passes_nothing_has_no_retention(tmp_path):
    nothing = {"mini": {"no_think": "000"}}
    runs = load_runs([make(tmp_path, name, nothing) for name in ("float", "w8a8")])
    html, markdown = write(Report(runs), tmp_path / "report")
    for path in (html, markdown):
        assert "the reference passes nothing" in path.read_text(encoding="utf-8")


def test_one_result_alone_makes_a_page_without_comparisons(three, tmp_path):
    html, markdown = write(Report(load_runs(three[:1])), tmp_path / "report")
    assert "Against" not in html.read_text(encoding="utf-8") + markdown.read_text(encoding="utf-8")


def test_scored_files_from_elsewhere_need_no_model_or_samples(three, tmp_path):
    for output in three:
        (output / "run.json").unlink()
        (output / "samples.jsonl").unlink()
    html, markdown = write(Report(load_runs(three)), tmp_path / "report")
    assert "samples from elsewhere" in html.read_text(encoding="utf-8")
    assert "samples from elsewhere" in markdown.read_text(encoding="utf-8")


def test_several_samples_of_a_problem_are_compared_by_exchanging_them(three, tmp_path):
    """Three samples a problem: no flips, and a p between 0 and 1 that identical runs put at 1."""
    for output in three[:2]:
        records = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
        more = [
            {**record, "sample_id": number, "verdict": record["verdict"] if number else "pass"}
            for record in records
            for number in range(3)
        ]
        write_records(output / "results.jsonl", more)
    compared = compare(load_runs(three[:2]), 0.9)
    assert [each.flips for each in compared] == [None, None]
    assert compared[1].p == 1
    assert 0 < compared[0].p <= 1
    write(Report(load_runs(three[:2])), tmp_path / "report")


@pytest.mark.parametrize("field", ["data_sha256", "prompts"])
def test_results_on_other_problems_or_prompts_are_not_compared(three, field):
    summary = json.loads((three[1] / "summary.json").read_text())
    summary["entries"][0][field] = ["another/v1"] if field == "prompts" else "0" * 64
    write_json(three[1] / "summary.json", summary)
    with pytest.raises(DataError, match=f"another {field} than"):
        load_runs(three)


def test_what_is_no_result_is_one_clear_line(three, tmp_path, capsys):
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "r")]) == 2
    assert "has no summary.json; wanted an output directory of pangu-quant evaluate" in capsys.readouterr().err.replace(
        "\n", ""
    )
    (three[0] / "summary.json").write_text("{}")
    with pytest.raises(DataError, match="is not a result of this version"):
        load_runs(three)
    (three[0] / "summary.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        load_runs(three)
    with pytest.raises(DataError, match="give each its own name"):
        load_runs(three[1:], ["same", "same"])
    with pytest.raises(DataError, match="at most 7"):
        write(Report(load_runs([three[1]] * 8)), tmp_path / "r")


def test_the_command_writes_both_pages(three, tmp_path, capsys):
    arguments = ["report", *map(str, three), "--output", str(tmp_path / "out"), "--name", "a", "--name", "b", "--name", "c"]
    assert main(arguments) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.md"]
    assert "report.html" in capsys.readouterr().out


def bench(path, scale: float = 2.5, *, both: bool = True):
    """Rows as bench --json prints them: the quantized model is `scale` times as fast."""
    rows = []
    for phase in ("prefill", "decode"):
        for batch in (1, 8):
            for model in ("float", "quantized") if both else ("quantized",):
                latency = 100.0 * batch / (scale if model == "quantized" else 1)
                row = {"model": model, "phase": phase, "batch_size": batch, "prompt_len": 64, "latency_ms": latency}
                rows.append({**row, "tokens_per_s": 12.5, "spread": 0.02, "peak_rss_gib": 1.25, "limit_fraction": 0.5})
    write_json(path, rows)
    return path


def test_a_byte_order_mark_before_the_rows_of_a_bench_is_none_of_them(tmp_path):
    path = bench(tmp_path / "fast.json")
    plain = load_speeds([str(path)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_speeds([str(path)]) == plain


def test_the_speed_table_is_the_ratio_of_what_was_measured_in_turns(three, tmp_path, capsys):
    fast, alone = bench(tmp_path / "fast.json"), bench(tmp_path / "alone.json", both=False)
    arguments = ["report", *map(str, three), "--output", str(tmp_path / "out"), "--bench", f"w8a8={fast}", "--bench"]
    assert main([*arguments, str(alone)]) == 0
    html, markdown = ((tmp_path / "out" / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    assert "| prefill | 64 | 8 | 320.0 (2 %) | 12.5 | 2.50 | 320.0 (2 %) | 12.5 |  |" in markdown
    assert Page(html).open == []
    assert Page(html).tags.count("svg") == 6
    for text in (html, markdown):
        assert "w8a8: the measuring process held at most 1.25 GiB, with both" in text
        assert "alone: the measuring process held at most 1.25 GiB." in text
        assert "--bench" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("[", "it is not JSON"),
        ("{}", "got no list of rows"),
        ("[1]", "row 1 is not an object"),
        ('[{"model": "int3"}]', "row 1 has model 'int3'"),
        ({"latency_ms": None}, "row 1 has latency_ms None"),
        ({"latency_ms": 0}, "row 1 has latency_ms 0"),
        ({"spread": float("nan")}, "row 1 has spread nan"),
        ({"model": "float"}, "no row of a quantized model"),
    ],
)
def test_what_is_no_bench_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "bench.json"
    if isinstance(content, dict):
        rows = json.loads(bench(path, both=False).read_text())
        content = json.dumps([{**rows[0], **content}])
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=re.escape(message)):
        load_speeds([str(path)])


def test_two_benches_need_two_names(tmp_path):
    path = bench(tmp_path / "bench.json")
    assert [speed.name for speed in load_speeds([str(path), f"a={path}"])] == ["bench", "a"]
    with pytest.raises(DataError, match="are called the same"):
        load_speeds([f"a={path}", f"a={path}"])


def test_the_sensitivity_of_every_group_is_told_and_drawn(three, tmp_path):
    groups = tuple(
        GroupSensitivity(block, group, {"w4a8": 0.1, "w8a8": 0.01}, 10.0 ** -(2 + block), 1e-4)
        for block in range(2)
        for group in ("linear_qkv", "linear_fc2")
    )
    found = Sensitivity(("w4a8", "w8a8"), groups, {"w4a8": 0.03, "w8a8": 0.0003}, {"checkpoint": "c", "method": "m"})
    found.save(tmp_path / "s.json")
    arguments = ["report", *map(str, three), "--output", str(tmp_path / "out"), "--sensitivity", str(tmp_path / "s.json")]
    assert main(arguments) == 0
    html, markdown = ((tmp_path / "out" / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    assert "| 1 | q/k/v | 0.001 | 0.0001 |" in markdown
    assert Page(html).open == []
    assert Page(html).tags.count("svg") == 6
    for text in (html, markdown):
        assert "0.03 nats in w4a8" in text or "0.03 in w4a8" in text
    assert main([*arguments[:-1], str(tmp_path / "out/report.md")]) == 2


def test_a_prediction_says_that_it_is_one_and_has_the_rooflines_figures(three, tmp_path):
    arguments = ["report", *map(str, three), "--output", str(tmp_path / "out"), "--predict", str(MINI)]
    assert main(arguments) == 0
    html, markdown = ((tmp_path / "out" / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    assert Page(html).open == []
    assert Page(html).tags.count("svg") == 6
    config, device = ModelConfig.from_file(MINI / "config.json"), load_device("atlas_a2")
    for text in (html, markdown):
        assert "Predicted, not measured." in text
    for batch in (1, 32):
        base, mine = (1e3 * prefill_seconds(device, config, name, batch, 512) for name in ("float16", "w8a8"))
        assert f"| batch {batch} | {base:.1f} (1.00) | {mine:.1f} ({base / mine:.2f}) |" in markdown
    assert main([*arguments, "--device", "no_such"]) == 2
