"""A folder of pictures to gallery.json, which the page reads: ``python make_gallery.py FOLDER``."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
from pathlib import Path

import nformer_edge as ne
from nformer_edge.core.preprocess import load_image

KIT = Path(__file__).parent


def picture(path):
    """A small JPEG as a data: address."""
    image, file = load_image(path), io.BytesIO()
    image.thumbnail((112, 224))
    image.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def main(folder):
    with ne.open(KIT / "model") as model:
        found = model.embed(folder)
    gallery = {
        "manifest_sha256": hashlib.sha256((KIT / "model" / "manifest.json").read_bytes()).hexdigest(),
        "names": [Path(path).relative_to(folder).with_suffix("").as_posix() for path in found.paths],
        "pictures": [picture(path) for path in found.paths],
        "features": base64.b64encode(found.features.astype("<f4").tobytes()).decode(),
    }
    (KIT / "gallery.json").write_text(json.dumps(gallery))
    print(f"{len(found.paths)} pictures in {KIT / 'gallery.json'}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else sys.exit(__doc__))
