"""One entry for each task and mode of a run: the score with its interval, what became of the samples, and their lengths."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ms_pangu_quant.evaluation.lengths import spread
from ms_pangu_quant.evaluation.samples import Record
from ms_pangu_quant.evaluation.statistics import Interval, mean_interval, pass_at_k, wilson
from ms_pangu_quant.evaluation.tasks.task import Problems
from ms_pangu_quant.evaluation.verdict import PASS, VERDICTS

KS = (1, 5, 10, 100)
_MISSING_MODULE = re.compile(r"ModuleNotFoundError: No module named '([^'.]+)")
MEASURES = ("tokens", "thought_tokens", "answer_tokens", "words", "thought_words", "answer_words")


def summarize(results: Sequence[Record], samples: Sequence[Record], tasks: Mapping[str, Problems]) -> list[Record]:
    """results and samples in the same order. Entries in the order of tasks, then of the modes' first appearance."""
    entries = []
    for name, problems in tasks.items():
        mine = [
            (result, sample)
            for result, sample in zip(results, samples, strict=True)
            if sample.get("task", name) == name and result.get("task", name) == name
        ]
        for mode in dict.fromkeys(result.get("mode") for result, _ in mine):
            chosen = [(result, sample) for result, sample in mine if result.get("mode") == mode]
            entries.append(_entry(name, mode, problems, [pair[0] for pair in chosen], [pair[1] for pair in chosen]))
    return entries


def scores(results: Iterable[Record]) -> dict[str, float]:
    """task_id -> share of its samples that pass; a problem whose every sample is an infra_error has no score."""
    counts = _counts(results)
    return {task_id: passed / total for task_id, (passed, total) in counts.items()}


def _counts(results: Iterable[Record]) -> dict[str, tuple[int, int]]:
    counts: dict[str, tuple[int, int]] = {}
    for result in results:
        if result["verdict"] != "infra_error":
            passed, total = counts.get(str(result["task_id"]), (0, 0))
            counts[str(result["task_id"])] = passed + (result["verdict"] == PASS), total + 1
    return counts


def _entry(
    name: str, mode: str | None, problems: Problems, results: Sequence[Record], samples: Sequence[Record]
) -> dict[str, Any]:
    counts = _counts(results)
    least = min((total for _, total in counts.values()), default=0)
    verdicts = Counter(result["verdict"] for result in results)
    return {
        "task": name,
        "title": problems.task.title,
        "mode": mode,
        "prompts": sorted({str(sample["prompt"]) for sample in samples if "prompt" in sample}),
        "data_sha256": problems.sha256,
        "problems": len(counts),
        "of": len(problems.by_id),
        "samples": len(results),
        "passed": verdicts[PASS],
        "pass@1": asdict(_pass_at_1(list(counts.values()))) if counts else None,
        "pass@k": {
            str(k): sum(pass_at_k(total, passed, k) for passed, total in counts.values()) / len(counts)
            for k in KS
            if k <= least
        },
        "verdicts": {verdict: verdicts[verdict] for verdict in VERDICTS if verdicts[verdict]},
        "complete": not verdicts["infra_error"],
        "rules": dict(Counter(result["rule"] for result in results).most_common()),
        "missing_modules": _missing_modules(results),
        "judged_in_process": sum(result["oracle"] == "in_process" for result in results),
        "lengths": {measure: spread([result[measure] for result in results]) for measure in MEASURES},
        "truncated": sum(result["finish_reason"] == "length" for result in results),
        "prompt_too_long": sum(result["finish_reason"] == "prompt_too_long" for result in results),
        "repetitive": sum(result["repetitive"] for result in results),
    }


def _missing_modules(results: Iterable[Record]) -> dict[str, int]:
    """Module -> answers that failed because it is not there, the most wanted first."""
    found = (_MISSING_MODULE.match(result["detail"]) for result in results if result["verdict"] == "exception")
    return dict(Counter(module[1] for module in found if module).most_common())


def _pass_at_1(counts: Sequence[tuple[int, int]]) -> Interval:
    if all(total == 1 for _, total in counts):
        return wilson(sum(passed for passed, _ in counts), len(counts))
    if len(counts) == 1:  # nothing is known about other problems
        return Interval(counts[0][0] / counts[0][1], 0.0, 1.0)
    return mean_interval([passed / total for passed, total in counts])
