"""One entry for each task, mode and decoding of a run: the score with its interval, what became of the samples, their
lengths, and how many loop or think without end."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ms_pangu_quant.evaluation.lengths import spread
from ms_pangu_quant.evaluation.samples import Record
from ms_pangu_quant.evaluation.statistics import Interval, mean_interval, pass_at_k, wilson
from ms_pangu_quant.evaluation.tasks.task import Problems
from ms_pangu_quant.evaluation.verdict import PASS, UNCLOSED, VERDICTS

KS = (1, 5, 10, 100)
_MISSING_MODULE = re.compile(r"ModuleNotFoundError: No module named '([^'.]+)")
MEASURES = ("tokens", "thought_tokens", "answer_tokens", "words", "thought_words", "answer_words")
Told = Callable[[Record], bool | None]  # of a result; None where it says nothing


def passes(result: Record) -> bool | None:
    return None if result["verdict"] == "infra_error" else result["verdict"] == PASS


def loops(result: Record) -> bool | None:
    """Whether its end repeats, as of lengths.Tail."""
    return result.get("repetitive")


def thinks_on(result: Record) -> bool:
    """Whether it began a thought that had not ended where the answer did."""
    return bool(result["verdict"] == UNCLOSED)


FAULTS: dict[str, Told] = {"loops": loops, "unclosed_thoughts": thinks_on}


def summarize(results: Sequence[Record], samples: Sequence[Record], tasks: Mapping[str, Problems]) -> list[Record]:
    """results and samples in the same order. Entries in the order of tasks, then of the modes' first appearance."""
    entries = []
    for name, problems in tasks.items():
        mine = [
            (result, sample)
            for result, sample in zip(results, samples, strict=True)
            if sample.get("task", name) == name and result.get("task", name) == name
        ]
        for group in dict.fromkeys(map(_group, (result for result, _ in mine))):
            chosen = [(result, sample) for result, sample in mine if _group(result) == group]
            entries.append(_entry(name, group, problems, [pair[0] for pair in chosen], [pair[1] for pair in chosen]))
    return entries


def _group(result: Record) -> tuple[str | None, str | None]:
    """(mode, decoding): answers that were drawn in another way are of another distribution."""
    return result.get("mode"), result.get("decoding")


def scores(results: Iterable[Record], told: Told = passes) -> dict[str, float]:
    """task_id -> share of its samples that pass, or of which `told` is true; a problem without any of which it is known,
    such as one whose every sample is an infra_error, has none."""
    return {task_id: true / total for task_id, (true, total) in _counts(results, told).items()}


def _counts(results: Iterable[Record], told: Told) -> dict[str, tuple[int, int]]:
    counts: dict[str, tuple[int, int]] = {}
    for result in results:
        found = told(result)
        if found is not None:
            true, total = counts.get(str(result["task_id"]), (0, 0))
            counts[str(result["task_id"])] = true + bool(found), total + 1
    return counts


def share(results: Iterable[Record], told: Told) -> Interval | None:
    """Over the problems, whatever number of samples each has; None where it is known of none."""
    counts = [*_counts(results, told).values()]
    if not counts:
        return None
    if all(total == 1 for _, total in counts):
        return wilson(sum(true for true, _ in counts), len(counts))
    if len(counts) == 1:  # nothing is known about other problems
        return Interval(counts[0][0] / counts[0][1], 0.0, 1.0)
    return mean_interval([true / total for true, total in counts])


def _entry(
    name: str,
    group: tuple[str | None, str | None],
    problems: Problems,
    results: Sequence[Record],
    samples: Sequence[Record],
) -> dict[str, Any]:
    counts = _counts(results, passes)
    shares = {fault: share(results, told) for fault, told in {"pass@1": passes, **FAULTS}.items()}
    intervals = {fault: None if found is None else asdict(found) for fault, found in shares.items()}
    least = min((total for _, total in counts.values()), default=0)
    verdicts = Counter(result["verdict"] for result in results)
    return {
        "task": name,
        "title": problems.task.title,
        "mode": group[0],
        "decoding": group[1],
        "max_new_tokens": sorted({sample["settings"]["max_new_tokens"] for sample in samples if _has_limit(sample)}),
        "prompts": sorted({str(sample["prompt"]) for sample in samples if "prompt" in sample}),
        "data_sha256": problems.sha256,
        "problems": len(counts),
        "of": len(problems.by_id),
        "samples": len(results),
        "passed": verdicts[PASS],
        **intervals,
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


def _has_limit(sample: Record) -> bool:
    settings = sample.get("settings")
    return isinstance(settings, dict) and isinstance(settings.get("max_new_tokens"), int)
