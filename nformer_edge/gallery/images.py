"""Images as callers have them: files, PIL images, uint8 arrays, or people's boxes in a frame."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.preprocess import SUFFIXES, as_seen, load_image
from nformer_edge.data.files import walk_images

OneImage = str | os.PathLike[str] | Image.Image | np.ndarray
Images = OneImage | Sequence[OneImage]
Source = str | Image.Image

_EXPECTED = "paths, PIL images or uint8 arrays [H, W, 3] in RGB"


def image_sources(images: Images, boxes: ArrayLike | None = None) -> list[Source]:
    """What `data.batches` decodes: of each image its file or its RGB pixels, in order.

    Args:
        images: one image or several: files, folders of files (at any depth, sorted), PIL images, uint8 arrays
            [H, W, 3] or [N, H, W, 3] in RGB.
        boxes: [N, 4], N people in one image, the frame: x1, y1, x2, y2 in pixels, x2 and y2 not included. Fractions
            are rounded outwards, and what lies outside the frame is cut off.

    Raises:
        UsageError: for an empty list, or another kind, type or shape, naming the image.
        DataError: for a box that is not finite, empty or outside the frame, naming its row; for a file that is no
            image.
    """
    several = isinstance(images, Sequence) and not isinstance(images, str)
    given: Sequence[object] = images if several or getattr(images, "ndim", 0) == 4 else [images]  # type: ignore[assignment]
    sources = [source for i, image in enumerate(given) for source in _sources(image, f"images[{i}]")]
    if not sources:
        raise UsageError("images", "an empty list", _EXPECTED, "Pass at least one image.")
    if boxes is None:
        return sources
    if len(sources) != 1:
        raise UsageError("boxes", f"{len(sources)} images", "one frame", "Call once for each frame.")
    return [*_crops(sources[0], boxes)]


def image_files(source: str | os.PathLike[str]) -> list[str]:
    """The file itself, or the image files in a folder, at any depth, sorted.

    Raises:
        DataError: for a folder without images.
    """
    if not Path(source).is_dir():
        return [os.fspath(source)]
    found = walk_images(source).images
    if not found:
        others = sorted({p.suffix.lower() for p in Path(source).iterdir() if p.suffix and p.is_file()})
        hint = f"Convert what is there ({', '.join(others[:4])})." if others else "Check the path."
        raise DataError(os.fspath(source), "zero images", f"{', '.join(SUFFIXES)} files", hint)
    return [*found]


def _sources(image: object, name: str) -> Sequence[Source]:
    if isinstance(image, (str, os.PathLike)):
        return image_files(image)
    if isinstance(image, Image.Image):
        try:
            return [as_seen(image, name)]  # decoded here: several decoders may get the same image
        except (OSError, ValueError, SyntaxError) as e:
            raise DataError(name, f"a damaged image ({e})", _EXPECTED, "Leave it out.") from e
    if not isinstance(image, np.ndarray):
        raise UsageError(name, type(image).__name__, _EXPECTED, "Convert it, such as by np.asarray.")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UsageError(name, f"{image.dtype} {list(image.shape)}", "uint8 [H, W, 3], RGB", _hint(image))
    return [Image.fromarray(image)]


def _hint(image: np.ndarray) -> str:
    if image.dtype != np.uint8:
        return "Bring the values to 0..255 and convert: image.astype(np.uint8)."
    if image.ndim == 2:
        return "Repeat the gray channel: np.stack([image] * 3, axis=-1)."
    if image.ndim == 3 and image.shape[0] == 3:
        return "Put the channels last: image.transpose(1, 2, 0)."
    if image.ndim == 3 and image.shape[2] == 4:
        return "Leave out the fourth channel: image[..., :3]."
    return "Pass one array an image, or [N, H, W, 3]."


def _crops(frame: Source, boxes: ArrayLike) -> list[Image.Image]:
    hint = "Pass one row x1, y1, x2, y2 for each person."
    try:
        corners = np.asarray(boxes, np.float64)
    except (TypeError, ValueError) as e:
        raise UsageError("boxes", "rows of unlike length, or no numbers", "[N, 4]", hint) from e
    if not corners.size:
        return []
    if corners.ndim != 2 or corners.shape[1] != 4:
        raise UsageError("boxes", f"shape {list(corners.shape)}", "[N, 4]", hint)
    image = frame if isinstance(frame, Image.Image) else load_image(frame)
    if (corners >= 0).all() and (corners <= 1).all():
        hint = f"Multiply x by the frame's width, {image.width}, and y by its height, {image.height}."
        raise UsageError("boxes", "all between 0 and 1", "pixels", hint)
    first, last = np.floor(corners[:, :2]), np.ceil(corners[:, 2:])
    size = np.array([image.width, image.height])
    outside = ((first >= size) | (last <= 0)).any(axis=1)
    for bad, what, expected in (
        (~np.isfinite(corners).all(axis=1), "NaN or infinity", "finite numbers"),
        ((corners[:, 2:] <= corners[:, :2]).any(axis=1), "an empty box", "x1 < x2 and y1 < y2"),
        (outside, "a box outside the frame", f"one that meets {image.width} x {image.height} pixels"),
    ):
        if bad.any():
            row = int(bad.argmax())
            hint = "Leave such boxes out; boxes are x1, y1, x2, y2, not width and height."
            raise DataError(f"boxes[{row}]", f"{what}, {corners[row].tolist()}", expected, hint)
    whole = np.concatenate([np.maximum(first, 0), np.minimum(last, size)], axis=1).astype(int)
    return [image.crop((x1, y1, x2, y2)) for x1, y1, x2, y2 in whole.tolist()]
