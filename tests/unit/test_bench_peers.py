"""The benchmark against peers: engines take turns, and one that computes another function is not timed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tools.peers import bench as tool

IDS = [1, 2, 3, 4]


class FakeEngine:
    def __init__(self, name, precision, logits, log, seconds=(1.0,)):
        self.name, self.precision, self.logits, self.log, self.error = name, precision, logits, log, 0.0
        self.seconds = itertools.cycle(seconds)

    def run(self, ids, steps, logits=None):
        self.log.append(self.name)
        if logits is not None:
            np.save(logits, self.logits)
        return {"prefill": next(self.seconds), "decode": [0.5] * steps, "rss_gib": 1.0}


def test_engines_take_turns_and_the_first_repetition_does_not_count():
    log = []
    first = FakeEngine("first", "float32", None, log, seconds=(100.0, 2.0, 2.0, 2.0))
    rows = tool.measure([first, FakeEngine("second", "int8", None, log)], IDS, 2, 3)
    assert log == ["first", "second"] * 4
    assert rows[0]["tokens_per_s"] == len(IDS) / 2.0
    assert rows[1]["tokens_per_s"] == 2.0
    assert [row["phase"] for row in rows] == ["prefill", "decode"] * 2


@pytest.mark.parametrize("precision", tool.LARGEST_ERROR)
def test_logits_further_away_than_the_precision_allows_end_the_run(precision, tmp_path):
    reference = np.ones(100, np.float32)
    limit = tool.LARGEST_ERROR[precision]
    near = FakeEngine("near", precision, reference * (1 + 0.9 * limit), [])
    tool.check([FakeEngine("reference", "float32", reference, []), near], IDS, tmp_path)
    assert near.error == pytest.approx(0.9 * limit, rel=1e-2)
    far = FakeEngine("far", precision, reference * (1 + 1.1 * limit), [])
    with pytest.raises(SystemExit, match="far: logits are"):
        tool.check([FakeEngine("reference", "float32", reference, []), far], IDS, tmp_path)


def test_logits_that_are_not_numbers_end_the_run(tmp_path):
    engines = [FakeEngine(name, "float32", value, []) for name, value in (("a", np.ones(3)), ("b", np.full(3, np.nan)))]
    with pytest.raises(SystemExit, match="b: logits"):
        tool.check(engines, IDS, tmp_path)
