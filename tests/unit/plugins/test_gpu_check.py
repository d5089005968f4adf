"""The checks of ``plugins/gpu_check.py``, and with them the kernels, on a GPU that the CPU emulates."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.scripts import PLUGINS, load_script

from nformer_edge.ops.reference import reciprocal_neighbor_attention, row_top_k


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PLUGINS))
    for name in ("gpu_operators", "gpu_times", "gpu_engines"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = load_script("gpu_check")
    monkeypatch.setattr(module.gpu_operators, "DEVICE", "cpu")
    monkeypatch.setattr(module.gpu_operators, "_stream", lambda: ctypes.c_void_p(None))
    return module


def test_the_kernels_pass_the_gpu_checks_on_an_emulated_gpu(gpu_check, emulated_library) -> None:
    kernels = gpu_check.Kernels(emulated_library)
    done = gpu_check.check_exact_top_k(kernels, [(9, 40)])
    done += gpu_check.check_edges(kernels, 300) + gpu_check.check_attention(kernels, 12)
    done += gpu_check.check_gate(kernels, 40)
    assert [name for name, ok in done if not ok] == []
    assert len(done) > 150


@pytest.mark.parametrize(
    ("rows", "columns", "factors", "k"), [(70, 9001, 5, 20), (5, 8600, 16, 100), (70, 130, 20, 33)]
)
def test_the_kernels_agree_with_float64_over_several_blocks_and_tiles(
    gpu_check, emulated_library, rows, columns, factors, k
) -> None:
    kernels = gpu_check.Kernels(emulated_library)
    a, b = gpu_check.integers(1, -3, 4, 2, rows, factors), gpu_check.integers(2, -3, 4, 2, columns, factors)
    assert torch.equal(kernels.row_top_k(a, b, k), gpu_check.reference_top_k(gpu_check.scores_of(a, b), k))


def test_the_gpu_checks_notice_a_wrong_kernel(gpu_check, emulated_library) -> None:
    class Wrong(gpu_check.Kernels):
        def row_top_k(self, a, b, k):
            return super().row_top_k(a, b, k).flip(2)

        def attention(self, *given):
            return super().attention(*given) * 1.01

    wrong = Wrong(emulated_library)
    done = gpu_check.check_exact_top_k(wrong, [(1, 40)]) + gpu_check.check_attention(wrong, 5)
    done += gpu_check.check_gate(wrong, 20)
    failed = [name for name, ok in done if not ok]
    assert any(name.startswith("RowTopK") for name in failed)
    assert any(name.startswith("Attention") for name in failed)
    assert any(name.startswith("Gate") for name in failed)


def test_the_references_of_the_gpu_check_agree_with_the_plain_torch_operators(gpu_check) -> None:
    a, b, v = (gpu_check.draw(seed, 2, 60, size).double() for seed, size in ((1, 5), (2, 5), (3, 16)))
    neighbors = gpu_check.reference_top_k(gpu_check.scores_of(a, a), 7)
    assert torch.equal(neighbors, row_top_k(a, a, 7))
    for lists in (neighbors, neighbors[:1]):
        expected = reciprocal_neighbor_attention(a, b, v, lists, 0.3)
        assert (gpu_check.reference_attention(a, b, v, lists, 0.3) - expected).abs().max() <= 1e-12
        assert (gpu_check.plain_attention(a, b, v, lists, 0.3).double() - expected).abs().max() <= 1e-5
        t, cameras = gpu_check.draw(4, 2, 60).double(), gpu_check.integers(5, -1, 3, 60, dtype=torch.int32)
        for known in (None, cameras):
            expected = reciprocal_neighbor_attention(a, b, v, lists, 0.3, t, known, 0.5)
            assert (gpu_check.reference_gate(a, b, v, lists, 0.3, t, known, 0.5) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("rule", ["features", "affinity"])
def test_a_whole_head_with_the_kernels_equals_the_dense_one(gpu_check, emulated_library, monkeypatch, rule) -> None:
    times = gpu_check.gpu_times

    def median_ms(run, repeats=20):
        run()
        return 1.0

    monkeypatch.setattr(times, "median_ms", median_ms)
    row = times.time_head(gpu_check.Kernels(emulated_library), 70, rule)
    assert row["ok"], row
    assert row["times_faster"] == 1.0


def test_both_operators_complete_at_a_size_and_are_compared(gpu_check, emulated_library, monkeypatch) -> None:
    monkeypatch.setattr(gpu_check.gpu_times, "median_ms", lambda run, repeats=20: run() is None or 1.0)
    row = gpu_check.gpu_times.complete(gpu_check.Kernels(emulated_library), 300)
    assert row["ok"], row


def test_goals_are_met_not_met_or_could_not_be_told(gpu_check) -> None:
    judged = gpu_check.gpu_times.judge(
        [
            {"what": "RowTopK N=19281 R=5 H=2 k=20 torch.float32", "times_the_floor": 2.9},
            {"what": "RowTopK N=19281 R=256 H=1 k=20 torch.float32", "times_the_floor": 9.0},
            {"what": "Attention N=19281 R=5", "times_the_floor": float("nan")},
            {"what": "head N=19281, 4 layers", "times_faster": 19.9},
            {"what": "head N=19281, 4 layers", "skipped": "dense torch: out of memory"},
        ]
    )
    assert [goal["met"] for goal in judged] == [True, None, False, None]


def scripted(fails: str = ""):
    """A command that writes what parity writes, and fails where told."""
    said: list[tuple[str, ...]] = []

    def run(*words: str):
        said.append(words)
        ok = " ".join(words[:3]) != fails and words[0] != fails
        if words[0] == "parity" and ok:
            Path(words[words.index("-o") + 1]).write_text('{"kind": "parity"}')
        return {"step": " ".join(words[:2]), "ok": ok, "code": 0 if ok else 2, "said": ["a line"]}

    return run, said


def test_engines_are_built_and_judged_in_every_precision(gpu_check, tmp_path, monkeypatch, capsys) -> None:
    engines = gpu_check.gpu_engines
    monkeypatch.setattr(engines, "missing", list)
    monkeypatch.setenv("NFORMER_EDGE_PLUGINS", "")
    monkeypatch.setattr(engines, "carries_kernels", lambda: False)
    run, said = scripted()
    result = engines.check_engines(tmp_path, run=run)
    assert [words[0] for words in said] == ["demo", "build-plugin", *["build-engine", "parity", "benchmark"] * 3]
    assert set(result["gates"]) == {"fp32", "fp16", "int8"}
    assert engines.failures(result) == []
    built = [words for words in said if words[0] == "build-engine"]
    assert "--calib-data" in built[2]
    assert "--calib-data" not in built[1]
    engines.show(result)
    assert capsys.readouterr().out.count("ok ") == len(said)


def test_a_gate_of_int8_that_does_not_hold_is_told_and_every_other_fails_the_check(gpu_check, capsys) -> None:
    engines = gpu_check.gpu_engines
    step = {"step": "parity a", "ok": False, "code": 1, "said": ["rank-1 agreement: 0.9 against 0.98"]}
    told = {"steps": [{**step, "required": False}]}
    assert engines.failures(told) == []
    engines.show(told)
    assert "told   parity a" in capsys.readouterr().out
    assert engines.failures({"steps": [step]})
    assert engines.failures({"steps": [{**step, "code": 2, "required": False}]})


def test_a_plugin_that_cannot_be_built_stops_the_engines_and_fails_the_check(gpu_check, tmp_path, monkeypatch) -> None:
    engines = gpu_check.gpu_engines
    monkeypatch.setattr(engines, "missing", list)
    monkeypatch.setenv("NFORMER_EDGE_PLUGINS", "")
    monkeypatch.setattr(engines, "carries_kernels", lambda: False)
    run, said = scripted("build-plugin")
    result = engines.check_engines(tmp_path, run=run)
    assert len(said) == 2
    assert engines.failures(result) == ["build-plugin -o: a line"]
    whole = {"checks": {"failed": []}, "sanitizer": "passed", "engines": result}
    assert gpu_check.failed(whole)
    assert not gpu_check.failed({**whole, "engines": {"skipped": "no package tensorrt"}})


@pytest.mark.parametrize("fails", ["", "build-plugin"])
def test_plans_that_carry_their_kernels_are_judged_too(gpu_check, tmp_path, monkeypatch, fails) -> None:
    engines = gpu_check.gpu_engines
    monkeypatch.setattr(engines, "missing", list)
    monkeypatch.setattr(engines, "carries_kernels", lambda: True)
    monkeypatch.setenv("NFORMER_EDGE_PLUGINS", "")
    run, _ = scripted(fails)
    result = engines.check_engines(tmp_path, run=run)
    ahead = {f"{precision}-ahead-of-time" for precision in ("fp32", "fp16", "int8")}
    assert set(result["gates"]) == ahead | (set() if fails else {"fp32", "fp16", "int8"})
    assert engines.os.environ["NFORMER_EDGE_PLUGINS"] == "none"
    assert bool(engines.failures(result)) == bool(fails)


def test_a_machine_without_tensorrt_says_what_it_lacks(gpu_check, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_check.gpu_engines.importlib.util, "find_spec", lambda _: None)
    result = gpu_check.gpu_engines.check_engines(tmp_path)
    assert "no tensorrt (pip install 'nformer-edge[tensorrt]')" in result["skipped"]


def test_what_could_not_be_told_is_null_in_the_json(gpu_check) -> None:
    assert gpu_check._plain({"a": [float("nan"), 1.0], "b": float("inf")}) == {"a": [None, 1.0], "b": None}
