"""The checks of ``plugins/gpu_check.py``, and with them the kernels, on a GPU that the CPU emulates."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nformer_edge.model.ops import reciprocal_neighbor_attention, row_top_k

PLUGINS = Path(__file__).parents[3] / "plugins"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PLUGINS))
    spec = importlib.util.spec_from_file_location("gpu_check", PLUGINS / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "_stream", lambda: ctypes.c_void_p(None))
    return module


def test_the_kernels_pass_the_gpu_checks_on_an_emulated_gpu(gpu_check, emulated_library) -> None:
    kernels = gpu_check.Kernels(emulated_library)
    done = gpu_check.check_exact_top_k(kernels, [(9, 40)])
    done += gpu_check.check_edges(kernels, 300) + gpu_check.check_attention(kernels, 12)
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
    failed = [name for name, ok in done if not ok]
    assert any(name.startswith("RowTopK") for name in failed)
    assert any(name.startswith("Attention") for name in failed)


def test_the_references_of_the_gpu_check_agree_with_the_plain_torch_operators(gpu_check) -> None:
    a, b, v = (gpu_check.draw(seed, 2, 60, size).double() for seed, size in ((1, 5), (2, 5), (3, 16)))
    neighbors = gpu_check.reference_top_k(gpu_check.scores_of(a, a), 7)
    assert torch.equal(neighbors, row_top_k(a, a, 7))
    for lists in (neighbors, neighbors[:1]):
        expected = reciprocal_neighbor_attention(a, b, v, lists, 0.3)
        assert (gpu_check.reference_attention(a, b, v, lists, 0.3) - expected).abs().max() <= 1e-12
        assert (gpu_check.plain_attention(a, b, v, lists, 0.3).double() - expected).abs().max() <= 1e-5
