"""A model of mean colors; run as a script with ``PORT FOLDER [LEAK]``, a service over it to be stopped and killed."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from nformer_edge.core.features import Features
from nformer_edge.gallery.gallery import Gallery
from tests.helpers.galleries import stub


def jpeg(color: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (32, 64), kind: str = "JPEG") -> bytes:
    """An image file of one color."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


class Colors:
    """What the service asks of a model; a batch takes `seconds`."""

    def __init__(self, seconds: float = 0.0, leak: int = 0) -> None:
        self.batches: list[int] = []
        self.runner = stub(3)
        self.seconds, self.leak = seconds, leak
        self.leaked: list[bytes] = []

    def before(self) -> None:
        """What happens before a batch."""
        time.sleep(self.seconds)

    def embed(self, images: Sequence[Image.Image], batch: int, decoders: int) -> Features:
        """The mean color of each image."""
        self.batches.append(len(images))
        self.before()
        if self.leak:
            self.leaked.append(bytes(bytearray(self.leak)))
        return Features(np.stack([np.asarray(image, np.float32).mean(axis=(0, 1)) + 1 for image in images]))


if __name__ == "__main__":
    from nformer_edge.gallery.service.server import serve_opened
    from nformer_edge.gallery.service.settings import Settings

    model = Colors(0.01, int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    settings = Settings(port=int(sys.argv[1]), receive_s=2, rate=1e6)
    with Gallery(model.runner, sys.argv[2]) as opened:
        serve_opened(model, opened, settings)  # type: ignore[arg-type]
