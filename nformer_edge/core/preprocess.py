"""THE image preprocessing. Evaluation, calibration, training and runtime all come through here."""

from __future__ import annotations

import os
import stat
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
from PIL import Image, UnidentifiedImageError

from nformer_edge.core.errors import DataError
from nformer_edge.core.spec import PreprocessSpec

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

#: Checked from the header before anything is decoded. A crop of one person is far smaller.
MAX_PIXELS = 64_000_000
MAX_SIDE = 32_768
MAX_DECODED_BYTES = 256 * 2**20

#: Decoded images above this wait for each other: several threads with MAX_DECODED_BYTES each would fill the memory.
_LARGE_BYTES = 32 * 2**20
_LARGE = threading.Lock()

#: What shows through transparent pixels: white, as in most viewers.
BACKGROUND = (255, 255, 255)

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

#: EXIF orientation -> what turns the stored pixels upright.
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

#: Bytes of one channel's value, where it is not 1.
_DEEP = {"I": 4, "F": 4, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}

#: Formats whose last bytes show whether the file is whole: (the mark, in how many last bytes).
_ENDS = {"JPEG": (b"\xff\xd9", 4096), "PNG": (b"IEND", 64)}


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decodes one image file to RGB, as a viewer shows it.

    EXIF orientation is applied, 16-bit gray becomes its upper 8 bits, transparency is laid over `BACKGROUND`, and of
    several pages or frames the first is taken.

    Raises:
        DataError: if the file is missing, empty, of another kind than FORMATS, over one of the limits, of 32-bit
            pixels, or damaged.
    """
    with _open(path) as image:
        return as_seen(image, os.fspath(path))


def load_resized(path: str | os.PathLike[str], spec: PreprocessSpec) -> np.ndarray:
    """`load_image`, then `resize`; of images that are large once decoded, one at a time, whatever the threads."""
    with _open(path) as image, _LARGE if _decoded_bytes(image) > _LARGE_BYTES else nullcontext():
        return resize(as_seen(image, os.fspath(path)), spec)


def check_image(path: str | os.PathLike[str]) -> None:
    """Looks at the header and the end of an image file; decodes it only where the end looks cut.

    Raises:
        DataError: as `load_image` does.
    """
    with _open(path) as image:
        mark, last = _ENDS.get(image.format or "", (b"", 0))
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - last))
            if not last or mark not in file.read():
                as_seen(image, os.fspath(path))


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """An image file whose header is within the limits; errors of its decoder become DataError."""
    path = os.fspath(path)
    expected = "a JPEG, PNG, BMP, WebP or TIFF image"
    hint = "Remove the file or put a good copy in its place."
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise DataError(path, "a device or a FIFO", expected, hint)
        with Image.open(path, formats=FORMATS) as image:
            _check_size(path, image)
            yield image
    except FileNotFoundError as e:
        raise DataError(path, "no such file", expected, "Check the path.") from e
    except UnidentifiedImageError as e:
        got = "an empty file" if os.path.getsize(path) == 0 else "a file of another kind"
        raise DataError(path, got, expected, hint) from e
    except Image.DecompressionBombError as e:
        raise DataError(path, str(e), f"at most {MAX_PIXELS} pixels", "Crop the person first.") from e
    except (OSError, ValueError, SyntaxError, struct.error) as e:  # Pillow's decoders raise all of them
        raise DataError(path, f"a damaged or unreadable file ({e})", expected, hint) from e


def _decoded_bytes(image: Image.Image) -> int:
    return image.width * image.height * len(image.getbands()) * _DEEP.get(image.mode, 1)


def _check_size(path: str, image: Image.Image) -> None:
    decoded = _decoded_bytes(image)
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE or decoded > MAX_DECODED_BYTES:
        expected = f"at most {MAX_PIXELS} in all, {MAX_SIDE} a side and {MAX_DECODED_BYTES >> 20} MiB decoded"
        raise DataError(path, f"{image.width} x {image.height} pixels", expected, "Crop the person first.")


def as_seen(image: Image.Image, name: str) -> Image.Image:
    """An image of any mode as RGB, upright; `name` is what errors call it."""
    image.load()
    turn = _turn(image)
    if image.mode in _DEEP:
        values = np.asarray(image)
        if image.mode == "F" or (image.mode == "I" and values.size and not 0 <= values.min() <= values.max() < 1 << 16):
            raise DataError(name, "32-bit pixels", "8-bit or 16-bit pixels", "Save it with 8 bits a channel.")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    seen = image.convert("RGB")
    return seen if turn is None else seen.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns the pixels upright; nothing where the EXIF data are damaged, as in viewers."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except (OSError, ValueError, SyntaxError, TypeError, KeyError, struct.error):
        return None


def resize(image: Image.Image, spec: PreprocessSpec) -> np.ndarray:
    """An RGB image brought to the spec's size. Returns uint8 [height, width, 3], RGB."""
    return np.asarray(image.resize((spec.width, spec.height), _RESAMPLING[spec.interpolation]))


def normalize(pixels: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    """RGB uint8 [..., H, W, 3] to the backbone's input: float32 [..., 3, H, W], minus mean, over std.

    Channels, `mean` and `std` are in the order of the spec's channels, for values in 0..1. A graph that normalizes by
    itself (`PreprocessSpec.pixels`) gets the pixels, in its layout and order.
    """
    if spec.pixels is not None:
        ordered = pixels[..., ::-1] if spec.pixels.channels == "BGR" else pixels
        return np.ascontiguousarray(ordered if spec.pixels.layout == "NHWC" else np.moveaxis(ordered, -1, -3))
    scale, shift = scale_and_shift(spec)
    if spec.channels == "BGR":
        pixels = pixels[..., ::-1]
    # a channel at a time into its place: 20 times quicker than to convert whole pixels and then move the axis
    out = np.empty((*pixels.shape[:-3], 3, *pixels.shape[-3:-1]), np.float32)
    for c in range(3):
        np.multiply(pixels[..., c], scale[c], out=out[..., c, :, :])
        out[..., c, :, :] -= shift[c]
    return out


def scale_and_shift(spec: PreprocessSpec) -> tuple[np.ndarray, np.ndarray]:
    """Of each channel, float32 [3]: a pixel times `scale` minus `shift` is the model's number."""
    scale = np.float32(1.0) / (np.float32(255.0) * np.asarray(spec.std, np.float32))
    return scale, np.asarray(spec.mean, np.float32) / np.asarray(spec.std, np.float32)


def preprocess_files(paths: Sequence[str | os.PathLike[str]], spec: PreprocessSpec) -> np.ndarray:
    """Image files to the backbone's input, float32 [B, 3, height, width] as a rule: see `normalize`."""
    if not paths:
        return np.empty((0, *spec.shape), dtype=spec.dtype)
    return normalize(np.stack([load_resized(p, spec) for p in paths]), spec)
