"""evaluation/job.py: a request that makes no sense is refused as it is made, and a file is scored as the command does."""

from __future__ import annotations

import json
import re

import pytest

from ms_pangu_quant.api import EvaluationRequest, GenerationSettings, Judging, score
from ms_pangu_quant.cli import main
from ms_pangu_quant.errors import CheckpointError, RequestError
from ms_pangu_quant.evaluation.samples import write_records


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tasks": ["humanevl"]}, "unknown benchmark 'humanevl' (did you mean 'humaneval'?)"),
        ({"tasks": []}, "tasks: got none"),
        ({"tasks": ["mini"], "data": {"mbpp": "own.jsonl"}}, "tasks: got mini"),
        ({"modes": []}, "modes: got []"),
        ({"modes": ["slow_thnik"]}, "modes: got ['slow_thnik'] (did you mean 'slow_think'?)"),
        ({"prompts": {"mbpp": "mbpp_3shots"}}, "prompts: got 'mbpp_3shots' of 'mbpp' (did you mean 'mbpp_3shot'?)"),
        ({"prompts": {"mbppp": "mbpp_3shot"}}, "prompts: got 'mbpp_3shot' of 'mbppp' (did you mean 'mbpp'?)"),
        ({"limit": 0}, "limit: got 0"),
        ({"samples": 0}, "samples: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"samples": 2}, "greedy answers would all be the same; draw them with --sampled"),
        ({"sampled": True, "generation": GenerationSettings(temperature=0.6)}, "sampled: draws at the checkpoint's own"),
        ({"max_new_tokens": {"slow_thnik": 9}}, "max_new_tokens: got 9 of 'slow_thnik' (did you mean 'slow_think'?)"),
        ({"max_new_tokens": {"slow_think": 0}}, "max_new_tokens: got 0 of slow_think, wanted at least 1"),
        (
            {"max_new_tokens": {"slow_think": 9}, "modes": ["no_think"]},
            "max_new_tokens: got 9 of 'slow_think' (did you mean 'no_think'?)",
        ),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_by_name(wrong, said):
    with pytest.raises(RequestError, match=re.escape(said)):
        EvaluationRequest("checkpoint", "output", **wrong)


def test_several_answers_that_are_drawn_make_sense():
    EvaluationRequest("checkpoint", "output", samples=2, generation=GenerationSettings(temperature=0.6))
    EvaluationRequest("checkpoint", "output", samples=2, sampled=True)


def test_a_checkpoint_that_would_draw_nothing_is_not_sampled(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0}')
    with pytest.raises(CheckpointError, match="temperature 0, which draws nothing"):
        EvaluationRequest(tmp_path, "output", sampled=True)


@pytest.mark.parametrize("text", ["0", "many", "slow_think=", "slow_think=-1", "slow_think:9", "1.5", ""])
def test_a_limit_of_tokens_that_is_no_number_is_refused(text, capsys):
    assert main(["evaluate", "checkpoint", "--max-new-tokens", text]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "wanted a number of at least 1, or slow_think=2048,no_think=512" in line


def test_a_file_is_scored_as_the_command_scores_it(tmp_path, capsys):
    samples = tmp_path / "samples.jsonl"
    bodies = ["    return 0\n", "    return sum(number for number in data)\n"]
    write_records(
        samples, ({"task_id": f"Mini/{number}", "sample_id": 0, "completion": body} for number, body in enumerate(bodies))
    )
    begun, verdicts = [], []
    found = score(
        samples,
        tmp_path / "function",
        ["mini"],
        judging=Judging("rlimits", cpu_seconds=3),
        on_begin=begun.append,
        on_verdict=verdicts.append,
    )
    command = [
        "evaluate",
        "--score-only",
        "--tasks",
        "mini",
        "--samples",
        str(samples),
        "--output",
        str(tmp_path / "command"),
    ]
    assert main([*command, "--sandbox", "rlimits", "--cpu-seconds", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert (begun, len(verdicts)) == ([2], 2)
    for name in ("results.jsonl", "summary.json"):
        assert (tmp_path / "function" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()
