"""The gated head: a neighbor weighs by how far its score stands above what both images give strangers.

The published head gives every image its k neighbors, whoever they are; where a person has one image in the gallery,
all twenty are strangers. Here image i has a threshold t_i, read from the scores along its own list (its profile), and a
neighbor j weighs ``sigmoid(slope * (s_ij - (t_i + t_j) / 2))``: hardly anything where nobody stands out. The mean of
both thresholds is what adaptive score normalization subtracts (Matejka et al., Interspeech 2017). `docs/operators.md`
has the operator, `docs/training.md` how gates are learnt.

Letters: N images seen together, D features, K listed neighbors, l landmarks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nformer_edge.core.errors import UsageError
from nformer_edge.core.spec import GATED_IMAGES, GATED_LIST, GATED_MISSING, GATED_RANKS, GATED_UNTOLD, HeadSpec
from nformer_edge.model.nformer import NFormer, Projection, check_inputs, is_captured, scaled, unit
from nformer_edge.model.start import discriminant
from nformer_edge.ops.contract import gates_for
from nformer_edge.ops.operators import operators
from nformer_edge.ops.reference import check_finite

#: See `core.spec`.
RANKS, LISTED, MISSING = GATED_RANKS, GATED_LIST, GATED_MISSING

#: The gates that a new head starts with, and how they were learnt.
GATES = Path(__file__).with_name("gates.json")


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
        raised, w, b = self.raised(x), self.linear.w, self.linear.b
        if not b.any() and torch.equal(w, torch.eye(len(w), dtype=w.dtype, device=w.device)):
            return raised
        mapped: Tensor = self.linear(raised)
        return mapped

    def raised(self, x: Tensor) -> Tensor:
        """What the linear part gets. As there, what does nothing is left out when a graph is written, too."""
        if self.power == 1:
            return x
        return x.sign() * x.abs().pow(self.power)


class Gate(nn.Module):
    """One layer: ``unit(x_i + strength * sum_j w_ij x_j)``."""

    def __init__(self, k: int, *stack: int) -> None:
        super().__init__()
        self.k = k
        self.profile = nn.Parameter(torch.zeros(*stack, len(RANKS)))
        self.offset = nn.Parameter(torch.zeros(stack))
        self.log_slope = nn.Parameter(torch.full(stack, math.log(20.0)))
        self.log_strength = nn.Parameter(torch.zeros(stack))

    def forward(
        self,
        x: Tensor,  # [N, D], unit rows
        scores: Tensor,  # [N, RANKS], its profiles
        neighbors: Tensor,  # int32 [1, N, LISTED]
    ) -> Tensor:  # [N, D], unit rows
        return self.joined(x, self.sums(x, self.thresholds(scores), neighbors))

    def sums(self, x: Tensor, thresholds: Tensor, neighbors: Tensor) -> Tensor:  # [N, D], [N], [1, N, LISTED] -> [N, D]
        """What the neighbors give each row."""
        slope = self.log_slope.exp()  # in the scores, not in the operator's attribute: a gradient flows
        rows, chosen = x[None], neighbors[:, :, : self.k + 1]
        found: Tensor = operators().reciprocal_neighbor_attention(
            slope * rows, rows, rows, chosen, 1.0, (slope * thresholds)[None]
        )[0]
        return found

    def thresholds(self, scores: Tensor) -> Tensor:  # [N, RANKS] -> [N]
        """t, in the unit of the scores."""
        return scores @ self.profile + self.offset

    def joined(self, x: Tensor, y: Tensor) -> Tensor:  # [N, D], [N, D] -> [N, D]
        """Rows and what their neighbors add."""
        return unit(x + self.log_strength.exp() * y)


def profile(
    x: Tensor,  # [N, D], unit rows
    neighbors: Tensor,  # int32 [N, LISTED], by descending score
    table: Tensor | None = None,  # [M, D], whom the lists name; x if None
) -> Tensor:  # [N, len(RANKS)]
    """The scores of each image with the neighbors at `RANKS` of its list.

    A place that a small set does not have repeats the one before, less `MISSING`.
    """
    table = x if table is None else table
    last, drop, names, drops = neighbors[:, 0], torch.zeros_like(x[:, 0]), [], []
    for rank in RANKS:
        there = neighbors[:, rank] >= 0
        last = torch.where(there, neighbors[:, rank], last)
        drop = torch.where(there, drop, drop + MISSING)
        names.append(last.clamp_min(0))
        drops.append(drop)
    return operators().pair_scores(x, table, torch.stack(names, dim=1)) - torch.stack(drops, dim=1)


class Told(nn.Module):
    """The numbers of gates for each of `core.spec.GATED_IMAGES` images a person; see `GatedHead.tell`."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.h = nn.ModuleList(Gate(spec.k, len(GATED_IMAGES)) for _ in range(spec.layers))
        self.own = nn.Parameter(torch.zeros(len(GATED_IMAGES)))
        self.requires_grad_(False)


class GatedHead(nn.Module):
    """Features of N images in, features that know their neighbors out, whatever the set is composed of.

    The lists are chosen once, by the cosine of the mapped features less their center, and every layer weighs anew.
    `h` and `own` are what it computes with, and `told` what `tell` sets them from.
    """

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.map = Map(spec.features)
        self.h: Sequence[Gate] = nn.ModuleList(Gate(spec.k) for _ in range(spec.layers))  # type: ignore[assignment]
        self.own = nn.Parameter(torch.zeros(()))
        self.told = Told(spec)

    @torch.no_grad()
    def tell(self, images: float) -> None:
        """Sets the gates for a gallery with so many images a person (`ops.contract.gates_for`)."""
        for name, value in gates_for(head_numbers(self), images).items():
            self.get_parameter(name).copy_(torch.from_numpy(value))

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
        return self.relate(self.mapped(features, landmarks))

    def relate(self, own: Tensor) -> Tensor:  # [N, D], as `mapped` gives them -> [N, D]
        """What follows the map."""
        neighbors = operators().row_top_k(own[None], own[None], LISTED)
        return self.through(own, profile(own, neighbors[0]), neighbors)

    def through(
        self,
        own: Tensor,  # [N, D]
        scores: Tensor,  # [N, RANKS], its profiles
        neighbors: Tensor,  # int32 [1, N, LISTED]
    ) -> Tensor:  # [N, D]
        """The layers, where lists are known."""
        x = own
        for layer, gate in enumerate(self.h):
            x = gate(x, profile(x, neighbors[0]) if layer else scores, neighbors)
        return self.output(x, own)

    def output(self, x: Tensor, own: Tensor) -> Tensor:  # [N, D], [N, D] -> [N, D]
        """The last layer's rows, with a share of what went into the first."""
        return x + self.own * own

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
    for part, numbers in zip(head.told.h, learnt["layers"], strict=False):
        part.load_state_dict({name: torch.tensor(value) for name, value in numbers.items()})
    head.told.own.copy_(torch.tensor(learnt["own"]))
    head.tell(GATED_UNTOLD)
