"""Structured pruning: whole channels or whole streams go, and what is left is a plain smaller model.

Which channels belong together (shortcuts, gates, the streams of an OSNet block) torch-pruning finds (Fang et al., CVPR
2023). How many of them stay is decided here, because its own rounding leaves a layer whole where it rounds to none.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from nformer_edge.backends.choice import seconds_of, take_turns
from nformer_edge.backends.open import open_model
from nformer_edge.compress.cost import cost_of
from nformer_edge.compress.distil import Distil, DistilCriterion, ViewLoader
from nformer_edge.compress.step import Work, exported
from nformer_edge.core.errors import BackendError, UsageError
from nformer_edge.core.spec import ModelSpec, check_at_least, check_choice
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.model.backbone import Backbone, widths_of
from nformer_edge.model.osnet import OSBlock
from nformer_edge.model.resnet import IBN
from nformer_edge.training.history import Epoch
from nformer_edge.training.losses import batch_hard_triplet

What = Literal["channels", "streams"]
Importance = Literal["taylor", "bn_scale"]

Norm = nn.BatchNorm2d | nn.InstanceNorm2d

#: A layer by its name, and which of its channels are the group's, in the group's order.
Members = list[tuple[str, list[int]]]

#: What stands for a number that is not given.
_MULTIPLE, _BATCHES = 16, 20

#: Whether a model of so many GMACs keeps to the budget.
Fits = Callable[[Backbone, float], bool]


@dataclass(frozen=True)
class Prune:
    """Takes away what matters least, over all layers together. It does not train: let `distil` follow.

    Args:
        what: ``channels``, or ``streams`` of OSNet's blocks (one stays in each): one after the other goes the stream
            without which the re-ID loss grows least for the multiplications that it takes.
        gmacs: share of the backbone's multiplications that may remain.
        time: share of its time that may remain, by the clock of this machine: exported, FP32, 8 images a batch, in
            turn with the whole one. Multiplications and time go apart, because thin layers are slow for their size.
            Killed while it prunes by the clock, a run may choose other widths when it goes on.
        importance: of a channel, from the batch and instance norms that it passes: ``taylor`` (what the re-ID loss
            would change by without it: Molchanov et al., CVPR 2019) or ``bn_scale`` (the scale's magnitude: Liu et
            al., ICCV 2017). Both are in units of the mean of the channels that it stands with. ``taylor`` if None.
        multiple: widths are rounded to multiples of this, never to none: float and INT8 kernels work in blocks of 16.
            IBN's two halves lose equally many channels. 16 if None.
        batches: of the training images, for ``taylor`` and for streams. 20 if None.
    """

    what: What = "channels"
    gmacs: float = 1.0
    time: float = 1.0
    importance: Importance | None = None
    multiple: int | None = None
    batches: int | None = None

    def __post_init__(self) -> None:
        check_choice("what", self.what, get_args(What))
        if self.importance is not None:
            check_choice("importance", self.importance, get_args(Importance))
        for name, count in (("multiple", self.multiple), ("batches", self.batches)):
            if count is not None:
                check_at_least(name, count, 1)
        for name, share in (("gmacs", self.gmacs), ("time", self.time)):
            if not 0 < share <= 1:
                raise UsageError(name, share, f"0 < {name} <= 1", "Give the share that may remain.")
        if self.gmacs == self.time == 1:
            raise UsageError("gmacs and time", "1 and 1", "one of them below 1", "Give the share that may remain.")
        streams, scales = self.what == "streams", self.importance == "bn_scale"
        for name, value, idle, where in (
            ("importance", self.importance, streams, "streams go"),
            ("multiple", self.multiple, streams, "streams go"),
            ("batches", self.batches, scales, "bn_scale decides"),
        ):
            if idle and value is not None:
                raise UsageError(name, value, f"nothing where {where}", "Leave it out: it would change nothing.")

    def run(self, backbone: Backbone, work: Work) -> tuple[Backbone, list[Epoch]]:
        size = (work.spec.preprocess.height, work.spec.preprocess.width)
        whole = cost_of(backbone, size).gmacs
        clock = _clock(backbone, work.spec) if self.time < 1 else nullcontext()
        least = {"gmacs": 1.0}  # of what was tried
        with clock as share, tqdm(desc="pruning", unit="try", **PROGRESS) as bar:

            def fits(tried: Backbone, gmacs: float) -> bool:
                light, shares = gmacs <= self.gmacs * whole, {"gmacs": gmacs / whole}
                if light and share is not None:
                    shares["time"] = share(_with_spec(tried))
                least.update({name: min(found, least.get(name, 1.0)) for name, found in shares.items()})
                bar.set_postfix(shares, refresh=False)
                bar.update()
                return light and shares.get("time", 0.0) <= self.time

            kept = (self._narrowed if self.what == "channels" else self._thinned)(backbone, work, size, fits)
        if kept is None:
            got = f"gmacs = {self.gmacs:g}, time = {self.time:g}"
            lowest = ", ".join(f"{name} = {share:.3f}" for name, share in least.items())
            reached = f"what widths that are multiples of {self.multiple or _MULTIPLE} can reach, at least {lowest}"
            hint = "Raise them, or lower multiple."
            if self.what == "streams":
                reached, hint = f"what one stream a block can reach, at least {lowest}", "Raise them."
            raise UsageError("prune", got, reached, hint)
        return _with_spec(kept), []

    def _narrowed(self, backbone: Backbone, work: Work, size: tuple[int, int], fits: Fits) -> Backbone | None:
        """With the lowest threshold that `fits`."""
        example = torch.zeros(2, 3, *size)
        taylor = self.importance != "bn_scale"
        scores = _taylor(backbone, work, self.batches or _BATCHES) if taylor else _scales(backbone)
        groups = [
            _Group(members, scores, any(isinstance(backbone.get_submodule(name), IBN) for name, _ in members))
            for members in _groups(backbone, example)
            if any(name in scores for name, _ in members)
        ]
        thresholds = sorted({float(score) for group in groups for score in group.scores})
        kept, low, high = None, 0, len(thresholds)
        while low < high:
            middle = (low + high) // 2
            tried = self._cut(backbone, example, groups, thresholds[middle])
            if fits(tried, cost_of(tried, size).gmacs):
                kept, high = tried, middle
            else:
                low = middle + 1
        return kept

    def _thinned(self, backbone: Backbone, work: Work, size: tuple[int, int], fits: Fits) -> Backbone | None:
        """Without as few streams as `fits`."""
        if not any(isinstance(block, OSBlock) for block in backbone.modules()):
            raise UsageError("prune.what", f"streams of {backbone.spec.arch}", "an OSNet", "Prune its channels.")
        batches = list(_batches(work, backbone.spec.features, self.batches or _BATCHES))
        kept = copy.deepcopy(backbone).to(work.compute.device).eval()
        loss, gmacs = _mean_loss(kept, batches), cost_of(kept, size).gmacs
        while not fits(kept, gmacs):
            blocks = [(name, b) for name, b in kept.named_modules() if isinstance(b, OSBlock) and len(b.streams) > 1]
            tried: list[tuple[float, int, float, float, Backbone]] = []
            streams = [(name, stream) for name, block in blocks for stream in block.streams]
            for i, (name, stream) in enumerate(tqdm(streams, desc="trying", unit="stream", **PROGRESS)):
                without = copy.deepcopy(kept)
                setattr(without.get_submodule(name), stream, None)
                worse, less = _mean_loss(without, batches), cost_of(without, size).gmacs
                tried.append(((worse - loss) / (gmacs - less), i, worse, less, without))
            if not tried:
                return None
            _, _, loss, gmacs, kept = min(tried)
        return kept.to("cpu")

    def _cut(self, backbone: Backbone, example: Tensor, groups: list[_Group], threshold: float) -> Backbone:
        """A copy without the channels whose score is not above the threshold, but for rounding."""
        cut = copy.deepcopy(backbone)
        graph = _graph(cut, example)
        for group in groups:
            gone = group.least(threshold, self.multiple or _MULTIPLE)
            if gone:
                layer = cut.get_submodule(group.first)
                remove = graph.get_pruner_of_module(layer).prune_out_channels
                graph.get_pruning_group(layer, remove, idxs=gone).prune()
        for name in _norms(backbone):
            norm = backbone.get_submodule(name)
            if not isinstance(norm, nn.BatchNorm2d):
                left = cut.get_submodule(name).get_parameter("weight").detach().long()
                cut.set_submodule(name, _narrowed(norm, left))
        return cut


@contextmanager
def _clock(whole: Backbone, spec: ModelSpec) -> Iterator[Callable[[Backbone], float]]:
    """Gives a model's share of the time of `whole`: as bundles run, in turn, the median of a round's ratio."""
    size = (spec.preprocess.height, spec.preprocess.width)
    images = np.random.default_rng(0).standard_normal((8, 3, *size), np.float32)
    with tempfile.TemporaryDirectory() as folder, open_model(exported(whole, spec, Path(folder))) as first:

        def share(pruned: Backbone) -> float:
            with open_model(exported(pruned, spec, Path(folder))) as second:
                taken = take_turns([partial(runner.embed, images) for runner in (first, second)], seconds_of)
            return float(np.median(taken[1] / taken[0]))

        yield share


class _Group:
    """Channels that stay or go together, over several layers; `halved` where one of them is an `IBN`."""

    def __init__(self, members: Members, scores: dict[str, Tensor], halved: bool) -> None:
        self.first, self.halved = members[0][0], halved
        found = [scores[name][torch.tensor(places)] for name, places in members if name in scores]
        self.scores = torch.stack(found).sum(dim=0)
        self.scores = self.scores / self.scores.mean().clamp_min(1e-30)

    def least(self, threshold: float, multiple: int) -> list[int]:
        """The channels that go: of least score, as many as are not above the threshold, but for rounding."""
        wanted, whole = int((self.scores > threshold).sum()), len(self.scores)
        stay = min(whole, max(multiple, round(wanted / multiple) * multiple))
        order = self.scores.argsort(stable=True)
        if not self.halved:
            return sorted(order[: whole - stay].tolist())
        first, rest = order[order < whole // 2], order[order >= whole // 2]
        return sorted([*first[: whole // 2 - stay // 2].tolist(), *rest[: len(rest) - stay + stay // 2].tolist()])


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError as e:
        hint = "pip install 'nformer-edge[prune]'"
        raise BackendError("prune", f"no {e.name} here", "torch-pruning", hint) from e
    return torch_pruning


def _graph(backbone: Backbone, example: Tensor) -> Any:
    """Of a copy, in which batch norms stand for norms that torch-pruning cannot follow (`_numbered`)."""
    pruning = _torch_pruning()
    arch = backbone.spec.arch
    if arch.startswith("plain"):
        got, expected = f"{arch}, which adds the identity to its kernels", "a ResNet or an OSNet"
        raise UsageError("prune", got, expected, "Take a narrower plain student.")
    for name, parts in _norms(backbone).items():
        if not isinstance(backbone.get_submodule(name), nn.BatchNorm2d):
            backbone.set_submodule(name, _numbered(sum(part.num_features for part in parts)))
    for parameter in backbone.parameters():
        parameter.requires_grad_(True)  # it follows gradients
    return pruning.DependencyGraph().build_dependency(backbone.eval(), example_inputs=example)


def _groups(backbone: Backbone, example: Tensor) -> list[Members]:
    """All groups that can be pruned: those that hold neither images nor features."""
    copied = copy.deepcopy(backbone)
    graph = _graph(copied, example)
    names = {layer: name for name, layer in copied.named_modules()}
    output, found = _torch_pruning().ops._OutputOp, []
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        layers = [(dep.target.module, list(places)) for dep, places in group]
        if not any(isinstance(layer, (nn.BatchNorm1d, output)) for layer, _ in layers):
            found.append([(names[layer], places) for layer, places in layers if layer in names])
    return found


def _numbered(channels: int) -> nn.BatchNorm2d:
    """A batch norm whose scales are its channels' numbers, so that they say which are left."""
    norm = nn.BatchNorm2d(channels)
    norm.weight = nn.Parameter(torch.arange(float(channels)))
    return norm


def _narrowed(norm: nn.Module, left: Tensor) -> Any:
    """The same norm of the channels that are left, int64 [C]."""
    if isinstance(norm, IBN):
        narrow, half = IBN(len(left)), norm.IN.num_features
        narrow.IN, narrow.BN = _narrowed(norm.IN, left[left < half]), _narrowed(norm.BN, left[left >= half] - half)
        return narrow
    narrower = type(norm)(len(left), affine=True)
    narrower.load_state_dict({name: value[left] if value.ndim else value for name, value in norm.state_dict().items()})
    return narrower


def _norms(backbone: Backbone) -> dict[str, tuple[Norm, ...]]:
    """By name; an `IBN` is its two halves."""
    found: dict[str, tuple[Norm, ...]] = {}
    for name, layer in backbone.named_modules():
        if isinstance(layer, IBN):
            found[name] = (layer.IN, layer.BN)
        elif isinstance(layer, (nn.BatchNorm2d, nn.InstanceNorm2d)) and name.rpartition(".")[0] not in found:
            found[name] = (layer,)
    return found


def _scales(backbone: Backbone) -> dict[str, Tensor]:
    return {name: torch.cat([norm.weight.detach().abs() for norm in norms]) for name, norms in _norms(backbone).items()}


def _taylor(backbone: Backbone, work: Work, batches: int) -> dict[str, Tensor]:
    """By norm and channel, the square of what the loss changes by without the channel, to first order."""
    model = copy.deepcopy(backbone).to(work.compute.device).eval()
    norms = _norms(model)
    scores = {name: torch.zeros(sum(part.num_features for part in parts)) for name, parts in norms.items()}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for loss in _batches(work, backbone.spec.features, batches):
        model.zero_grad()
        loss(model).backward()  # type: ignore[no-untyped-call]
        for name, parts in norms.items():
            scores[name] += torch.cat([_change(part) for part in parts]).pow(2).cpu()
    return scores


def _change(norm: Norm) -> Tensor:  # [C], to first order, without the channel
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    return (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).detach()


def _batches(work: Work, features: int, count: int) -> Iterator[Callable[[Backbone], Tensor]]:
    """The re-ID loss of a model on each of the first batches: softmax over people and triplets."""
    device = work.compute.device
    people = DistilCriterion(Distil(), work.lessons, features).people.to(device)

    def loss(images: Tensor, labels: Tensor, model: Backbone) -> Tensor:
        unit, labels = F.normalize(model(images.to(device)), dim=1), labels.to(device)
        return F.cross_entropy(16 * unit @ people.T, labels) + batch_hard_triplet(unit, labels, 0.3)

    for images, labels, _ in islice(ViewLoader(work, Distil()), count):
        yield partial(loss, images, labels)


@torch.inference_mode()
def _mean_loss(model: Backbone, batches: Sequence[Callable[[Backbone], Tensor]]) -> float:
    return float(np.mean([float(loss(model)) for loss in batches]))


def _with_spec(pruned: Backbone) -> Backbone:
    """The same weights in a backbone that its spec alone describes."""
    whole, left = widths_of(Backbone(replace(pruned.spec, widths=None))), widths_of(pruned)
    widths = {name: width for name, width in left.items() if width != whole.get(name)}
    plain = Backbone(replace(pruned.spec, widths=widths or None)).eval()
    plain.load_state_dict(pruned.state_dict())
    return plain
