"""The Triton kit in a real Triton (optional): nvidia-pytriton's, of whose environment PYTRITON names the Python."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import nformer_edge as ne
from nformer_edge.backends.open import open_model
from nformer_edge.data.batches import iter_batches
from nformer_edge.targets.kit import write_kit

ASKS = Path(__file__).with_name("triton_asks.py")
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
SYSTEM = f"/usr/bin/python{VERSION}"  # the stub of Triton's python backend loads its shared library

pytestmark = pytest.mark.optional


@pytest.fixture(scope="module")
def environment():
    """The Python with tritonclient, and its site-packages."""
    found = os.environ.get("PYTRITON", "")
    if not found:
        pytest.skip(
            "no Triton: pip install nvidia-pytriton==0.7.0 onnxruntime Pillow tqdm, then set PYTRITON to its python"
        )
    told = subprocess.run([found, "-c", "import pytriton; print(pytriton.__path__[0])"], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return found, Path(told.stdout.strip()).parent


@pytest.fixture(scope="module")
def kit(tiny_bundle, tmp_path_factory):
    return write_kit("triton", tiny_bundle, tmp_path_factory.mktemp("triton") / "kit").path


def asked(python, *arguments):
    ran = subprocess.run([python, ASKS, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def server(environment, kit, tmp_path_factory):
    """Triton with its python backend alone, and this package where its stub looks; yields both addresses."""
    if not Path(SYSTEM).exists():
        pytest.skip(f"no {SYSTEM}, whose library Triton's python backend loads")
    _, packages = environment
    home = tmp_path_factory.mktemp("server")
    subprocess.run([SYSTEM, "-m", "venv", "--without-pip", home / "env"], check=True)
    shutil.copytree(Path(ne.__file__).parent, home / "site" / "nformer_edge")
    kernels = importlib.util.find_spec("nformer_edge.ops._kernels")
    if kernels is None or not kernels.origin:
        pytest.skip("no compiled kernels, which a search with the head needs")
    shutil.copy(kernels.origin, home / "site" / "nformer_edge" / "ops")
    paths = f"{packages}\n{home / 'site'}\n"
    (home / "env" / "lib" / f"python{VERSION}" / "site-packages" / "kit.pth").write_text(paths)
    triton = packages / "pytriton" / "tritonserver"
    shutil.copytree(triton / "backends", home / "backends")
    stub = shutil.copy(
        triton / "python_backend_stubs" / VERSION / "triton_python_backend_stub", home / "backends/python"
    )
    os.chmod(stub, 0o755)
    config = kit / "models" / "backbone" / "config.pbtxt"
    config.write_text(config.read_text().replace('backend: "onnxruntime"', 'backend: "python"'))
    http, grpc = free_port(), free_port()
    command = [
        *(triton / "bin" / "tritonserver", f"--model-repository={kit / 'models'}", "--disable-auto-complete-config"),
        *(f"--backend-directory={home / 'backends'}", "--model-control-mode=explicit", "--allow-metrics=false"),
        *("--load-model=backbone", "--load-model=gallery", f"--http-port={http}", f"--grpc-port={grpc}"),
        *("--http-address=127.0.0.1", "--grpc-address=127.0.0.1"),
    ]
    settings = {
        "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
        "PATH": f"{home / 'env' / 'bin'}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(home / "cache"),
    }
    with (home / "log").open("w") as log:
        running = subprocess.Popen(command, cwd=home, env=os.environ | settings, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 90
            while "Started HTTPService" not in (text := (home / "log").read_text()):
                assert running.poll() is None, text[-3000:]
                assert time.monotonic() < end, text[-3000:]
                time.sleep(0.2)
            yield f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        finally:
            running.terminate()
            running.wait(60)


def test_tritons_own_parser_reads_every_configuration(environment, kit):
    read = asked(environment[0], "configurations", kit)
    assert sorted(read) == ["backbone", "gallery", "nformer"]
    assert "dynamicBatching" in read["backbone"]
    assert read["backbone"]["maxBatchSize"] == 32
    for name in ("nformer", "gallery"):
        assert "dynamicBatching" not in read[name]
        assert read[name].get("maxBatchSize", 0) == 0
    head = {tensor["name"]: (tensor["dataType"], tensor["dims"]) for tensor in read["nformer"]["input"]}
    assert head == {"features": ("TYPE_FP32", ["-1", "32"]), "landmarks": ("TYPE_INT32", ["2", "-1"])}


def test_triton_answers_what_python_answers(environment, server, kit, tiny_bundle, tiny_market, tmp_path):
    files = sorted(map(str, (tiny_market / "bounding_box_test").glob("*.jpg")))
    with open_model(tiny_bundle) as runner:
        [images] = iter_batches(files[:7], runner.spec.preprocess, 32)
        features = runner.embed(images)
    np.save(tmp_path / "images.npy", images)
    said = asked(environment[0], "answers", kit, *server, tmp_path / "images.npy", *files)
    for protocol in ("http", "grpc"):
        np.testing.assert_allclose(said[protocol], features, rtol=0, atol=1e-5 * np.abs(features).max())
    with ne.open(tiny_bundle) as model:
        gallery = model.gallery()
        gallery.add(files[1:], ids=[f"person {i % 3}" for i in range(len(files) - 1)])
        for head in (False, True):
            expected, found = gallery.search(files[:1], top=4, head=head), said[f"head {head}"]
            assert found["ids"] == [list(row) for row in expected.ids]
            np.testing.assert_allclose(found["scores"], expected.scores, rtol=0, atol=1e-5)
            assert found["protocol"] == expected.protocol
    assert "expected add | search" in said["refused"]
    assert said["stats"]["images"] == len(files) - 1
