"""tune/: the search on made-up candidates, whose KL and pass@1 are known, and what it stands on."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from ms_pangu_quant.calibration.data import TokenData
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.cli import main
from ms_pangu_quant.errors import DataError, OutputError, RequestError
from ms_pangu_quant.evaluation.statistics import retention
from ms_pangu_quant.recipe.parse import parse_recipe
from ms_pangu_quant.report.tuning import write_tuning
from ms_pangu_quant.tune.budget import Clock
from ms_pangu_quant.tune.candidates import plain, served_on, shipped
from ms_pangu_quant.tune.history import FILE, History
from ms_pangu_quant.tune.job import TuneRequest, TuneResult, check_room, conclusions, unseen
from ms_pangu_quant.tune.measurements import Measurements, _slug
from ms_pangu_quant.tune.page import page_of
from ms_pangu_quant.tune.retention import compared, least_problems, problems_needed
from ms_pangu_quant.tune.search import MIXED, RESOLUTION, Option, Outcome, OutOfBudget, Trial, search_kl, search_retention
from ms_pangu_quant.tune.target import Divergence, Target, parse_duration, parse_target
from tests.conftest import MINI

FEW, TEXTS = 8, 32
GROUPS = 40


def size(option):
    return (option.nbytes,)


@dataclass
class Model:
    """A made-up model: KL of its schemes, and of mixtures, which the curve predicts wrongly by a power."""

    seed: int = 0
    dear: float = 0.005
    cheap: float = 0.09
    power: float = 1.3
    spread: float = 0.4
    gains: np.ndarray = field(init=False)
    asked: list = field(default_factory=list)
    kept: list = field(default_factory=list)
    budget: int = 10**9  # questions
    bits: dict = field(default_factory=lambda: {"w8a8": 8.0, "w4a8_g64": 4.5, "w4a8": 4.05})

    def __post_init__(self):
        draw = np.random.default_rng(self.seed).lognormal(0, 1.2, GROUPS)
        self.gains = np.sort(draw / draw.sum())[::-1]

    def predicted(self, base, raised):
        """KL with the best so many groups raised."""
        low = self.kl(base)
        return low - float(self.gains[:raised].sum()) * (low - self.dear)

    def kl(self, option):
        if option.predicted is None:
            return {"w8a8": self.dear, "w4a8": self.cheap, "w4a8_g64": 0.7 * self.cheap}[option.name]
        return self.dear * (option.predicted / self.dear) ** self.power

    def question(self, *what):
        assert what not in self.asked
        if len(self.asked) >= self.budget:
            raise OutOfBudget(f"before {what}")
        self.asked.append(what)

    # --- a Measurer ---

    def uniform(self):
        self.question("blocks")
        return [self.option(name, bits, math.sqrt(self.kl(Option(name, 0, 0)))) for name, bits in self.bits.items()]

    def option(self, name, bits, block_error=None, predicted=None):
        return Option(name, bits, round(bits * 1e6), None, block_error, predicted)

    def divergence(self, option, *, few):
        if ("kl", option.name, "few") not in self.asked:
            self.question("kl", option.name, "few")
        if not few:
            self.question("kl", option.name, "more")
        each = np.random.default_rng(self.seed + 1).lognormal(0, self.spread, TEXTS)
        sums = self.kl(option) * 500 * each / each.mean()
        return Divergence(tuple(sums), (500,) * TEXTS) if not few else Divergence(tuple(sums[:FEW]), (500,) * FEW)

    def curve(self, base):
        self.question("curve", base.name)
        return Fine(self, base)

    def settled(self, kept):
        self.kept.append(kept and kept.name)


@dataclass
class Fine:
    model: Model
    base: Option

    def made(self, raised):
        bits = self.base.bits + (8.0 - self.base.bits) * raised / GROUPS
        return self.model.option(f"{self.base.name}+{raised}", bits, None, self.model.predicted(self.base, raised))

    @property
    def ends(self):
        return self.model.predicted(self.base, 0), self.model.predicted(self.base, GROUPS)

    def at(self, kl):
        return next((self.made(n) for n in range(GROUPS + 1) if self.model.predicted(self.base, n) <= kl), None)

    def within(self, bits):
        fit = [n for n in range(GROUPS + 1) if self.made(n).bits <= bits]
        return self.made(fit[-1]) if fit else None


def model_of(seed):
    return Model(seed, dear=0.005 * 2 ** (seed % 3 - 1), power=0.6 + 0.25 * (seed % 5))


@pytest.mark.parametrize("limit", [0.008, 0.02, 0.05, 0.5])
@pytest.mark.parametrize("seed", range(20))
def test_the_winner_meets_the_target_and_none_that_was_measured_to_meet_it_is_cheaper(seed, limit):
    model = model_of(seed)
    found = search_kl(model, limit, size)
    met = [each for each in found.trials if each.verdict == "meets"]
    assert all(each.divergence.upper <= limit for each in met)
    assert all(each.divergence.lower > limit for each in found.trials if each.verdict == "fails")
    assert all(
        each.divergence.upper > limit >= each.divergence.lower for each in found.trials if each.verdict == "undecided"
    )
    if found.winner is None:
        assert not met
        assert model_of(seed).divergence(found.closest.option, few=True).upper > limit
        return
    assert found.winner in [each.option for each in met]
    assert size(found.winner) == min(size(each.option) for each in met)
    assert len({each.option.name for each in found.trials}) == len(found.trials) <= 3 + MIXED
    assert model.kept[-1] == found.winner.name or model.kept[-1] in {each.option.name for each in met}


@pytest.mark.parametrize("seed", range(20))
def test_few_mixtures_find_one_that_is_near_the_smallest_of_the_curve(seed):
    limit, again = 0.03, model_of(seed)
    found = search_kl(model_of(seed), limit, size)
    base = found.winner.name.partition("+")[0]
    curve = Fine(again, next(each.option for each in found.trials if each.option.name == base))
    least = min(
        (curve.made(n).bits for n in range(GROUPS + 1) if again.kl(curve.made(n)) * bound_over_mean(seed) <= limit),
        default=8.0,
    )
    assert found.winner.bits <= least + RESOLUTION + 4 * (8 - 4.05) / GROUPS


@pytest.mark.parametrize("spread", [0.8, 1.2, 1.6])
def test_where_the_line_leads_to_failures_alone_what_is_left_is_halved(spread, monkeypatch):
    """As on a real model: what is predicted falls with the first layers that are raised, what is measured evenly."""

    class Even(Model):
        def kl(self, option):
            if option.predicted is None:
                return super().kl(option)
            return self.dear + 0.0154 * (8 - option.bits) + 0.03 * max(0, 7 - option.bits)

    monkeypatch.setitem(globals(), "GROUPS", 400)
    found = search_kl(Even(dear=0.0054, cheap=0.12, spread=spread), 0.02, size)
    assert found.winner.bits < 7.6


def test_what_was_settled_goes_when_the_next_is_quantized_and_no_sooner(tmp_path):
    """A resumed search first settles what it had settled before, when a later candidate lies there already."""
    options = [Option(name, 8, 8) for name in ("w8a8", "w4a8+1", "w4a8+2")]
    for each in options[:2]:
        (tmp_path / "candidates" / _slug(each.name)).mkdir(parents=True)
    measurements = Measurements.__new__(Measurements)
    measurements._folder = tmp_path
    measurements.settled(options[0])
    measurements.settled(options[1])
    measurements._make_room(options[2])
    assert [path.name for path in (tmp_path / "candidates").iterdir()] == [_slug("w4a8+1")]


def bound_over_mean(seed):
    found = model_of(seed).divergence(Option("w8a8", 8, 8), few=False)
    return found.upper / found.mean


def test_a_target_beyond_the_most_accurate_scheme_ends_there_and_says_who_came_closest():
    model = Model(dear=0.005)
    found = search_kl(model, 0.001, size)
    assert found.winner is None
    assert found.closest.option.name == "w8a8"
    assert [name for what, name, *_ in (each for each in model.asked if len(each) > 1)] == ["w8a8"]


def test_the_cheapest_scheme_that_meets_it_ends_the_search_without_sensitivities():
    model = Model(dear=0.00006, cheap=0.0005)
    found = search_kl(model, 0.001, size)
    assert found.winner.name == "w4a8"
    assert {each[1] for each in model.asked if len(each) > 1} == {"w8a8", "w4a8"}


def test_schemes_whose_blocks_promise_nothing_are_not_measured():
    model = Model(dear=0.001, cheap=1.0)
    found = search_kl(model, 0.002, size)
    assert {each.option.name for each in found.trials if each.verdict == "dropped"} == {"w4a8", "w4a8_g64"}
    assert not [each for each in model.asked if each[:2] in (("kl", "w4a8"), ("kl", "w4a8_g64"))]


@pytest.mark.parametrize("budget", range(12))
def test_a_spent_budget_ends_with_the_best_so_far(budget):
    whole, model = Model(seed=3), Model(seed=3, budget=budget)
    search_kl(whole, 0.02, size)
    found = search_kl(model, 0.02, size)
    assert model.asked == whole.asked[:budget]
    if budget < len(whole.asked):
        assert found.stopped == f"before {whole.asked[budget]}"
    met = [each.option for each in found.trials if each.verdict == "meets"]
    assert found.winner == min(met, key=size, default=None)


class Killed(BaseException):
    pass


class Kept:
    """A Measurer that keeps answers in a History, as Measurements does."""

    def __init__(self, model, folder):
        self.model, self.history = model, History(folder, {"seed": model.seed})

    def uniform(self):
        made = self.history.ask("blocks", lambda: {"options": [vars(each) for each in self.model.uniform()]})
        return [Option(**each) for each in made["options"]]

    def divergence(self, option, *, few):
        def answer(part):
            found = self.model.divergence(option, few=part == "few")
            return {"sums": found.sums, "tokens": found.tokens}

        parts = [self.history.ask("kl", lambda: answer("few"), candidate=option.name, texts="few")]
        if not few:
            parts.append(self.history.ask("kl", lambda: answer("more"), candidate=option.name, texts="more"))
        return Divergence(tuple(parts[-1]["sums"]), tuple(parts[-1]["tokens"]))

    def curve(self, base):
        self.history.ask("curve", lambda: {"base": self.model.curve(base).base.name}, candidate=base.name)
        return Fine(self.model, base)

    def settled(self, kept):
        pass


def test_a_killed_search_asks_nothing_twice_and_ends_as_an_undisturbed_one(tmp_path):
    whole = Model(seed=3)
    (tmp_path / "whole").mkdir()
    expected = search_kl(Kept(whole, tmp_path / "whole"), 0.02, size)
    for stop in range(1, len(whole.asked)):
        folder = tmp_path / str(stop)
        folder.mkdir()
        model = Model(seed=3)
        model.question = killing(model, stop)
        with pytest.raises(Killed):
            search_kl(Kept(model, folder), 0.02, size)
        with open(folder / FILE, "ab") as file:
            file.write(b'{"step": "kl", "of')  # a line that was being written
        model.question = Model.question.__get__(model)
        found = search_kl(Kept(model, folder), 0.02, size)
        assert model.asked == whole.asked  # question() refuses what was asked before
        assert found == expected
        assert (folder / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def killing(model, stop):
    def question(*what):
        if len(model.asked) == stop:
            raise Killed
        model.asked.append(what)

    return question


def test_a_history_of_another_search_is_refused_and_so_is_one_that_is_damaged(tmp_path):
    History(tmp_path, {"target": "kl<=0.01"})
    with pytest.raises(OutputError, match="begun with another target"):
        History(tmp_path, {"target": "kl<=0.02"})
    (tmp_path / FILE).write_bytes(b"not JSON\n")
    with pytest.raises(OutputError, match="line 1 is not JSON"):
        History(tmp_path, {"target": "kl<=0.01"})


# --- retention ------------------------------------------------------------------------------------------------------


class Exam(Model):
    """lost: candidate -> share of the problems that the float model passes and it does not."""

    def __init__(self, problems, lost, passes=0.9, **settings):
        super().__init__(**settings)
        self.count, self.lost, self.passes, self.limits = problems, lost, passes, []

    def problems(self):
        return self.count

    def scores(self, option, limit):
        self.limits.append((option and option.name, limit))
        count = min(limit or self.count, self.count)
        reference = np.arange(self.count) % 10 < 10 * self.passes
        lost = 0.0 if option is None else self.lost.get(option.name, 0.0)
        drawn = np.random.default_rng(5).random(self.count) < lost
        return dict(enumerate((reference & ~drawn).astype(float)[:count]))


def test_too_few_problems_for_the_target_are_told_before_anything_is_asked():
    exam = Exam(164, {})
    found = search_retention(exam, 0.99, size)
    assert found.winner is None
    assert "even a candidate that loses none takes 299" in found.stopped
    assert not exam.limits
    assert not exam.asked


def test_what_a_pilot_foresees_as_undecidable_is_not_asked_in_full():
    exam = Exam(400, {"w8a8": 0.1})
    found = search_retention(exam, 0.99, size)
    assert found.winner is None
    assert {limit for _, limit in exam.limits} == {60}
    assert "no number of them" in found.stopped


def test_candidates_are_tested_from_the_most_accurate_down_until_one_is_not_shown():
    exam = Exam(2000, {"w4a8_g64": 0.2, "w4a8": 0.2})
    found = search_retention(exam, 0.98, size)
    assert [each.verdict for each in found.trials] == ["meets", "meets", "fails"]
    assert found.winner.name.startswith("w4a8+")
    assert ("w4a8", 60) not in exam.limits


def test_what_costs_more_than_the_best_so_far_is_not_tested():
    exam = Exam(2000, {})
    exam.bits = {"w8a8": 8.0, "w4a8": 4.5, "w4a8_g64": 4.8}  # the more accurate one costs less
    exam.kl = lambda option: {"w8a8": 0.005, "w4a8": 0.03, "w4a8_g64": 0.06}.get(option.name, 0.01)
    found = search_retention(exam, 0.98, size)
    assert found.winner.name == "w4a8"
    assert "w4a8_g64" not in {each.option.name for each in found.trials}


def test_the_least_number_of_problems_is_the_tests_own():
    """Where nothing is lost retention()'s p is wanted^(n + 1) up to resampling."""
    least = least_problems(0.95)
    assert least == 59  # 0.95^58 > 0.05 >= 0.95^59
    assert retention([1.0] * (least - 8), [1.0] * (least - 8), 0.95).p > 0.05
    assert retention([1.0] * (least + 8), [1.0] * (least + 8), 0.95).p <= 0.05


def test_as_many_problems_as_are_said_to_be_needed_show_it_about_four_times_in_five():
    generator = np.random.default_rng(0)

    def drawn(count):
        reference = (generator.random(count) < 0.8).astype(float)
        new = np.where(generator.random(count) < 0.03, 1 - reference, reference)
        return reference, new

    a, b = drawn(20_000)
    needed = problems_needed(dict(enumerate(a)), dict(enumerate(b)), 0.93)
    shown = [retention(*map(list, drawn(needed)), 0.93).p <= 0.05 for _ in range(60)]
    assert 0.65 <= np.mean(shown) <= 0.95, needed


def test_a_candidate_that_loses_more_than_is_allowed_needs_no_number_of_problems():
    reference, new = dict.fromkeys(range(100), 1.0), dict.fromkeys(range(100), 1.0) | {0: 0.0, 1: 0.0}
    assert problems_needed(reference, new, 0.99) is None
    assert problems_needed(reference, new, 0.99, forgiven=2) == pytest.approx(299, rel=0.06)
    assert not compared(reference, new, 0.99).kept


# --- what it stands on ----------------------------------------------------------------------------------------------


def test_bounds_are_students_over_texts_and_sums_of_texts_add_up():
    from scipy import stats

    values = np.array([0.011, 0.02, 0.008, 0.015, 0.01])
    found = Divergence(tuple(values * 100), (100,) * 5)
    interval = stats.ttest_1samp(values, 0.0, alternative="less").confidence_interval(0.95)
    assert found.upper == pytest.approx(interval.high, rel=1e-12)
    assert found.mean == pytest.approx(values.mean())
    assert Divergence(found.sums[:2], found.tokens[:2]) + Divergence(found.sums[2:], found.tokens[2:]) == found
    assert Divergence((1.0,), (100,)).upper == math.inf


@pytest.mark.parametrize(("text", "seconds"), [("4h", 14400), ("90m", 5400), ("30s", 30), ("1h30m", 5400), ("0.5h", 1800)])
def test_times_are_read(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "4", "h", "-4h", "4h x", "0s", "4 h"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(RequestError, match="--budget"):
        parse_duration(text)


def test_targets_are_read():
    assert parse_target("kl<=0.01") == Target("kl", 0.01)
    assert parse_target(" retention >= 0.99 ") == Target("retention", 0.99)
    assert str(parse_target("kl<=1e-3")) == "kl<=0.001"


@pytest.mark.parametrize("text", ["", "kl", "kl>=0.01", "kl<=0", "kl<=x", "retention<=0.9", "retention>=1", "ppl<=3"])
def test_what_is_no_target_is_refused(text):
    with pytest.raises(RequestError, match="--target"):
        parse_target(text)


def test_a_step_that_would_go_beyond_the_budget_is_not_begun():
    now = 0.0
    clock = Clock(100.0, lambda: now)
    with clock.step("a", 2, 30.0):
        now = 50.0
    with pytest.raises(OutOfBudget, match="a, which takes about 75 s"):
        clock.step("a", 3).__enter__()
    with clock.step("a", 2):  # as long as the last one
        now = 99.0
    with pytest.raises(OutOfBudget):
        clock.step("b", 1, 2.0).__enter__()
    clock.release()
    with clock.step("b", 1, 2.0):
        pass


def test_only_schemes_that_fit_and_that_the_device_multiplies_in_integers_are_candidates():
    config = ModelConfig.from_file(MINI / "config.json")
    on_npu, notes = shipped(config, served_on("atlas_a2"), kv_cache=False)
    assert [*on_npu] == ["w8a8", "w4a8", "w4a8_g256"]
    assert set(notes) == {"w4a8_g128", "w4a8_g64"}
    on_cpu, _ = shipped(config, served_on("cpu"), kv_cache=True)
    assert [*on_cpu] == ["w8a8", "w4a8", "w4a8_g256", "w4a8_g128", "w4a8_g64"]
    assert all(recipe.kv_cache for recipe in on_cpu.values())


def test_a_plain_recipe_is_what_its_text_says_and_leaves_nothing_open():
    undecided = parse_recipe("scheme: w4a8\ntransforms: auto\nrounding: {gptq: {damping: 0.1}}", "recipe")
    decided = undecided.decided("rotate, smooth_search", "measured")
    made = plain(decided, "mixed", "kl<=0.01", {"model.layers.0.mlp.down_proj": "w8a8"})
    again = parse_recipe(made.text, "file")
    assert again.digest == made.digest
    assert parse_recipe(f"{undecided.text.replace('auto', '[rotate, smooth_search]')}", "").digest == (
        parse_recipe(made.text.replace("model.layers.0.mlp.down_proj: w8a8", "{}"), "").digest
    )
    assert again.layers == (("model.layers.0.mlp.down_proj", "w8a8"),)
    assert not again.choices
    assert not again.decision


def test_requests_that_do_not_fit_together_and_full_folders_are_refused(tmp_path):
    files = {"calibration": "c.jsonl", "validation": "v.jsonl", "output": tmp_path}
    with pytest.raises(RequestError, match="takes --tasks"):
        TuneRequest(MINI, "retention>=0.9", **files)
    with pytest.raises(RequestError, match="no roofline"):
        TuneRequest(MINI, "kl<=0.1", **files, prefer="fastest", device="cpu")
    (tmp_path / "mine").touch()
    with pytest.raises(OutputError, match="holds no search"):
        check_room(TuneRequest(MINI, "kl<=0.1", **files))
    (tmp_path / FILE).touch()
    with pytest.raises(OutputError, match="--resume"):
        check_room(TuneRequest(MINI, "kl<=0.1", **files))
    check_room(TuneRequest(MINI, "kl<=0.1", **files, resume=True))


def test_validation_rows_that_are_in_the_calibration_data_are_left_out_and_most_of_them_refused():
    generator = np.random.default_rng(0)
    texts = [generator.integers(3, 999, 80).astype(np.int32) for _ in range(12)]
    part = texts[2][5:70]
    fitted = TokenData(tuple(texts[:6]), "a", 0)

    def left(*rows):
        return unseen(TokenData(rows, "b", 0), fitted)

    assert left(*texts[6:]) == texts[6:]
    assert left(part, *texts[6:]) == texts[6:]
    with pytest.raises(DataError, match="6 of 10 rows"):
        left(part, *texts[:5], *texts[6:10])
    with pytest.raises(DataError, match="has 5 rows that are not in"):
        left(part, *texts[6:11])


def test_what_meets_no_target_ends_with_a_code_of_its_own(tmp_path, monkeypatch, capsys):
    trial = Trial(
        Option("w8a8", 8.05, 4_000_000, 0.01, 0.0118), "fails", "KL 0.02 on 32 texts", Divergence((1.0, 2.0), (90, 90))
    )

    def tune(request, progress):
        progress.on_note("w4a8_g64: not tried")
        progress.on_step("w8a8: quantizing")
        progress.on_part(1, 4)
        progress.on_done("w8a8: quantizing: 8.05 bits", 3.0)
        outcome = Outcome(None, trial, (trial,), None)
        return TuneResult(tmp_path, Target("kl", 0.01), "fastest", False, None, None, None, outcome, ("nothing was shown",))

    monkeypatch.setattr("ms_pangu_quant.api.tune", tune)
    words = [
        "tune",
        str(MINI),
        "--target",
        "kl<=0.01",
        "--calibration",
        "c",
        "--validation",
        "v",
        "--output",
        str(tmp_path),
    ]
    assert main([*words, "--fastest"]) == 1
    shown = capsys.readouterr()
    assert "10.00" in shown.out
    assert "nothing was shown" in shown.out
    assert "1  w8a8: quantizing: 8.05 bits  (3 s)" in shown.err


def test_the_page_tells_every_candidate_and_draws_what_was_measured(tmp_path):
    found = Divergence((1.0, 2.0), (90, 90))
    trials = (
        Trial(Option("w8a8", 8.05, 4_000_000, 0.01, 0.0118), "meets", "KL <0.02> on 2 texts", found),
        Trial(Option("w4a8", 4.05, 2_000_000, 0.009, 0.0411), "dropped", "blocks err"),
        Trial(Option("w4a8+w8a8 5.1", 5.1, 2_500_000, None, None, 0.03), "fails", "KL 0.03 on 2 texts", found),
    )
    outcome = Outcome(trials[0].option, None, trials)
    result = TuneResult(tmp_path, Target("kl", 0.02), "smallest", True, trials[0].option, found, None, outcome)
    result = replace(result, said=tuple(conclusions(result)))
    write_tuning(page_of(result, "atlas_a2"), tmp_path / "tune.html")
    page = (tmp_path / "tune.html").read_text()
    assert all(each.option.name in page for each in trials)
    assert "KL &lt;0.02&gt; on 2 texts" in page
    assert page.count("<svg") == 1
    assert "there the target is missed" not in result.said[-1]
    assert result.said[-1].startswith("final, on 2 texts that chose nothing: KL 0.0167")
