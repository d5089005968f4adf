"""Workers of Ray Data: the same rows as one process, whoever dies (optional); and what is said without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nformer_edge.core.errors import BackendError, DataError
from nformer_edge.core.features import load_features
from nformer_edge.gallery.embed import embed_files


def test_without_ray_the_line_that_installs_it_is_named(
    tiny_bundle: Path, tiny_market: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendError, match=r"no ray here.*pip install 'nformer-edge\[ray\]'"):
        embed_files(tiny_bundle, tiny_market, tmp_path / "out.npz", workers=2)


def kill_a_worker(folder: Path, run: subprocess.Popen) -> int:
    """Kills a process of the run that has written a batch. Returns its number."""
    while run.poll() is None:
        for status in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                works = b"MapWorker" in status.read_bytes()
                if works and any(path.stat().st_size for path in folder.rglob("*") if path.is_file()):
                    os.kill(int(status.parent.name), signal.SIGKILL)
                    return int(status.parent.name)
            except OSError:
                continue
        time.sleep(0.05)
    return 0


@pytest.mark.optional
def test_a_killed_worker_changes_no_row(tiny_bundle: Path, tiny_market: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    embed_files(tiny_bundle, tiny_market, tmp_path / "alone.npz", batch=2, intra_op_threads=1)
    out = tmp_path / "ray.npz"
    command = [sys.executable, "-m", "nformer_edge.cli", "embed", str(tiny_bundle), "--data", str(tiny_market)]
    run = subprocess.Popen([*command, "-o", str(out), "--batch", "2", "--workers", "2"])
    killed = kill_a_worker(Path(f"{out}.journals"), run)
    assert run.wait(timeout=900) == 0
    assert killed
    alone, made = load_features(tmp_path / "alone.npz"), load_features(out)
    assert alone.keys() == made.keys()
    for split, features in alone.items():
        np.testing.assert_array_equal(made[split].features, features.features)
        assert (made[split].paths, made[split].hashes) == (features.paths, features.hashes)
    assert not Path(f"{out}.journals").exists()


@pytest.mark.optional
def test_an_image_that_cannot_be_read_ends_the_run_with_its_name(
    tiny_bundle: Path, tiny_market: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(Path(tiny_market).rglob("*.jpg"))[:6]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        embed_files(tiny_bundle, folder, tmp_path / "out.npz", batch=2, workers=1)
