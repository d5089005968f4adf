"""A model of mean colors; run as a script, a service over it to be stopped and killed."""

from __future__ import annotations

import argparse
import io
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

    def embed(self, images: Sequence[np.ndarray], batch: int, decoders: int) -> Features:
        """The mean color of each image."""
        self.batches.append(len(images))
        self.before()
        if self.leak:
            self.leaked.append(bytes(bytearray(self.leak)))
        return Features(np.stack([image.astype(np.float32).mean(axis=(0, 1)) + 1 for image in images]))


def main() -> None:
    """Serves until it is stopped."""
    from nformer_edge.gallery.service.server import listen, serve_opened
    from nformer_edge.gallery.service.settings import Settings

    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("folder")
    parser.add_argument("--seconds", type=float, default=0.01, help="a batch")
    parser.add_argument("--leak", type=int, default=0, help="bytes a batch")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--queue", type=int, default=64)
    args = parser.parse_args()
    model = Colors(args.seconds, args.leak)
    settings = Settings(port=args.port, batch=args.batch, queue=args.queue, receive_s=2, rate=1e6)
    with listen(settings) as listening, Gallery(model.runner, args.folder) as opened:
        serve_opened(model, opened, settings, listening)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
