"""Generated people in a gallery, and the page that searches it. Run it by ``make serve-demo``.

The model is that of ``make demo`` where it has run, or else a tiny one, made in a minute, whose accuracy means nothing.
"""

from __future__ import annotations

import sys
import threading
import webbrowser
from pathlib import Path

import nformer_edge as ne
from nformer_edge.data.readers import read_dataset
from nformer_edge.demo import run_demo
from nformer_edge.gallery.service.server import serve
from nformer_edge.gallery.service.settings import Settings

PORT = 8000


def main(demo: Path, out: Path) -> None:
    """Fills a gallery in `out` from the demo's people, and serves it until it is interrupted."""
    if not (demo / "engine-fp32").is_dir():
        demo = out / "demo"
    if not (demo / "engine-fp32").is_dir():
        run_demo(demo, tiny=True)
    people = read_dataset(demo / "data").gallery
    with ne.open(demo / "engine-fp32") as model, model.gallery(out / "gallery", thumbnails=True, audit=True) as gallery:
        if not len(gallery):
            shown = [p for p in people if p.pid > 0]
            ids, cameras = [f"person {p.pid}" for p in shown], [p.camid for p in shown]
            print(gallery.add([p.path for p in shown], ids=ids, cameras=cameras))
    print(f"Drop a picture from {demo / 'data' / 'query'} onto http://127.0.0.1:{PORT}")
    threading.Timer(2, webbrowser.open, [f"http://127.0.0.1:{PORT}"]).start()
    serve(demo / "engine-fp32", out / "gallery", Settings(port=PORT, purpose="generated people, for a look"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
