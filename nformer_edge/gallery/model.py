"""A model as callers use it: images in, features and matches out; and the gallery that it searches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from nformer_edge.backends.open import open_model
from nformer_edge.backends.runner import Runner
from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.features import Features, check_features, labels_of
from nformer_edge.core.signature import required
from nformer_edge.core.values import Result, Table
from nformer_edge.gallery.embed import embed_images, made_by
from nformer_edge.gallery.images import Images
from nformer_edge.gallery.search import HeadUse, Matches, check_model
from nformer_edge.gallery.search import search as ranked
from nformer_edge.metrics.distance import unit_rows


@dataclass(frozen=True)
class GalleryStats(Result):
    """What a gallery holds.

    Args:
        images: how many.
        ids: different ids.
        cameras: different cameras that are known.
        features: numbers an image, D.
        memory_mib: of the features.
        model: architecture and image size.
    """

    kind: ClassVar[str] = "gallery"

    images: int
    ids: int
    cameras: int
    features: int
    memory_mib: float
    model: str

    def __str__(self) -> str:
        cameras = f", {self.cameras:,} cameras" if self.cameras else ""
        size = f"{self.features} numbers each, {self.memory_mib:.1f} MiB"
        return f"{self.images:,} images of {self.ids:,} ids{cameras}: {size}, model {self.model}"


class Gallery:
    """Images to search, in memory, in the order in which they were added. See `Model.gallery`.

    Their features are kept as the backbone gave them and at L2 norm 1, so that a search without the head costs one
    product. It is not safe to add or remove while another thread searches.

    Args:
        runner: an open model.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._added = 0
        none = made_by(runner, Features(np.empty((0, runner.spec.backbone.features), np.float32)))
        self._parts, self._units = [none], [none.features]

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __str__(self) -> str:
        return str(self.stats())

    def to_json(self) -> Table:
        """What the gallery holds, in numbers. `Features.save` keeps the images' features themselves."""
        return self.stats().to_json()

    @property
    def features(self) -> Features:
        """Everything in the gallery: features, ids, cameras and paths."""
        self._gather()
        return self._parts[0]

    @property
    def unit(self) -> np.ndarray:
        """float32 [N, D], the features at L2 norm 1."""
        self._gather()
        return self._units[0]

    def add(
        self,
        images: Images | Features,
        ids: str | Sequence[str | int] | None = None,
        cameras: int | Sequence[int] | None = None,
        *,
        boxes: ArrayLike | None = None,
        batch: int = 32,
    ) -> int:
        """Adds images.

        Args:
            images: as for `Model.embed`, or features that this model gave, such as `Features.load` reads.
            ids: a name an image, or one for all of them; an id may have several images. If None: the person's number
                where it is known, or else the path, or else a running number.
            cameras: a number an image, or one for all of them; those of `images`, or unknown, if None.
            boxes: of people in `images`, one frame.
            batch: images run at once.

        Returns:
            Images in the gallery now.

        Raises:
            Error: as `Model.embed`; for ids or cameras that are not one an image, or features of another model.
                Nothing is added then.
        """
        new = images if isinstance(images, Features) else embed_images(self._runner, images, boxes, batch=batch)
        check_model(self._runner, new, "images")
        check_features(new.features, "images", self._runner.spec.backbone.features)
        numbers = range(self._added, self._added + len(new))
        names = [name or str(number) for name, number in zip(new.names, numbers, strict=True)]
        given = names if ids is None else [ids] * len(new) if isinstance(ids, str) else [str(name) for name in ids]
        camids = new.camids if cameras is None else labels_of("cameras", cameras)
        camids = np.full(len(new), camids) if camids.ndim == 0 else camids
        for name, values in (("ids", given), ("cameras", camids)):
            if len(values) != len(new):
                hint = f"Pass one of the {name} for each image, or one for all."
                raise DataError(name, f"{len(values)} for {len(new)} images", f"{len(new)}", hint)
        # views, hashes and the spec belong to a store for training, not to a gallery
        part = made_by(self._runner, Features(new.features, new.pids, camids, new.paths, ids=tuple(given)))
        self._units.append(unit_rows(part.features, "images"))
        self._parts.append(part)
        self._added += len(new)
        return len(self)

    def remove(self, ids: str | int | Sequence[str | int]) -> int:
        """Removes all images of these ids.

        Returns:
            Images removed.

        Raises:
            DataError: for an id that is not there, with the nearest one. Nothing is removed then.
        """
        wanted = {str(name) for name in ([ids] if isinstance(ids, (str, int)) else ids)}
        held = self.features
        for name in sorted(wanted - set(held.ids)):
            near = get_close_matches(name, set(held.ids), n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "`gallery.features.ids` lists them."
            raise DataError("ids", repr(name), "an id of the gallery", hint)
        kept = np.array([name not in wanted for name in held.ids], bool)
        self._parts, self._units = [held.take(kept)], [self.unit[kept]]
        return len(held) - len(self)

    def search(
        self,
        images: Images | Features,
        top: int = 10,
        *,
        boxes: ArrayLike | None = None,
        head: HeadUse = "auto",
        images_per_person: int | None = None,
        together: bool = False,
        batch: int = 32,
        threshold: float | None = None,
    ) -> Matches:
        """Ranks the gallery for each query; arguments and errors are those of `gallery.search.search`."""
        return ranked(
            self._runner,
            images,
            self.features,
            top,
            boxes=boxes,
            head=head,
            images_per_person=images_per_person,
            together=together,
            batch=batch,
            threshold=threshold,
            unit=self.unit,
        )

    def stats(self) -> GalleryStats:
        """What the gallery holds, in numbers."""
        held = self.features
        cameras = np.unique(held.camids[held.camids >= 0])
        memory = (held.features.nbytes + self.unit.nbytes) / 2**20
        ids, size = len(set(held.ids)), held.features.shape[1]
        return GalleryStats(len(held), ids, len(cameras), size, memory, self._runner.name)

    def _gather(self) -> None:
        """Makes one part of what was added since the last search."""
        if len(self._parts) > 1:
            parts = [part for part in self._parts if len(part)] or self._parts[:1]
            whole = replace(
                parts[-1],
                features=np.concatenate([part.features for part in parts]),
                pids=np.concatenate([part.pids for part in parts]),
                camids=np.concatenate([part.camids for part in parts]),
                paths=tuple(path for part in parts for path in part.paths),
                ids=tuple(name for part in parts for name in part.ids),
            )
            self._parts, self._units = [whole], [np.concatenate(self._units)]


class Model:
    """An open checkpoint, bundle or engine. Use it as a context manager: leaving gives its memory back.

    Args:
        runner: what runs it: arrays in, arrays out.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def __enter__(self) -> Model:
        self.runner.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.runner.__exit__(*exception)

    def __repr__(self) -> str:
        parts = ", ".join(f"{part} {precision}" for part, precision in self.runner.precision.items())
        return f"<Model {self.runner.name}, {self.runner.backend}: {parts}>"

    def embed(
        self, images: Images, boxes: ArrayLike | None = None, *, batch: int = 32, decoders: int | None = None
    ) -> Features:
        """The backbone's features of images, or of people in one frame.

        Args:
            images: one or several: files, folders, PIL images or uint8 arrays [H, W, 3] in RGB; with `boxes` one
                image, the frame.
            boxes: [N, 4], people in the frame: x1, y1, x2, y2 in pixels, cut off at its edges.
            batch: images run at once.
            decoders: threads that decode files; one a core if None.

        Returns:
            float32 [N, D] with the images' paths; the head has not seen them.

        Raises:
            UsageError: for no image, or one of another kind, type or shape.
            DataError: for a file that cannot be read, or a box that is empty, not finite or outside the frame.
        """
        return embed_images(self.runner, images, boxes, batch=batch, decoders=decoders)

    def gallery(self, path: str | os.PathLike[str] | None = None) -> Gallery:
        """An empty gallery for this model, in memory.

        Raises:
            UsageError: for a `path`: galleries on disk are not there yet.
        """
        if path is not None:
            hint = "Keep features with `gallery.features.save(file)` and add `Features.load(file)`."
            raise UsageError("path", str(path), "None: galleries are in memory only", hint)
        return Gallery(self.runner)


def open(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    device: str | None = None,
    intra_op_threads: int | None = None,
    contexts: int | None = None,
    require_signed: str | os.PathLike[str] | None = None,
    signed_since: str | None = None,
) -> Model:
    """Opens a checkpoint, bundle or engine. Arguments and errors are those of `backends.open.open_model`.

    With `require_signed`, a PEM file of an Ed25519 public key, a bundle or an engine is refused that this key did not
    sign, or signed before `signed_since`, or before one that was opened here earlier; see `core.signature.required`.
    """
    with required(require_signed, signed_since):
        runner = open_model(path, backend=backend, device=device, intra_op_threads=intra_op_threads, contexts=contexts)
        return Model(runner)


def embed(model: Model | str | os.PathLike[str], images: Images, boxes: ArrayLike | None = None) -> Features:
    """`Model.embed` with an open model, or with the one at a path."""
    with nullcontext(model) if isinstance(model, Model) else open(model) as opened:
        return opened.embed(images, boxes)


def search(
    model: Model | str | os.PathLike[str],
    queries: Images | Features,
    gallery: Gallery | Features | str | os.PathLike[str],
    top: int = 10,
    *,
    boxes: ArrayLike | None = None,
    head: HeadUse = "auto",
    images_per_person: int | None = None,
    together: bool = False,
    batch: int = 32,
    decoders: int | None = None,
    intra_op_threads: int | None = None,
    threshold: float | None = None,
) -> Matches:
    """Ranks a gallery for each query with an open model, or with the one at a path.

    Args:
        model: `intra_op_threads` is for one that is opened here.
        gallery: a gallery, features, or the path of a feature store, dataset or folder of images. All other arguments
            and errors are those of `gallery.search.search`.
    """
    held, unit = (gallery.features, gallery.unit) if isinstance(gallery, Gallery) else (gallery, None)
    with nullcontext(model) if isinstance(model, Model) else open(model, intra_op_threads=intra_op_threads) as opened:
        return ranked(
            opened.runner,
            queries,
            held,
            top,
            boxes=boxes,
            head=head,
            images_per_person=images_per_person,
            together=together,
            batch=batch,
            decoders=decoders,
            threshold=threshold,
            unit=unit,
        )
