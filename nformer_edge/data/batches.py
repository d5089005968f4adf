"""Image files to batches of the backbone's input, decoded by threads ahead of use. Loads no torch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from PIL import Image

from nformer_edge.core.preprocess import load_resized, normalize, resize
from nformer_edge.core.spec import PreprocessSpec, check_at_least, check_size

#: An image: its file, or its pixels in RGB.
Path = str | os.PathLike[str] | Image.Image


def decode(path: Path, spec: PreprocessSpec) -> np.ndarray:
    """One image to uint8 [height, width, 3], RGB. Raises DataError as `load_image` does."""
    return resize(path, spec) if isinstance(path, Image.Image) else load_resized(path, spec)


def iter_batches(
    paths: Sequence[Path], spec: PreprocessSpec, batch: int = 32, threads: int | None = None
) -> Iterator[np.ndarray]:
    """Yields the backbone's input, as a rule float32 [B, 3, height, width], in the order of `paths`; the last batch may
    be smaller.

    The numbers are those of `core.preprocess.preprocess_files`, whatever `batch` and `threads`. Arguments and errors
    are those of `iter_pixels`.
    """
    for pixels in iter_pixels(paths, spec, batch, threads):
        yield normalize(pixels, spec)


def iter_pixels(
    paths: Sequence[Path], spec: PreprocessSpec, batch: int = 32, threads: int | None = None
) -> Iterator[np.ndarray]:
    """Yields decoded and resized images, uint8 [B, height, width, 3], RGB, in the order of `paths`.

    Args:
        paths: image files.
        spec: the images' size.
        batch: B.
        threads: decoders, default one a CPU core (at most 8); at most two batches are decoded ahead.

    Raises:
        DataError: for the first file, in order, that cannot be decoded.
    """
    check_at_least("batch", batch, 1)
    workers = threads if threads is not None else min(8, os.cpu_count() or 1)
    check_size("threads", workers)
    chunks = [paths[i : i + batch] for i in range(0, len(paths), batch)]
    if len(chunks) == 1 and min(workers, len(paths)) == 1:  # nothing to do beside: a thread would only cost
        yield np.stack([decode(path, spec) for path in paths])
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        ahead: deque[list[Future[np.ndarray]]] = deque()
        for chunk in [*chunks, *([None] * 2)]:
            if chunk is not None:
                ahead.append([pool.submit(decode, path, spec) for path in chunk])
            if ahead and (chunk is None or len(ahead) > 2):
                yield np.stack([future.result() for future in ahead.popleft()])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
