"""THE image preprocessing. Evaluation, calibration, training and runtime all come through here."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from nformer_edge.core.errors import DataError
from nformer_edge.core.spec import PreprocessSpec

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

#: Pixels, checked from the header before any are decoded. A crop of one person is far smaller.
MAX_PIXELS = 64_000_000

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decodes one image file to RGB.

    Raises:
        DataError: if the file is missing, empty, not JPEG, PNG, BMP or WebP, over MAX_PIXELS, or damaged.
    """
    path = os.fspath(path)
    expected = "a JPEG, PNG, BMP or WebP image"
    hint = "Remove the file or put a good copy in its place."
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    path,
                    f"{image.width} x {image.height} pixels",
                    f"at most {MAX_PIXELS} in all",
                    "Crop the person first.",
                )
            return image.convert("RGB")
    except FileNotFoundError as e:
        raise DataError(path, "no such file", expected, "Check the path.") from e
    except UnidentifiedImageError as e:
        got = "an empty file" if os.path.getsize(path) == 0 else "a file of another kind"
        raise DataError(path, got, expected, hint) from e
    except Image.DecompressionBombError as e:
        raise DataError(path, str(e), f"at most {MAX_PIXELS} pixels", "Crop the person first.") from e
    except (OSError, ValueError, SyntaxError) as e:  # Pillow's decoders raise all three on damaged data
        raise DataError(path, f"a damaged or unreadable file ({e})", expected, hint) from e


def resize(image: Image.Image, spec: PreprocessSpec) -> np.ndarray:
    """An RGB image brought to the spec's size. Returns uint8 [height, width, 3], RGB."""
    return np.asarray(image.resize((spec.width, spec.height), _RESAMPLING[spec.interpolation]))


def normalize(pixels: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    """RGB uint8 [..., H, W, 3] to float32 [..., 3, H, W] in the spec's channel order, minus mean, over std.

    `mean` and `std` stand in the order of the spec's channels, for values in 0..1.
    """
    scale = np.float32(1.0) / (np.float32(255.0) * np.asarray(spec.std, np.float32))
    shift = np.asarray(spec.mean, np.float32) / np.asarray(spec.std, np.float32)
    if spec.channels == "BGR":
        pixels = pixels[..., ::-1]
    # a channel at a time into its place: 20 times quicker than to convert whole pixels and then move the axis
    out = np.empty((*pixels.shape[:-3], 3, *pixels.shape[-3:-1]), np.float32)
    for c in range(3):
        np.multiply(pixels[..., c], scale[c], out=out[..., c, :, :])
        out[..., c, :, :] -= shift[c]
    return out


def preprocess_files(paths: Sequence[str | os.PathLike[str]], spec: PreprocessSpec) -> np.ndarray:
    """Image files to the backbone's input, float32 [B, 3, height, width]."""
    if not paths:
        return np.empty((0, 3, spec.height, spec.width), dtype=np.float32)
    return normalize(np.stack([resize(load_image(p), spec) for p in paths]), spec)
