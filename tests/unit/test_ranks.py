"""network/ranks.py: what one rank knows reaches all, in the order of ranks; a rank that ends is named, not waited for."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from ms_pangu_quant.errors import BackendError, RankLostError
from ms_pangu_quant.job import ranks
from ms_pangu_quant.job.ranks import ALONE, Ranks
from ms_pangu_quant.network import runtime
from tests.unit.linked import at_once, linked


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_fold_is_in_the_order_of_ranks_and_the_same_everywhere(size):
    folded = at_once(linked(size), lambda rank: rank.fold(str(rank.rank), lambda one, two: f"({one}{two})"))
    wanted = "0"
    for number in range(1, size):
        wanted = f"({wanted}{number})"
    assert folded == [wanted] * size


def test_gather_and_from_first_give_every_rank_the_same_arrays():
    arrays = [np.full((2, rank + 1), rank + 0.1) for rank in range(3)]
    gathered = at_once(linked(3), lambda rank: rank.gather(arrays[rank.rank]))
    for each in gathered:
        assert [array.tobytes() for array in each] == [array.tobytes() for array in arrays]
    made = at_once(linked(3), lambda rank: rank.from_first(lambda: f"made by {rank.rank}"))
    assert made == ["made by 0"] * 3


def test_alone_nothing_is_asked_of_anyone():
    value = object()
    assert ALONE.fold(value, None) is value
    assert ALONE.gather(value) == [value]
    assert ALONE.from_first(lambda: value) is value
    ALONE.meet()
    ALONE.agree("anything", value)


def test_ranks_that_do_not_agree_say_about_what_and_with_whom():
    errors = at_once(linked(3), lambda rank: rank.agree("checkpoint", "b" if rank.rank == 2 else "a"))
    assert all(isinstance(error, BackendError) and "another checkpoint" in str(error) for error in errors)
    assert "rank 0 and rank 2" in str(errors[0])
    assert "rank 2 and rank 0" in str(errors[2])


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_has_ended_is_named_by_those_that_wait_for_it(dead):
    job = linked(2)
    for link in job[dead].links:
        link.close()
    with pytest.raises(RankLostError, match=f"rank {dead} has ended"):
        job[1 - dead].gather(1)


def test_the_greeting_makes_links_over_tcp(monkeypatch):
    """As in a job, but for the message that MindSpore carries."""
    monkeypatch.setenv("MS_SCHED_HOST", "127.0.0.1")
    monkeypatch.setenv("MS_SCHED_PORT", "9")
    said, heard = [], threading.Event()

    def greet(message):
        if message:
            assert len(message) <= ranks._GREETING
            said.append(message)
            heard.set()
        assert heard.wait(500)
        return said[0]

    def work(rank):
        return ranks.connect(rank.rank, 3, greet).gather(rank.rank * 10)

    assert at_once([Ranks(number, 3) for number in range(3)], work) == [[0, 10, 20]] * 3


def test_a_process_that_msrun_did_not_start_is_one_of_one(monkeypatch):
    monkeypatch.delenv(ranks.ROLE, raising=False)
    assert not ranks.in_job()
    assert ranks.job_size() == 1
    assert ranks.join() is ALONE


@pytest.mark.parametrize(
    ("size", "wanted", "mode", "said"),
    [
        (1, 2, "graph", "got 2, wanted a divisor of the job's 1 ranks"),
        (8, 3, "graph", "got 3, wanted a divisor of the job's 8 ranks"),
        (8, 0, "graph", "got 0"),
        (8, 4, "graph", "over all ranks, in graph mode"),
        (2, 2, "pynative", "over all ranks, in graph mode"),
    ],
)
def test_a_cut_that_the_job_or_the_cpu_does_not_allow_is_named(size, wanted, mode, said, monkeypatch):
    monkeypatch.setattr(ranks, "_current", Ranks(0, size))
    with pytest.raises(BackendError, match=said):
        runtime._cut_networks(wanted, "cpu", mode)
    assert runtime.tensor_parallel() == 1
