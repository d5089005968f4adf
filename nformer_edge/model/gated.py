"""The gated head: a neighbor weighs by how far its score stands above what both images give strangers.

The published head gives every image its k neighbors, whoever they are; where a person has one image in the gallery,
all twenty are strangers. Here image i has a threshold t_i, read from the scores along its own list (its profile), and a
neighbor j weighs ``sigmoid(slope * (s_ij - (t_i + t_j) / 2))``: hardly anything where nobody stands out. The mean of
both thresholds is what adaptive score normalization subtracts (Matejka et al., Interspeech 2017). How much the gates
let through follows from the set itself (`Gauge`). `docs/operators.md` has the operator, `docs/training.md` how gates
are learnt.

Letters: N images seen together, D features, K listed neighbors, l landmarks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nformer_edge.core.errors import UsageError
from nformer_edge.core.spec import GATED_LIST, GATED_MISSING, GATED_RANKS, HeadSpec
from nformer_edge.model.nformer import NFormer, Projection, check_inputs, is_captured, scaled, unit
from nformer_edge.model.start import discriminant
from nformer_edge.ops.operators import operators
from nformer_edge.ops.reference import check_finite

#: See `core.spec`.
RANKS, LISTED, MISSING = GATED_RANKS, GATED_LIST, GATED_MISSING

#: The gates that a new head starts with, and how they were learnt.
GATES = Path(__file__).with_name("gates.json")

#: Of `RANKS`: where strangers begin, where the profile ends, and what lies between them.
_TOP, _NEAR, _FAR = RANKS.index(16), RANKS.index(32), RANKS.index(128)

#: By how much the line through `_NEAR` and `_FAR`, straight over the logarithm of the rank, is above `_NEAR`.
_FALL = (math.log(RANKS[_NEAR]) - torch.tensor(RANKS).log()) / math.log(RANKS[_FAR] / RANKS[_NEAR])


class Map(nn.Module):
    """Features to the space where they are compared: ``sign(x) |x|^power w + b``, at first the identity. Not trained
    by gradients: `start_as_gates` fits it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.ones(()))
        self.linear = Projection(features, features)
        nn.init.eye_(self.linear.w)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:  # [N, D] -> [N, D]
        mapped: Tensor = self.linear(self.raised(x))
        return mapped

    def raised(self, x: Tensor) -> Tensor:
        """What the linear part gets."""
        if self.power == 1:  # decided when a graph is written: it then has no nodes for nothing
            return x
        return x.sign() * x.abs().pow(self.power)


class Whole(NamedTuple):
    """What the gauge keeps of a whole set, from the profiles of its landmarks.

    Args:
        spread: [], the unit of excess: how far scores fall from rank 16 to rank 128.
        mean, deviation: [RANKS] each, of the landmarks' excess.
    """

    spread: Tensor
    mean: Tensor
    deviation: Tensor


class Gauge(nn.Module):
    """How many images of its person stand around each image, from 0 (few) to 1 (many).

    Strangers' scores fall by the logarithm of their rank; what a profile has above that line is its excess. One image's
    is noisy; those of the neighbors and of the whole set together tell the composition without labels, also where
    people with one image stand beside dense groups that nobody asks for.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.hidden = Projection(5 * len(RANKS), 16)
        self.out = Projection(16, 1)

    def forward(
        self,
        scores: Tensor,  # [N, RANKS], profiles
        neighbors: Tensor,  # int32 [1, N, LISTED]
        whole: Whole,
    ) -> Tensor:  # [N]
        excess = _excess(scores, whole.spread)
        values = _moments(excess - whole.mean)[None]
        same = excess[None]  # a scale of 0 gives every neighbor in the list the same weight
        sums = operators().reciprocal_neighbor_attention(
            same, same, values, neighbors[:, :, : self.k + 1], 0.0, torch.zeros_like(excess[:, 0])[None]
        )[0]
        return self.judge(excess, sums, whole)

    def around(
        self,
        scores: Tensor,  # [B, RANKS], profiles
        theirs: Tensor,  # [B, k, RANKS], their neighbors' profiles
        counts: Tensor,  # bool [B, k]
        whole: Whole,
    ) -> Tensor:  # [B]
        """As `forward`, where the neighbors' profiles are at hand."""
        values = _moments(_excess(theirs.flatten(0, 1), whole.spread) - whole.mean).reshape(*counts.shape, -1)
        sums = 0.5 * (values * counts[:, :, None]).sum(dim=1)
        return self.judge(_excess(scores, whole.spread), sums, whole)

    def whole(self, scores: Tensor) -> Whole:  # [l, RANKS], the landmarks' profiles
        """Of a set."""
        spread = (scores[:, _TOP] - scores[:, _FAR]).mean().clamp_min(1e-3)
        excess = _excess(scores, spread)
        mean = excess.mean(dim=0)
        return Whole(spread, mean, (excess - mean).square().mean(dim=0).sqrt())

    def judge(self, excess: Tensor, sums: Tensor, whole: Whole) -> Tensor:  # [N, RANKS], [N, 2 RANKS + 1] -> [N]
        """From the images' own excess, and the sums of their neighbors' `_moments` about the whole's mean."""
        means = sums[:, :-1] / sums[:, -1:].clamp_min(0.5)
        mean, square = means.chunk(2, dim=1)
        deviation = (square - mean.square()).clamp_min(0).add(1e-6).sqrt()
        around = torch.cat([whole.mean, whole.deviation]).expand(excess.shape[0], -1)
        seen = torch.cat([excess / 3, mean + whole.mean, deviation, around], dim=1)
        found: Tensor = self.out(torch.tanh(self.hidden(seen)))[:, 0].sigmoid()
        return found


def _moments(x: Tensor) -> Tensor:  # [N, RANKS] -> [N, 2 RANKS + 1]
    return torch.cat([x, x.square(), torch.ones_like(x[:, :1])], dim=1)


def _excess(scores: Tensor, spread: Tensor) -> Tensor:  # [N, RANKS] -> [N, RANKS]
    near, far = scores[:, _NEAR, None], scores[:, _FAR, None]
    return (scores - (near + (near - far) * _FALL.to(scores))) / spread


class Gate(nn.Module):
    """One layer: ``unit(x_i + strength_i * sum_j w_ij x_j)``.

    All numbers but the slope are learnt twice, for images of people with one image and with many; the gauge says how
    they are mixed.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.profile = nn.Parameter(torch.zeros(2, len(RANKS)))
        self.offset = nn.Parameter(torch.zeros(2))
        self.log_slope = nn.Parameter(torch.tensor(math.log(20.0)))
        self.log_strength = nn.Parameter(torch.zeros(2))

    def forward(
        self,
        x: Tensor,  # [N, D], unit rows
        scores: Tensor,  # [N, RANKS], its profiles
        neighbors: Tensor,  # int32 [1, N, LISTED]
        crowd: Tensor,  # [N], what the gauge says
    ) -> Tensor:  # [N, D], unit rows
        return self.joined(x, self.sums(x, self.thresholds(scores, crowd), neighbors), crowd)

    def sums(self, x: Tensor, thresholds: Tensor, neighbors: Tensor) -> Tensor:  # [N, D], [N], [1, N, LISTED] -> [N, D]
        """What the neighbors give each row."""
        slope = self.log_slope.exp()  # in the scores, not in the operator's attribute: a gradient flows
        rows, chosen = x[None], neighbors[:, :, : self.k + 1]
        found: Tensor = operators().reciprocal_neighbor_attention(
            slope * rows, rows, rows, chosen, 1.0, (slope * thresholds)[None]
        )[0]
        return found

    def thresholds(self, scores: Tensor, crowd: Tensor) -> Tensor:  # [N, RANKS], [N] -> [N]
        """t, in the unit of the scores."""
        return _mixed(scores @ self.profile.T + self.offset, crowd)

    def joined(self, x: Tensor, y: Tensor, crowd: Tensor) -> Tensor:  # [N, D], [N, D], [N] -> [N, D]
        """Rows and what their neighbors add."""
        return unit(x + _mixed(self.log_strength, crowd).exp()[:, None] * y)


def _mixed(numbers: Tensor, crowd: Tensor) -> Tensor:  # [2] or [N, 2], [N] -> [N]
    few, many = numbers[..., 0], numbers[..., 1]
    return few + crowd * (many - few)


def profile(
    x: Tensor,  # [N, D], unit rows
    neighbors: Tensor,  # int32 [N, LISTED], by descending score
    table: Tensor | None = None,  # [M, D], whom the lists name; x if None
) -> Tensor:  # [N, len(RANKS)]
    """The scores of each image with the neighbors at `RANKS` of its list.

    A place that a small set does not have repeats the one before, less `MISSING`.
    """
    table = x if table is None else table
    last, drop, columns = neighbors[:, 0], torch.zeros_like(x[:, 0]), []
    for rank in RANKS:
        there = neighbors[:, rank] >= 0
        last = torch.where(there, neighbors[:, rank], last)
        drop = torch.where(there, drop, drop + MISSING)
        columns.append((x * table.index_select(0, last.clamp_min(0))).sum(dim=1) - drop)
    return torch.stack(columns, dim=1)


class GatedHead(nn.Module):
    """Features of N images in, features that know their neighbors out, whatever the set is composed of.

    The lists are chosen once, by the cosine of the mapped features less their center, and every layer weighs anew.
    """

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.map = Map(spec.features)
        self.h: Sequence[Gate] = nn.ModuleList(Gate(spec.k) for _ in range(spec.layers))  # type: ignore[assignment]
        self.gauge = Gauge(spec.k)
        self.own = nn.Parameter(torch.zeros(2))

    def forward(
        self,
        features: Tensor,  # [N, D]
        landmarks: Tensor,  # int32 [layers, l]
    ) -> Tensor:  # [N, D]
        """The layers' output, and `own` times what went into them.

        Raises:
            UsageError: if a shape does not fit, or a landmark is out of range.
            DataError: if a feature is not finite.
        """
        if not is_captured():
            check_inputs(self.spec, features, landmarks)
            check_finite("features", features)
            if features.shape[0] == 0:
                return features
        return self.relate(self.mapped(features, landmarks), landmarks)

    def relate(
        self,
        own: Tensor,  # [N, D], as `mapped` gives them
        landmarks: Tensor,  # int32 [layers, l]
    ) -> Tensor:  # [N, D]
        """What follows the map."""
        neighbors = operators().row_top_k(own[None], own[None], LISTED)
        scores = profile(own, neighbors[0])
        return self.through(own, scores, neighbors, self.gauge.whole(scores.index_select(0, landmarks[0])))

    def through(
        self,
        own: Tensor,  # [N, D]
        scores: Tensor,  # [N, RANKS], its profiles
        neighbors: Tensor,  # int32 [1, N, LISTED]
        whole: Whole,
    ) -> Tensor:  # [N, D]
        """The layers, where lists and the whole are known."""
        x, crowd = own, self.gauge(scores, neighbors, whole)
        for layer, gate in enumerate(self.h):
            x = gate(x, profile(x, neighbors[0]) if layer else scores, neighbors, crowd)
        return self.output(x, own, crowd)

    def output(self, x: Tensor, own: Tensor, crowd: Tensor) -> Tensor:  # [N, D], [N, D], [N] -> [N, D]
        """The last layer's rows, with a share of what went into the first."""
        return x + _mixed(self.own, crowd)[:, None] * own

    def mapped(self, features: Tensor, landmarks: Tensor) -> Tensor:
        """What is compared: unit rows [N, D]. The center is the mean of the first layer's landmarks."""
        x: Tensor = self.map(scaled(features, self.spec))
        return unit(x - x.index_select(0, landmarks[0]).mean(dim=0))


#: Either head: both take features [N, D] and landmarks [layers, l], and have a `spec`.
Head = NFormer | GatedHead


def make_head(spec: HeadSpec) -> Head:
    """A new head of the rule that `spec` names."""
    return GatedHead(spec) if spec.rule == "gated" else NFormer(spec)


def head_numbers(head: Head) -> dict[str, np.ndarray]:
    """Its weights in FP32, by name: what a gallery that changes computes with (`gallery.live`)."""
    return {name: x.detach().cpu().float().numpy() for name, x in head.state_dict().items()}


@torch.no_grad()
def start_as_gates(
    head: GatedHead,
    features: Tensor,  # [M, D]
    labels: Tensor | None,  # int64 [M]
    cameras: Tensor | None = None,  # int64 [M]
    power: float = 1.0,
) -> None:
    """Sets the weights: the map in closed form, the gates as `benchmarks/gates.py` learnt them.

    Args:
        head: changed in place.
        features: training features, as the head will get them.
        labels: fit the map by `model.start.discriminant`; None leaves the features as they are.
        cameras: as `discriminant` takes them.
        power: each number is raised to it before the map; 1 leaves it.

    Raises:
        UsageError: for more layers than were learnt.
    """
    head.map.power.fill_(power)
    if labels is not None:
        w, mean = discriminant(head.map.raised(scaled(features, head.spec)), labels, cameras)
        head.map.linear.w.copy_(w)
        head.map.linear.b.copy_(-(mean @ w))
    learnt = json.loads(GATES.read_text("utf-8"))
    if head.spec.layers > len(learnt["layers"]):
        hint = "Lower layers, or start at random."
        raise UsageError("layers", head.spec.layers, f"at most {len(learnt['layers'])} under the gated rule", hint)
    for part, numbers in zip([head.gauge, *head.h], [learnt["gauge"], *learnt["layers"]], strict=False):
        part.load_state_dict({name: torch.tensor(value) for name, value in numbers.items()})
    head.own.copy_(torch.tensor(learnt["own"]))
