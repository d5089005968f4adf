"""Structured pruning: whole channels go, and what is left is a plain smaller model.

Which channels belong together (shortcuts, gates, the streams of an OSNet block) torch-pruning finds (Fang et al., CVPR
2023). How many of them stay is decided here, because its own rounding leaves a layer whole where it rounds to none.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nformer_edge.backends.choice import seconds_of, take_turns
from nformer_edge.backends.open import open_model
from nformer_edge.compress.cost import cost_of
from nformer_edge.compress.distil import Distil, DistilCriterion, ViewLoader
from nformer_edge.compress.step import Work, exported
from nformer_edge.core.errors import BackendError, UsageError
from nformer_edge.core.spec import ModelSpec, check_at_least, check_choice
from nformer_edge.model.backbone import Backbone, widths_of
from nformer_edge.training.history import Epoch
from nformer_edge.training.losses import batch_hard_triplet

Importance = Literal["taylor", "bn_scale"]

#: A layer by its name, and which of its channels are the group's, in the group's order.
Members = list[tuple[str, list[int]]]


@dataclass(frozen=True)
class Prune:
    """Takes away channels of least importance, over all layers together. It does not train: let `distil` follow.

    Args:
        gmacs: share of the backbone's multiplications that may remain.
        time: share of its time that may remain, by the clock of this machine: exported, FP32, 8 images a batch, in
            turn with the whole one. Multiplications and time go apart, because thin layers are slow for their size.
            Killed while it prunes by the clock, a run may choose other widths when it goes on.
        importance: of a channel, from the batch norms that it passes: ``taylor`` (what the re-ID loss would change by
            without it: Molchanov et al., CVPR 2019) or ``bn_scale`` (the scale's magnitude: Liu et al., ICCV 2017).
            Both are in units of the mean of the channels that it stands with.
        multiple: widths are rounded to multiples of this, never to none: float and INT8 kernels work in blocks of 16.
        batches: of the training images, for ``taylor``.
    """

    gmacs: float = 1.0
    time: float = 1.0
    importance: Importance = "taylor"
    multiple: int = 16
    batches: int = 20

    def __post_init__(self) -> None:
        check_choice("importance", self.importance, get_args(Importance))
        for name in ("multiple", "batches"):
            check_at_least(name, getattr(self, name), 1)
        for name, share in (("gmacs", self.gmacs), ("time", self.time)):
            if not 0 < share <= 1:
                raise UsageError(name, share, f"0 < {name} <= 1", "Give the share that may remain.")
        if self.gmacs == self.time == 1:
            raise UsageError("gmacs and time", "1 and 1", "one of them below 1", "Give the share that may remain.")

    def run(self, backbone: Backbone, work: Work) -> tuple[Backbone, list[Epoch]]:
        size = (work.spec.preprocess.height, work.spec.preprocess.width)
        example = torch.zeros(2, 3, *size)
        scores = _taylor(backbone, work, self.batches) if self.importance == "taylor" else _scales(backbone)
        groups = [
            _Group(members, scores)
            for members in _groups(backbone, example)
            if any(name in scores for name, _ in members)
        ]
        budget = self.gmacs * cost_of(backbone, size).gmacs
        thresholds = sorted({float(score) for group in groups for score in group.scores})
        kept = backbone
        low, high = 0, len(thresholds)
        with _clock(backbone, work.spec) if self.time < 1 else nullcontext() as share:
            while low < high:  # the lowest threshold that meets the budget
                middle = (low + high) // 2
                tried = self._cut(backbone, example, groups, thresholds[middle])
                light = cost_of(tried, size).gmacs <= budget
                if light and (share is None or share(_with_spec(tried)) <= self.time):
                    kept, high = tried, middle
                else:
                    low = middle + 1
        if kept is backbone:
            got = f"gmacs = {self.gmacs:g}, time = {self.time:g}"
            expected = f"what widths that are multiples of {self.multiple} can reach"
            raise UsageError("prune", got, expected, "Raise them, or lower multiple.")
        return _with_spec(kept), []

    def _cut(self, backbone: Backbone, example: Tensor, groups: list[_Group], threshold: float) -> Backbone:
        """A copy without the channels whose score is not above the threshold, but for rounding."""
        cut = copy.deepcopy(backbone)
        graph = _graph(cut, example)
        for group in groups:
            wanted = int((group.scores > threshold).sum())
            stay = max(self.multiple, round(wanted / self.multiple) * self.multiple)
            gone = group.scores.argsort(stable=True)[: max(0, len(group.scores) - stay)]
            if len(gone):
                layer = cut.get_submodule(group.first)
                remove = graph.get_pruner_of_module(layer).prune_out_channels
                graph.get_pruning_group(layer, remove, idxs=sorted(gone.tolist())).prune()
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
    """Channels that stay or go together, over several layers."""

    def __init__(self, members: Members, scores: dict[str, Tensor]) -> None:
        self.first = members[0][0]
        found = [scores[name][torch.tensor(places)] for name, places in members if name in scores]
        self.scores = torch.stack(found).sum(dim=0)
        self.scores = self.scores / self.scores.mean().clamp_min(1e-30)


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError as e:
        hint = "pip install 'nformer-edge[prune]'"
        raise BackendError("prune", f"no {e.name} here", "torch-pruning", hint) from e
    return torch_pruning


def _graph(backbone: Backbone, example: Tensor) -> Any:
    pruning = _torch_pruning()
    arch = backbone.spec.arch
    if "ibn" in arch or arch.startswith("plain"):
        why = "splits its channels" if "ibn" in arch else "adds the identity to its kernels"
        hint = "Prune a ResNet or an OSNet without IBN; of plain students take a narrower one."
        raise UsageError("prune", f"{arch}, which {why}", "a backbone whose channels are whole", hint)
    for parameter in backbone.parameters():
        parameter.requires_grad_(True)  # it follows gradients
    return pruning.DependencyGraph().build_dependency(backbone.eval(), example_inputs=example)


def _groups(backbone: Backbone, example: Tensor) -> list[Members]:
    """All groups that can be pruned: those that hold neither images nor features."""
    copied = copy.deepcopy(backbone)
    graph = _graph(copied, example)
    names = {layer: name for name, layer in copied.named_modules()}
    found = []
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        members = [(names[dep.target.module], list(places)) for dep, places in group if dep.target.module in names]
        if not any(name.startswith("neck.") for name, _ in members if name.endswith((".bn", ".1"))):
            found.append(members)
    return found


def _scales(backbone: Backbone) -> dict[str, Tensor]:
    norms = ((name, m) for name, m in backbone.named_modules() if isinstance(m, nn.BatchNorm2d))
    return {name: norm.weight.detach().abs() for name, norm in norms}


def _taylor(backbone: Backbone, work: Work, batches: int) -> dict[str, Tensor]:
    """By batch norm and channel, the square of what the loss changes by without the channel, to first order."""
    model = copy.deepcopy(backbone).to(work.compute.device).eval()
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    scores = {name: torch.zeros(norm.num_features) for name, norm in norms.items()}
    loader = ViewLoader(work, Distil())
    people = DistilCriterion(Distil(), work.lessons, backbone.spec.features).people.to(work.compute.device)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for step, (images, labels, _) in enumerate(loader):
        if step == batches:
            break
        model.zero_grad()
        unit = F.normalize(model(images.to(work.compute.device)), dim=1)
        labels = labels.to(work.compute.device)
        loss = F.cross_entropy(16 * unit @ people.T, labels) + batch_hard_triplet(unit, labels, 0.3)
        loss.backward()  # type: ignore[no-untyped-call]
        for name, norm in norms.items():
            assert norm.weight.grad is not None
            assert norm.bias.grad is not None
            change = norm.weight * norm.weight.grad + norm.bias * norm.bias.grad
            scores[name] += change.detach().pow(2).cpu()
    return scores


def _with_spec(pruned: Backbone) -> Backbone:
    """The same weights in a backbone that its spec alone describes."""
    whole = widths_of(Backbone(replace(pruned.spec, widths=None)))
    widths = {name: width for name, width in widths_of(pruned).items() if width != whole[name]}
    plain = Backbone(replace(pruned.spec, widths=widths or None)).eval()
    plain.load_state_dict(pruned.state_dict())
    return plain
