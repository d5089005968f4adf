"""What a training was: a row an epoch, a record a stage, and the history that stands beside the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from nformer_edge.core.spec import to_dict
from nformer_edge.core.values import JSON, Result, Table
from nformer_edge.training.config import TrainConfig


@dataclass(frozen=True)
class Epoch:
    """What one epoch measured; None is what it did not.

    Args:
        epoch: 1 is the first; 0 stands for the head before its first step.
        loss, accuracy: means over the epoch's batches; accuracy is the share of images classified right.
        lr: learning rate at the end.
        held_out_map: mAP of the held-out identities, 0..1.
    """

    epoch: int
    loss: float | None = None
    accuracy: float | None = None
    held_out_map: float | None = None
    lr: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Best:
    """The epoch with the highest held-out mAP, the earliest of equals."""

    epoch: int
    held_out_map: float

    @classmethod
    def of(cls, epochs: Sequence[Epoch]) -> Best | None:
        """None where nothing was watched."""
        watched = [cls(e.epoch, e.held_out_map) for e in epochs if e.held_out_map is not None]
        return max(watched, key=lambda best: best.held_out_map, default=None)


@dataclass(frozen=True)
class Stage:
    """One stage of a training.

    Args:
        extraction_seconds: of the training images' views, for the head after its backbone; part of `seconds`.
        backbone_map: of the head's stage, mAP of the held-out identities by the backbone alone, 0..1.
    """

    epochs: tuple[Epoch, ...]
    best: Best | None
    seconds: float
    extraction_seconds: float | None = None
    backbone_map: float | None = None


@dataclass(frozen=True)
class Identity:
    """What decides a training's numbers: only the same training is resumed.

    Args:
        config: `TrainConfig` without what changes no number.
        images: sha256 over names, people and cameras of the training images.
        initial: sha256 of the checkpoint whose backbone is the start.
        features: sha256 of the features that the head learns from.
        backbone: sha256 of the checkpoint that made them.
    """

    config: Mapping[str, JSON]
    images: str | None = None
    initial: str | None = None
    features: str | None = None
    backbone: str | None = None


def config_identity(config: TrainConfig, other: str | None = None) -> Table:
    """What of the configuration decides the numbers; without the stage `other`, whose settings may change while this
    one waits to be resumed."""
    kept = {k: v for k, v in to_dict(config).items() if k not in ("save_minutes", "cache_mib", other)}
    if isinstance(model := kept["model"], dict):
        kept["model"] = {k: v for k, v in model.items() if k != other}
    return kept


class Trained(Result):
    """What stands beside a checkpoint: which file, and what decided its numbers."""

    sha256: str
    identity: Identity


@dataclass(frozen=True)
class History(Trained):
    """A training that came to its end.

    Args:
        dataset: its name, or the feature file's.
        checkpoint: the file that it wrote, with its `sha256`.
        images, identities: learnt from, without those held out.
        stages: by name, ``backbone`` and ``head``.
        notes: what its user should know, such as a head that held-out people lose by.
        threads: PyTorch's intra-op threads.
        ranks: processes that trained together.
    """

    kind: ClassVar[str] = "training"
    version: ClassVar[int] = 3

    dataset: str
    checkpoint: str
    sha256: str
    images: int
    identities: int
    config: TrainConfig
    identity: Identity
    stages: Mapping[str, Stage]
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    threads: int
    ranks: int
    device: str
    seconds: float

    def __str__(self) -> str:
        lines = [f"{self.dataset}: {self.images:,} images of {self.identities:,} identities"]
        for name, stage in self.stages.items():
            losses = [e.loss for e in stage.epochs if e.loss is not None]
            fell = f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, " if losses else ""
            best = stage.best
            kept = f"best held-out mAP {100 * best.held_out_map:.1f} after epoch {best.epoch}, " if best else ""
            lines.append(f"  {name}: {len(losses)} epochs, {fell}{kept}{stage.seconds:.0f} s")
        return "\n".join([*lines, f"wrote {self.checkpoint}"])


def head_notes(stages: Mapping[str, Stage]) -> tuple[str, ...]:
    """Whether held-out people lose by the head, or nobody was held out to tell."""
    head = stages.get("head")
    if head is None:
        return ()
    if head.best is None or head.backbone_map is None:
        return ("nobody was held out: whether the head helps was not measured (--holdout 0.1 does)",)
    before, after = 100 * head.backbone_map, 100 * head.best.held_out_map
    if after >= before:
        return ()
    lost = f"held-out people lose by the head: mAP {before:.1f} by the backbone alone, {after:.1f} with it"
    return (f"{lost}. Use the backbone alone (--no-head), or check that the labels say who is who",)
