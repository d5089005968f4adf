"""What is taken by the clock: a fake one, so that no test depends on the machine."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from nformer_edge.backends import base, choice
from nformer_edge.backends.build import build_engine, describe_engine
from nformer_edge.backends.choice import Choice, Timed, choose_backends, fastest, is_faster, take_turns
from nformer_edge.backends.open import open_model, self_test
from nformer_edge.backends.spec import EngineSpec
from nformer_edge.core.errors import BackendError, UsageError
from nformer_edge.quantize.evaluator import Evaluator
from nformer_edge.quantize.prepare import CalibrationData
from nformer_edge.quantize.values import Score


@pytest.fixture(scope="module")
def people(tiny_market, tmp_path_factory):
    """Its training images as those of 12 people: enough to hold two out."""
    folder = tmp_path_factory.mktemp("people")
    shutil.copytree(tiny_market, folder, dirs_exist_ok=True)
    for file in list((folder / "bounding_box_train").iterdir()):
        pid, shot = int(file.name[:4]), int(file.name[10:16])
        file.rename(file.with_name(f"{2 * pid + shot:04d}{file.name[4:]}"))
    return folder


@pytest.fixture
def two_backends(monkeypatch):
    """onnxruntime, and a second backend on the CPU that runs the same files."""
    monkeypatch.setattr(base, "PACKAGES", ["nformer_edge.backends.onnxruntime", "helpers.toy_backend"])


@pytest.fixture
def clock(monkeypatch):
    """Sets what a run takes, by backend and by precision; the real run happens all the same."""

    def set_to(**factors):
        def seconds(run):
            run()
            engine = run.func.__self__._model.manifest
            return factors.get(engine.backend.partition("-")[0], 1.0) * factors.get(engine.spec.precision, 1.0) / 1000

        monkeypatch.setattr(choice, "seconds_of", seconds)

    return set_to


def row_of(found, name):
    """The row of an engine's name."""
    return next(row for row in found.tried if row.name == name)


@pytest.mark.parametrize(("toy", "winner"), [(0.5, "toy-backend"), (2.0, "onnxruntime")])
def test_of_two_backends_on_the_cpu_the_faster_one_is_taken(toy, winner, two_backends, clock, tiny_bundle, tmp_path):
    clock(toy=toy)
    engine = build_engine(tiny_bundle, tmp_path / "engine")
    found = describe_engine(engine)
    assert (found.backend, found.why) == (winner, "by the clock")
    as_it_is = [row for row in found.choice.tried if not row.form]
    assert [row.name for row in as_it_is] == ["onnxruntime fp32", "toy-backend fp32"]
    assert as_it_is[1].speed_up == pytest.approx(1 / toy)
    assert not (engine / "tried").exists()
    with open_model(engine) as runner:
        self_test(runner)


def test_equally_fast_backends_leave_the_first(two_backends, clock, tiny_bundle, tmp_path):
    clock()
    assert describe_engine(build_engine(tiny_bundle, tmp_path / "engine")).backend == "onnxruntime"


def test_a_backend_that_cannot_build_this_is_named_and_the_other_one_taken(two_backends, tiny_bundle, tmp_path, clock):
    clock()
    spec = EngineSpec(precision="int8", calib_num=4, calib_method="minmax")
    names, why = choose_backends("auto", "int8")
    assert names == ("onnxruntime",)
    assert "toy-backend: no int8 on this backend" in why
    with pytest.raises(UsageError, match="calib_data: got none"):
        build_engine(tiny_bundle, tmp_path / "engine", spec)


@pytest.mark.parametrize("int8", [0.5, 2.0])
def test_int8_that_is_slower_than_fp32_is_said_with_both_times(int8, clock, tiny_bundle, tiny_market, tmp_path):
    clock(int8=int8)
    spec = EngineSpec("onnxruntime", "int8", calib_num=4, calib_method="minmax")
    found = describe_engine(build_engine(tiny_bundle, tmp_path / "engine", spec, tiny_market))
    assert found.precision["backbone"] == "int8"
    said = "int8 is slower than FP32 here: 2.00 ms against 1.00 ms of onnxruntime fp32, batch 8"
    assert (said in str(found)) == (int8 > 1)


def test_any_precision_takes_the_fastest_within_the_budget(clock, tiny_bundle, people, tmp_path, monkeypatch):
    clock(int8=0.5)
    spec = EngineSpec("onnxruntime", "auto", calib_num=4, calib_method="minmax", batch=(1, 2, 4))
    lost = {}
    score = lambda self, _: dict.fromkeys(self.scopes, Score(0.5, 0.5, lost["mAP"], lost["mAP"], 1.0))  # noqa: E731
    monkeypatch.setattr(Evaluator, "engine_score", score)
    for points, taken in ((0.001, "int8"), (0.2, "fp32")):
        lost["mAP"] = points
        engine = build_engine(tiny_bundle, tmp_path / taken, spec, people)
        found = describe_engine(engine)
        assert found.precision["backbone"] == taken
        assert found.choice.batch == 2
        assert row_of(found.choice, "onnxruntime int8").note == (
            "" if taken == "int8" else "not at most 1 points of mAP lost"
        )
        assert Choice.from_json(json.loads(json.dumps(found.choice.to_json()))) == found.choice
        assert (engine / "calibration.json").exists() == (taken == "int8")


def test_any_precision_never_takes_what_is_slower_than_fp32(clock, tiny_bundle, people, tmp_path):
    clock(int8=1.5)
    spec = EngineSpec("onnxruntime", "auto", calib_num=4, calib_method="minmax")
    found = describe_engine(build_engine(tiny_bundle, tmp_path / "engine", spec, people))
    assert found.precision["backbone"] == "fp32"
    assert row_of(found.choice, "onnxruntime int8").score is not None


def test_any_precision_needs_images_to_judge_by(tiny_bundle, tmp_path):
    with pytest.raises(UsageError, match="calib_data: got none"):
        build_engine(tiny_bundle, tmp_path / "engine", EngineSpec("onnxruntime", "auto"))


def test_a_budget_without_int8_is_still_refused(tiny_bundle, tiny_market, tmp_path):
    from nformer_edge.quantize.spec import BudgetSpec

    with pytest.raises(UsageError, match="a budget for fp32"):
        build_engine(
            tiny_bundle, tmp_path / "e", EngineSpec("onnxruntime"), CalibrationData(tiny_market, budget=BudgetSpec(1.0))
        )


def test_nothing_to_choose_is_nothing_timed(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "seconds_of", lambda run: pytest.fail("it was timed"))
    assert describe_engine(build_engine(tiny_bundle, tmp_path / "e", EngineSpec("onnxruntime"))).choice is None


def runs(*milliseconds):
    """Runs that take what their tables say, round by round, and a clock that reads them."""
    tables = [iter(np.resize(np.atleast_1d(ms), 40)) for ms in milliseconds]
    return tables, lambda table: next(table) / 1000


def test_timing_ends_when_the_fastest_is_known():
    assert take_turns(*runs(2.0, 1.0, 3.0)).shape == (3, 7)
    assert take_turns(*runs([1.0, 1.1, 1.2], [1.1, 1.0, 1.2])).shape == (2, 31)  # each wins in turn


class Machine:
    """A clock, and the seconds that a process computes: its runs, and its threads until `spins_until`."""

    def __init__(self):
        self.now = self.used = self.spins_until = 0.0
        self.begun = []

    def sleep(self, seconds):
        self.used += min(seconds, max(0.0, self.spins_until - self.now))
        self.now += seconds

    def perf_counter(self):
        return self.now

    def process_time(self):
        return self.used

    def run(self, spins=0.0):
        self.begun.append(self.now)
        self.now += 0.006
        self.used += 0.006
        self.spins_until = self.now + spins


def test_an_engine_is_not_timed_while_threads_of_another_one_spin(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(choice, "time", machine)
    choice.seconds_of(lambda: machine.run(spins=0.032))
    spins_until = machine.spins_until
    machine.begun.clear()
    assert choice.seconds_of(machine.run) == pytest.approx(0.006)
    assert machine.begun[0] >= spins_until
    assert np.diff(machine.begun) == pytest.approx([0.006] * 4)  # runs in a row, of which the last one counts


def test_a_process_that_never_rests_is_timed_all_the_same(monkeypatch):
    machine = Machine()
    machine.spins_until = 1e9
    monkeypatch.setattr(choice, "time", machine)
    assert choice.seconds_of(machine.run) == pytest.approx(0.006)


def test_the_first_stays_unless_another_is_surely_faster():
    first, other = np.full(7, 2.0), np.full(7, 1.0)
    assert fastest([first, other, np.full(7, 1.5)]) == 1
    assert fastest([other, first]) == 0
    mixed = np.array([1.0] * 6 + [9.0])  # its median is the smaller one, but it lost a round of seven
    assert np.median(mixed) < np.median(first)
    assert fastest([first, mixed]) == 0
    assert is_faster(other, first)
    assert not is_faster(first, first)


def test_a_table_says_what_was_not_taken_and_why():
    tried = (
        Timed("a", "fp32", 2.0, 1.0),
        Timed("b", "int8", 1.0, 2.0, Score(0.8, 0.9, 0.05, 0.06, 0.9), "not at most 1 points of mAP lost"),
        Timed("c", "fp16", note="precision: got fp16 on this CPU"),
    )
    text = str(Choice("a CPU", 8, 7, None, tried, 0))
    assert "2.00 ms   1.00 x  <- taken" in text
    assert "5.00 points of mAP lost  overlap@10 0.900  (not at most" in text
    assert text.endswith("(precision: got fp16 on this CPU)")


def test_a_precision_that_a_backend_does_not_have_is_refused_by_name(tiny_bundle, tmp_path):
    with pytest.raises(BackendError, match=r"bf16 for onnxruntime, expected fp32 \| int8"):
        build_engine(tiny_bundle, tmp_path / "e", EngineSpec("onnxruntime", "bf16"))
