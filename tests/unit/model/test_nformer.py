from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.spec import HeadSpec
from nformer_edge.model.nformer import NFormer
from nformer_edge.ops import reference as ops
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.ops.operators import using

GOLDEN = Path(__file__).parents[2] / "golden"
FILES = ("nformer_published_small", "nformer_published_raw_input")


class Published:
    """One golden file: the published code's input, weights and float64 output."""

    def __init__(self, name: str) -> None:
        with np.load(GOLDEN / f"{name}.npz") as z:
            self.arrays = {k: z[k] for k in z.files}
        features, heads, layers, k, landmarks = (int(x) for x in self.arrays["config"])
        self.spec = HeadSpec(features, layers, heads, k, landmarks, "features", "none")
        self.head = NFormer(self.spec).eval()
        weights = {k[7:]: torch.from_numpy(v) for k, v in self.arrays.items() if k.startswith("weight/")}
        missing, unexpected = self.head.load_state_dict(weights, strict=False)
        assert unexpected == []
        assert set(missing) <= {"bottleneck.num_batches_tracked"}
        self.features = torch.from_numpy(self.arrays["input"])
        self.landmarks = torch.from_numpy(self.arrays["landmarks"].astype(np.int32))
        self.output = torch.from_numpy(self.arrays["output"])


@pytest.fixture(params=FILES, name="published")
def _published(request: pytest.FixtureRequest) -> Published:
    return Published(request.param)


def test_head_gives_the_published_outputs_in_float64(published: Published) -> None:
    with torch.no_grad():
        got = published.head.double()(published.features.double(), published.landmarks)
    assert (got - published.output).abs().max() <= 1e-10


def test_head_gives_the_published_outputs_within_float32_rounding(published: Published) -> None:
    with torch.no_grad():
        got = published.head(published.features, published.landmarks)
    assert (got - published.output).norm() <= 1e-5 * published.output.norm()


def test_features_rule_finds_the_published_neighbors(published: Published) -> None:
    unit = torch.nn.functional.normalize(published.features.double(), dim=1)[None]
    got = ops.row_top_k(unit, unit, published.spec.k)[0].numpy()
    assert np.array_equal(np.sort(got, axis=1), np.sort(published.arrays["neighbors"], axis=1))


def test_comparison_with_the_golden_files_notices_other_landmarks(published: Published) -> None:
    with torch.no_grad():
        got = published.head.double()(published.features.double(), published.landmarks.flip(0))
    assert (got - published.output).abs().max() > 1e-6


def make(rule: Any = "features", scale: Any = "unit", **changes: int) -> tuple[NFormer, HeadSpec]:
    torch.manual_seed(0)
    spec = HeadSpec(**{"features": 16, "layers": 2, "heads": 2, "k": 4, "landmarks": 3, **changes}, rule=rule,
                    input_scale=scale)  # fmt: skip
    return NFormer(spec).eval(), spec


def run(head: NFormer, features: Tensor, seed: int = 0) -> Tensor:
    spec = head.spec
    landmarks = torch.from_numpy(draw_landmarks(max(1, len(features)), spec.layers, spec.landmarks, seed))
    with torch.no_grad():
        out: Tensor = head(features, landmarks)
    return out


@pytest.mark.parametrize("rule", ["features", "affinity"])
@pytest.mark.parametrize("images", [0, 1, 3, 50])
def test_head_takes_any_number_of_images(rule: str, images: int) -> None:
    head, _ = make(rule)
    out = run(head, torch.randn(images, 16))
    assert out.shape == (images, 16)
    assert out.isfinite().all()


@pytest.mark.parametrize("rule", ["features", "affinity"])
def test_head_does_not_care_in_which_order_images_stand(rule: str) -> None:
    head, _ = make(rule)
    head.double()
    features, order = torch.randn(30, 16).double(), torch.randperm(30)
    landmarks = torch.tensor([[3, 9, 1], [0, 20, 29]])
    moved = torch.argsort(order)[landmarks]
    with torch.no_grad():
        assert (head(features, landmarks)[order] - head(features[order], moved)).abs().max() <= 1e-10


def test_affinity_rule_chooses_neighbors_for_each_layer_and_head() -> None:
    head, spec = make("affinity")
    calls = []

    class Recording:
        reciprocal_neighbor_attention = staticmethod(ops.reciprocal_neighbor_attention)

        @staticmethod
        def row_top_k(a: Tensor, b: Tensor, k: int) -> Tensor:
            calls.append((tuple(a.shape), tuple(b.shape), k))
            return ops.row_top_k(a, b, k)

    with using(Recording()):
        run(head, torch.randn(20, 16))
    assert calls == [((spec.heads, 20, 3), (spec.heads, 20, 3), 4)] * spec.layers


@pytest.mark.parametrize("captured", [True, False], ids=["with gradients", "in blocks of rows"])
@pytest.mark.parametrize(("count", "length"), [(3, 3), (8, 8), (9, 8), (40, 8)])
def test_affinity_is_the_landmark_product_of_the_paper_in_the_fewest_factors(
    count: int, length: int, captured: bool
) -> None:
    head, _ = make("affinity", landmarks=count)
    attention, x = head.h[0].attn, torch.randn(50, 16)
    landmarks = torch.randperm(50)[:count]
    with torch.set_grad_enabled(captured):
        a, b, v = attention.factors(x, landmarks)
    assert a.shape == b.shape == (2, 50, length)
    q, k, values = (x @ attention.c_attn.w + attention.c_attn.b).split(16, dim=1)
    for h, part in enumerate((slice(0, 8), slice(8, 16))):
        want = (q[:, part] @ k[landmarks][:, part].T) @ (q[landmarks][:, part] @ k[:, part].T)
        assert (a[h] @ b[h].T - want).abs().max() <= 1e-6
        assert torch.equal(v[h], values[:, part])


def test_input_scale_sets_the_length_of_what_the_first_layer_sees() -> None:
    features = torch.randn(20, 16)
    unit = torch.nn.functional.normalize(features, dim=1)
    for scale, seen in (("unit", unit), ("sqrt_dim", 4 * unit), ("none", features)):
        head, _ = make(scale=scale)
        plain, _ = make(scale="none")
        assert (run(head, features) - run(plain, seen)).abs().max() <= 1e-4


def test_head_refuses_landmarks_out_of_range() -> None:
    head, _ = make()
    with pytest.raises(UsageError, match=r"landmarks: got 0\.\.5, expected 0\.\.4"):
        head(torch.randn(5, 16), torch.tensor([[0, 1, 5], [0, 1, 2]], dtype=torch.int32))


def test_head_refuses_landmarks_for_another_depth() -> None:
    head, _ = make()
    with pytest.raises(UsageError, match="landmarks: got shape"):
        head(torch.randn(5, 16), torch.zeros(3, 3, dtype=torch.int32))


def test_head_refuses_features_of_another_length() -> None:
    head, _ = make()
    with pytest.raises(UsageError, match=r"features: got shape \(5, 8\), expected \[N, 16\]"):
        head(torch.randn(5, 8), torch.zeros(2, 3, dtype=torch.int32))


def test_head_names_the_feature_that_is_not_finite() -> None:
    head, _ = make()
    features = torch.randn(5, 16)
    features[3, 0] = float("nan")
    with pytest.raises(DataError, match="row 3"):
        head(features, torch.zeros(2, 3, dtype=torch.int32))


def test_head_with_more_neighbors_than_images_equals_one_with_all_of_them() -> None:
    many, _ = make(k=50)
    all_of_them, _ = make(k=6)
    features = torch.randn(6, 16)
    assert (run(many, features) - run(all_of_them, features)).abs().max() <= 1e-5
