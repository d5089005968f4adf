"""A model as callers use it: images in, features and matches out."""

from __future__ import annotations

import os
from types import TracebackType

from numpy.typing import ArrayLike

from nformer_edge.backends.open import open_model
from nformer_edge.backends.runner import Runner
from nformer_edge.core.errors import UsageError
from nformer_edge.core.features import Features
from nformer_edge.gallery.embed import embed_images
from nformer_edge.gallery.gallery import Gallery
from nformer_edge.gallery.images import Images
from nformer_edge.gallery.search import Matches
from nformer_edge.gallery.search import search as in_gallery


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runner.__exit__(kind, error, trace)

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

    def search(
        self,
        queries: Images | Features,
        gallery: Gallery | Features | str | os.PathLike[str],
        top: int = 10,
        *,
        boxes: ArrayLike | None = None,
        head: bool = True,
        together: bool = False,
    ) -> Matches:
        """Ranks a gallery for each query; see `Gallery.search`.

        Args:
            queries: images as for `embed`, or features.
            gallery: a gallery, features, or the path of a feature store, dataset or folder of images.
        """
        if isinstance(gallery, Gallery):
            return gallery.search(queries, top, boxes=boxes, head=head, together=together)
        return in_gallery(self.runner, queries, gallery, top, boxes=boxes, head=head, together=together)


def open(
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    device: str | None = None,
    intra_op_threads: int | None = None,
    contexts: int | None = None,
    reference: bool = False,
    native: bool = True,
) -> Model:
    """Opens a checkpoint, bundle or engine. Arguments and errors are those of `backends.open.open_model`."""
    return Model(
        open_model(
            path,
            backend=backend,
            device=device,
            intra_op_threads=intra_op_threads,
            contexts=contexts,
            reference=reference,
            native=native,
        )
    )


def embed(model: Model | str | os.PathLike[str], images: Images, boxes: ArrayLike | None = None) -> Features:
    """`Model.embed` with an open model, or with the one at a path."""
    if isinstance(model, Model):
        return model.embed(images, boxes)
    with open(model) as opened:
        return opened.embed(images, boxes)


def search(
    model: Model | str | os.PathLike[str],
    queries: Images | Features,
    gallery: Gallery | Features | str | os.PathLike[str],
    top: int = 10,
) -> Matches:
    """`Model.search` with an open model, or with the one at a path."""
    if isinstance(model, Model):
        return model.search(queries, gallery, top)
    with open(model) as opened:
        return opened.search(queries, gallery, top)
