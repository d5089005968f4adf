"""A model as callers use it: images in, features and matches out."""

from __future__ import annotations

import os
from contextlib import nullcontext

from numpy.typing import ArrayLike

from nformer_edge.backends.open import open_model
from nformer_edge.backends.runner import Runner
from nformer_edge.core.features import Features
from nformer_edge.core.signature import required
from nformer_edge.core.spec import GalleryCode, HeadState
from nformer_edge.gallery.embed import embed_images
from nformer_edge.gallery.gallery import Gallery
from nformer_edge.gallery.images import Images
from nformer_edge.gallery.search import HeadUse, Matches
from nformer_edge.gallery.search import search as ranked


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

    def gallery(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        code: GalleryCode = "fp32",
        thumbnails: bool = False,
        audit: bool = False,
        create: bool = True,
        head_state: HeadState = "fp32",
    ) -> Gallery:
        """A gallery of this model: an empty one in memory, or the one in a folder, which is made where there is none.

        Args:
            path: the folder; None: in memory.
            code: of a new gallery: how features are kept, ``fp32``, ``fp16`` or ``int8``; `Gallery.compact` knows more.
            thumbnails: of a new gallery: keep a small picture of each image, for `Gallery.migrate`.
            audit: of a new gallery: log each search.
            create: make a gallery where the folder has none.
            head_state: how the head's rows are kept in memory, ``fp32``, ``fp16`` or ``int8``.

        Raises:
            ArtifactError: for a file that is damaged, of another version or something else, or that is not there.
            DataError: for a gallery of another model or preprocessing.
        """
        return Gallery(
            self.runner, path, code=code, thumbnails=thumbnails, audit=audit, create=create, head_state=head_state
        )


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
    with nullcontext(model) if isinstance(model, Model) else open(model, intra_op_threads=intra_op_threads) as opened:
        return ranked(
            opened.runner,
            queries,
            gallery.features if isinstance(gallery, Gallery) else gallery,
            top,
            boxes=boxes,
            head=head,
            images_per_person=images_per_person,
            together=together,
            batch=batch,
            decoders=decoders,
            threshold=threshold,
        )
