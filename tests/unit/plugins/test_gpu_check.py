"""The checks of ``plugins/gpu_check.py`` themselves, here with the CPU build of the row logic in the GPU's place."""

from __future__ import annotations

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
    return module


class OnTheCpu:
    """What `Kernels` is to a GPU."""

    def __init__(self, row_logic) -> None:
        self.row_logic = row_logic

    def row_top_k(self, a, b, k):
        return torch.from_numpy(self.row_logic.row_top_k(a.numpy(), b.numpy(), k))

    def attention(self, a, b, v, neighbors, scale):
        return torch.from_numpy(self.row_logic.attention(*(x.numpy() for x in (a, b, v, neighbors)), scale))


def test_the_gpu_checks_pass_with_the_row_logic_on_the_cpu(gpu_check, row_logic) -> None:
    kernels = OnTheCpu(row_logic)
    done = gpu_check.check_exact_top_k(kernels, [(1, 1), (3, 40)])
    done += gpu_check.check_edges(kernels, 300) + gpu_check.check_attention(kernels, 40)
    assert [name for name, ok in done if not ok] == []
    assert len(done) > 250


def test_the_gpu_checks_notice_a_wrong_kernel(gpu_check, row_logic) -> None:
    class Wrong(OnTheCpu):
        def row_top_k(self, a, b, k):
            return super().row_top_k(a, b, k).flip(2)

        def attention(self, *given):
            return super().attention(*given) * 1.01

    wrong = Wrong(row_logic)
    done = gpu_check.check_exact_top_k(wrong, [(2, 40)]) + gpu_check.check_attention(wrong, 20)
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
