"""The page of the web kit in Chromium (optional): features and ranking of Python, nothing from elsewhere.

It is driven by playwright-core of npm, and runs onnxruntime-web of npm: NODE_PATH names the folder that has both.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import nformer_edge as ne
from nformer_edge.metrics.agreement import row_errors
from nformer_edge.targets.kit import write_kit

pytestmark = pytest.mark.optional

#: Share of its norm that a row may be off: wasm sums in another order than x86.
WASM = 1e-5


@pytest.fixture(scope="module")
def kit(tiny_bundle, tiny_market, tmp_path_factory):
    """A kit with its gallery and its packages."""
    packages = Path(os.environ.get("NODE_PATH", "none"))
    missing = [name for name in ("chromium", "node") if shutil.which(name) is None]
    missing += [name for name in ("playwright-core", "onnxruntime-web") if not (packages / name).is_dir()]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: npm install playwright-core onnxruntime-web@1.30.0, then set NODE_PATH")
    folder = write_kit("web", tiny_bundle, tmp_path_factory.mktemp("web") / "kit").path
    pinned = json.loads((folder / "package.json").read_text())["dependencies"]["onnxruntime-web"]
    assert json.loads((packages / "onnxruntime-web" / "package.json").read_text())["version"] == pinned
    (folder / "node_modules").symlink_to(packages)
    subprocess.run([sys.executable, folder / "make_gallery.py", tiny_market / "bounding_box_test"], check=True)
    return folder


@contextlib.contextmanager
def served(folder):
    """Its address on the loopback."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def seen(kit, folder, *pictures):
    """What the page showed and said."""
    script = Path(__file__).with_name("kit_page.cjs")
    with served(kit) as address:
        command = ["node", script, shutil.which("chromium"), address, folder / "page.png", *pictures]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_the_page_ranks_as_python_and_asks_nobody_else(kit, tiny_bundle, tiny_market, tmp_path):
    pictures = sorted(map(str, (tiny_market / "query").glob("*.jpg")))[:3]
    page = seen(kit, tmp_path, *pictures)
    assert (page["wrong"], page["elsewhere"]) == ([], [])
    with ne.open(tiny_bundle) as model:
        assert row_errors(np.array(page["features"]), model.embed(pictures).features).max() <= WASM
        gallery = model.gallery()
        gallery.add(str(tiny_market / "bounding_box_test"))
        expected = gallery.search(pictures, head=False)
    for shown, paths, scores in zip(page["matches"], expected.paths, expected.scores, strict=True):
        names, cosines = zip(*(caption.rsplit(" ", 1) for caption in shown), strict=True)
        assert names == tuple(Path(path).stem for path in paths)
        np.testing.assert_allclose(np.array(cosines, float), scores, rtol=0, atol=6e-5)


@pytest.mark.parametrize("damaged", ["model/backbone.onnx", "model/manifest.json", "gallery.json"])
def test_what_is_of_another_model_is_refused(damaged, kit, tmp_path):
    other = tmp_path / "kit"
    shutil.copytree(kit, other, symlinks=True)
    if damaged == "gallery.json":
        gallery = json.loads((other / damaged).read_text())
        (other / damaged).write_text(json.dumps(gallery | {"manifest_sha256": "0" * 64}))
    else:
        (other / damaged).write_bytes((other / damaged).read_bytes() + b" ")
    [said] = seen(other, tmp_path)["said"]
    assert said.startswith(f"Error: {damaged}")
