"""Where the head's training starts: as the mean over reciprocal neighbors, alone or after a discriminant map.

Weights from elsewhere see a new camera site through directions in which images of one person differ from camera to
camera. `start_as_discriminant` makes the first layer's perceptron the linear map, in closed form, that makes such
differences small, and the layers after it the mean over reciprocal neighbors in the mapped space. Neighbors average out
what differs between images of one camera, but not what differs between cameras: where cameras are known, the map is
fitted to the latter.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nformer_edge.core.errors import UsageError
from nformer_edge.model.nformer import Block, NFormer, scaled

#: Directions with hardly any variance are raised to this share of the largest before they are divided by.
FLOOR = 1e-3

#: Weight of what varies within a camera, beside what varies from camera to camera at 1.
WITHIN_CAMERA = 0.1

#: Where `Bend` bends, above the lowest value of a layer-normalized row, and how sharply.
KNOTS = (0.3, 1.2)
SLOPE = 3.0


@torch.no_grad()
def start_as_reciprocal_mean(
    head: NFormer,
    features: Tensor,  # [M, D]
    strength: float = 1.0,
    sharpness: float | None = None,
) -> None:
    """Sets the weights so that each layer adds to each image the plain mean of its reciprocal neighbors.

    Values and projections become the identity, the perceptrons' outputs zero. Under the features rule queries and
    keys start small, so that all neighbors weigh alike. Under the affinity rule they also choose the neighbors:
    they start as a whitening of what the layer sees, so that the landmark product approximates the cosine there.
    With `sharpness` they start so under both rules, and near neighbors weigh more (`relate_by_cosine`).

    Args:
        head: changed in place.
        features: training features, as the head will get them.
        strength: weight of the neighbors' mean against the image's own feature.
        sharpness: softmax logit of a neighbor with cosine 1 against one with cosine 0.
    """
    spec = head.spec
    size = spec.features // spec.heads
    x = scaled(features, head.spec)
    for block in head.h:
        if sharpness is not None:
            relate_by_cosine(block, x, strength, sharpness, spec.landmarks)
        else:
            w, identity = block.attn.c_attn.w, math.sqrt(strength) * torch.eye(spec.features)
            w[:, 2 * spec.features :] = identity
            block.attn.c_proj.w.copy_(identity)
            _zero(block.attn.c_attn.b, block.attn.c_proj.b)
            if spec.rule == "affinity":
                whitening = _whitening(x, spec.landmarks, size)
                for start in range(0, 2 * spec.features, size):
                    w[:, start : start + size] = whitening
        _zero(block.mlp.c_proj.w, block.mlp.c_proj.b)
        x = block.ln_1(x)
    head.bottleneck.reset_running_stats()


def _zero(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.zero_()


def _whitening(
    x: Tensor,  # [M, D]
    landmarks: int,
    size: int,
) -> Tensor:  # [D, size]
    second_moment = (x.T @ x / len(x)).double()
    values, vectors = torch.linalg.eigh(second_moment)
    order = values.argsort(descending=True)[:size]
    kept = values[order].clamp_min(FLOOR * float(values.max()))
    return (vectors[:, order] * kept**-0.25 / landmarks**0.25).to(x.dtype)


def relate_by_cosine(
    block: Block,
    x: Tensor,  # [M, D], what the layer sees
    strength: float,
    sharpness: float,
    landmarks: int,
) -> None:
    """Makes the attention add `strength` times the neighbors' mean, weighted by ``softmax(sharpness * cosine)``.

    The cosine is that of rows less their mean, as the landmark product approximates it: its error falls with the
    square root of the number of landmarks.
    """
    attn, features = block.attn, x.shape[1]
    size = features // attn.heads
    attn.c_attn.b.zero_()
    attn.c_attn.w[:, 2 * features :] = torch.eye(features)
    attn.c_proj.w.copy_(strength * torch.eye(features))
    attn.c_proj.b.zero_()
    mean = x.mean(dim=0)
    centerd = (x - mean).double()
    variance, directions = torch.linalg.eigh(centerd.T @ centerd / len(x))
    variance, directions = variance.flip(0)[:size], directions.flip(1)[:, :size]
    # landmarks stand between queries and keys with their own covariance: each side undoes half of it
    half = directions * variance.clamp_min(FLOOR * float(variance.max())) ** -0.25
    logit = max(sharpness, FLOOR) * math.sqrt(size) / float(variance.sum())
    half = (half * (logit / landmarks) ** 0.25).to(x.dtype)
    for start in range(0, 2 * features, size):
        attn.c_attn.w[:, start : start + size] = half
        attn.c_attn.b[start : start + size] = -(mean @ half)


def discriminant(
    x: Tensor,  # [M, D]
    labels: Tensor,  # int64 [M]
    cameras: Tensor | None = None,  # int64 [M]
    shrinkage: float = 0.3,
    between: float = 0.25,
) -> tuple[Tensor, Tensor]:
    """The linear map ``(x - mean) w``: whitens what varies within a person, stretches what varies between people.

    Within-class covariance normalization (Hatch et al., Interspeech 2006), then each principal direction of the
    people's means times its variance to the power `between`, then a fixed rotation: scores stay as they are, and no
    axis stands for one direction, so that a batch norm behind it cannot undo the stretch. Mapped rows have mean
    square length D.

    Args:
        cameras: what varies within a person is then its camera means about their mean, each camera of each person
            weighing alike, with `WITHIN_CAMERA` of what varies about the camera means. Images about the person's mean
            if None, or if no person was seen by two cameras.
        shrinkage: this share of the mean variance is added to every direction before it is whitened.
        between: 0 whitens only.

    Returns:
        w [D, D] and mean [D].
    """
    rows = x.double()
    mean = rows.mean(dim=0)
    scatter, people = _scatter(rows, labels) if cameras is None else _scatter_across(rows, labels, cameras)
    within, directions = torch.linalg.eigh(scatter)
    w = directions * (within.clamp_min(0) + shrinkage * within.mean()) ** -0.5
    people = (people - mean) @ w
    variance, directions = torch.linalg.eigh(people.T @ people / len(people))
    w = w @ (directions * variance.clamp_min(FLOOR * float(variance.max())) ** between)
    turn = torch.randn(w.shape, generator=torch.Generator().manual_seed(0), dtype=w.dtype)
    w = w @ torch.linalg.qr(turn)[0]
    length = float(((rows - mean) @ w).pow(2).sum(dim=1).mean())
    return (w * math.sqrt(rows.shape[1] / length)).to(x.dtype), mean.to(x.dtype)


def _scatter(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance within the groups that `labels` name, [D, D], and the groups' means in the labels' order, [C, D]."""
    _, group, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), rows.shape[1], dtype=rows.dtype).index_add_(0, group, rows)
    means = sums / counts[:, None]
    apart = rows - means[group]
    return apart.T @ apart / len(rows), means


def _scatter_across(rows: Tensor, labels: Tensor, cameras: Tensor) -> tuple[Tensor, Tensor]:
    """As `_scatter` of people, from one row for each camera of each person, so that many images weigh no more."""
    seen, sight = torch.unique(torch.stack([labels, cameras], dim=1), dim=0, return_inverse=True)
    inside, means = _scatter(rows, sight)
    person = seen[:, 0]
    _, group, counts = torch.unique(person, return_inverse=True, return_counts=True)
    several = counts[group] > 1
    if not several.any():
        return _scatter(rows, labels)
    across, _ = _scatter(means[several], person[several])
    return across + WITHIN_CAMERA * inside, _scatter(means, person)[1]


class Bend(NamedTuple):
    """The concave function ``scale u + sum_j bends[j] gelu(SLOPE (u - KNOTS[j]))`` of ``u = x - low``, for each number.

    It stands for a power of `u`: channels behind a ReLU are skewed, and their largest values say too much (power
    normalization, Perronnin et al., ECCV 2010).
    """

    low: float
    scale: float
    bends: tuple[float, ...]

    @classmethod
    def fit(
        cls,
        x: Tensor,  # [M, D], layer-normalized
        power: float,
    ) -> Bend:
        """The nearest to ``u ** power``, by least squares over about 500 rows."""
        low = x.amin(dim=1).median()
        u = (x[:: max(1, len(x) // 500)] - low).double().flatten()
        terms = torch.stack([u, *_bent(u), torch.ones_like(u)], dim=1)
        scale, *bends, _ = torch.linalg.lstsq(terms, u.clamp_min(0)[:, None] ** power).solution[:, 0].tolist()
        return cls(float(low), scale, tuple(bends))

    def __call__(self, x: Tensor) -> Tensor:
        u = x - self.low
        return self.scale * u + sum(bend * term for bend, term in zip(self.bends, _bent(u), strict=False))


#: Leaves every number as it is.
STRAIGHT = Bend(0.0, 1.0, ())


def _bent(u: Tensor) -> list[Tensor]:
    return [torch.nn.functional.gelu(SLOPE * (u - knot), approximate="tanh") for knot in KNOTS]


@torch.no_grad()
def start_as_discriminant(
    head: NFormer,
    features: Tensor,  # [M, D]
    labels: Tensor,  # int64 [M]
    strength: float = 1.0,
    sharpness: float = 1.0,
    cameras: Tensor | None = None,  # int64 [M]
    power: float = 1.0,
) -> None:
    """Sets the weights: layer 1 maps by `discriminant`, the others add the mean of the reciprocal neighbors there.

    Queries and keys start so that the landmark product approximates the cosine of what the layer sees. Under the
    affinity rule layer 1 relates nothing, since neighbors are better chosen after the map; under the features rule,
    whose neighbors are given, it takes part like the others.

    Args:
        head: changed in place.
        features: training features, as the head will get them.
        strength: weight of the neighbors' mean against the image's own feature.
        sharpness: softmax logit of a neighbor with cosine 1 against one with cosine 0.
        cameras: as `discriminant` takes them.
        power: the map is of each number raised to this power, as `Bend` does it; 1 leaves them.

    Raises:
        UsageError: for the affinity rule with one layer.
    """
    spec = head.spec
    if spec.rule == "affinity" and spec.layers < 2:
        hint = "Add a layer, or start as reciprocal_mean."
        raise UsageError("layers", spec.layers, "2 or more under the affinity rule", hint)
    x = scaled(features, head.spec)
    for layer, block in enumerate(head.h):
        relates = layer > 0 or spec.rule == "features"
        relate_by_cosine(block, x, strength if relates else 0.0, sharpness, spec.landmarks)
        x = block.ln_1(x)
        _zero(block.mlp.c_proj.w, block.mlp.c_proj.b)
        if layer == 0:
            bend = STRAIGHT if power == 1 else Bend.fit(x, power)
            _map(block, bend, *discriminant(bend(x), labels, cameras))
        x = block.ln_2(x + block.mlp(x))
    head.bottleneck.reset_running_stats()


def _map(block: Block, bend: Bend, w: Tensor, mean: Tensor) -> None:
    """Makes ``x + perceptron(x)`` the map ``(bend(x) - mean) w``.

    gelu(u) - gelu(-u) is u, so pairs of units are linear, 2 D of them; each knot takes D more.
    """
    size = len(mean)
    identity = torch.eye(size, dtype=w.dtype)
    into, out = block.mlp.c_fc, block.mlp.c_proj
    into.b[: 2 * size] = 0
    into.w[:, :size], into.w[:, size : 2 * size] = identity, -identity
    straight = bend.scale * w - identity
    out.w[:size], out.w[size : 2 * size] = straight, -straight
    for knot, (at, height) in enumerate(zip(KNOTS, bend.bends, strict=False), start=2):
        units = slice(knot * size, (knot + 1) * size)
        into.w[:, units], into.b[units], out.w[units] = SLOPE * identity, -SLOPE * (bend.low + at), height * w
    out.b.copy_(-((mean + bend.scale * bend.low) @ w))
