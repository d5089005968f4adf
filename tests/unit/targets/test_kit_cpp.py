"""The C++ kit, built by CMake and run (optional): the features, matches and refusals of Python."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nformer_edge as ne
from nformer_edge.core.artifact import sha256_file
from nformer_edge.exporting.export import export_bundle
from nformer_edge.metrics.agreement import ROUNDING, row_errors
from nformer_edge.targets.kit import write_kit

pytestmark = pytest.mark.optional

HEADERS = {"turbojpeg.h": "libturbojpeg0-dev", "nlohmann/json.hpp": "nlohmann-json3-dev", "openssl/evp.h": "libssl-dev"}


def runtime(name):
    """CMake's flag for a runtime that is here."""
    if name == "onnxruntime":
        found = os.environ.get("ORT_ROOT") or pytest.skip("no onnxruntime for C++: set ORT_ROOT (the kit's README)")
        return f"-DORT_ROOT={found}"
    if name == "tensorrt":
        found = os.environ.get("TENSORRT_ROOT") or pytest.skip("no TensorRT headers: set TENSORRT_ROOT")
        return f"-DTENSORRT_ROOT={found}"
    found = importlib.util.find_spec("openvino") or pytest.skip("no openvino")
    return f"-DOpenVINO_DIR={Path(found.origin).parent / 'cmake'}"


def build(kit, *flags):
    """The program; what CMake says where it fails."""
    for command in (["cmake", "-S", kit, "-B", kit / "build", *flags], ["cmake", "--build", kit / "build"]):
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "warning" not in ran.stdout + ran.stderr
    return kit / "build" / "reid"


def missing():
    """What the build needs and is not here, by the names of programs and of Debian's packages."""
    packages = [package for header, package in HEADERS.items() if not Path("/usr/include", header).exists()]
    return [name for name in ("cmake", "c++") if shutil.which(name) is None] + packages


@pytest.fixture(scope="module", params=["openvino", "onnxruntime"])
def kit(request, tiny_bundle, tmp_path_factory):
    """A built kit, the flag that it was built with, and its program."""
    if missing():
        pytest.skip(f"no {', '.join(missing())}")
    flag = runtime(request.param)
    folder = write_kit("cpp", tiny_bundle, tmp_path_factory.mktemp("cpp") / "kit").path
    return folder, flag, build(folder, flag)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """JPEGs of several sizes, samplings and kinds."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    sizes = ((32, 64), (33, 67), (200, 401), (16, 500))
    for i, size in enumerate(sizes):
        small = Image.fromarray(draw.integers(0, 256, (12, 6, 3), np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90, subsampling=i % 3)
    with Image.open(folder / "2.jpg") as image:
        image.save(folder / "progressive.jpg", progressive=True)
        image.convert("L").save(folder / "gray.jpg")
    return [str(path) for path in sorted(folder.glob("*.jpg"))]


def features_of(program, folder, pictures):
    ran = subprocess.run([program, "--features", folder / "features", *pictures], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return np.fromfile(folder / "features", np.float32).reshape(len(pictures), -1)


def test_features_are_those_of_python(kit, pictures, tiny_bundle, tmp_path):
    with ne.open(tiny_bundle) as model:
        expected = model.embed(pictures).features
    found = features_of(kit[2], tmp_path, pictures)
    assert row_errors(found, expected).max() <= ROUNDING
    assert row_errors(found, expected[::-1]).max() > 100 * ROUNDING


def test_matches_are_those_of_python(kit, pictures, tiny_bundle):
    ran = subprocess.run([kit[2], *pictures], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = [line.split() for line in ran.stdout.splitlines()]
    with ne.open(tiny_bundle) as model:
        expected = model.gallery()
        expected.add(pictures[1:])
        expected = expected.search(pictures[:1], head=False)
    assert [line[2] for line in found] == list(expected.ids[0])
    np.testing.assert_allclose([float(line[1]) for line in found], expected.scores[0], rtol=0, atol=6e-5)


def test_what_is_no_whole_upright_jpeg_is_refused(kit, pictures, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(Path(pictures[2]).read_bytes()[:600])
    (tmp_path / "text.jpg").write_text("no picture")
    with Image.open(pictures[0]) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(tmp_path / "side.jpg", exif=exif)
    for name in ("cut.jpg", "text.jpg", "side.jpg", "missing.jpg"):
        refused(kit[2], name, pictures[0], tmp_path / name)


def test_a_graph_that_takes_pixels_gets_pixels(kit, pictures, tiny_checkpoint, tmp_path):
    bundle = export_bundle(tiny_checkpoint, tmp_path / "b", input="uint8", input_layout="NHWC", input_channels="BGR")
    digest = sha256_file(bundle / "manifest.json")
    program = build(kit[0], kit[1], f"-DMODEL={bundle}", f"-DMANIFEST_SHA256={digest}")
    with ne.open(bundle) as model:
        expected = model.embed(pictures).features
    assert row_errors(features_of(program, tmp_path, pictures), expected).max() <= ROUNDING
    graph = bundle / "backbone.onnx"
    graph.write_bytes(graph.read_bytes() + b"!")
    refused(program, "backbone.onnx: sha256", *pictures)
    (bundle / "manifest.json").write_text((bundle / "manifest.json").read_text() + " ")
    refused(program, "manifest.json: sha256", *pictures)


@pytest.mark.parametrize(
    ("flag", "lacks"),
    [("-DORT_ROOT={}", "onnxruntime_cxx_api.h"), ("-DTENSORRT_ROOT={}", "NvInfer.h|CUDAToolkit"), ("", "OpenVINO")],
)
def test_cmake_names_the_runtime_that_is_not_there(flag, lacks, tiny_bundle, tmp_path):
    if missing():
        pytest.skip(f"no {', '.join(missing())}")
    folder = write_kit("cpp", tiny_bundle, tmp_path / "kit").path
    flags = [flag.format(tmp_path)] if flag else []
    ran = subprocess.run(["cmake", "-S", folder, "-B", tmp_path / "build", *flags], capture_output=True, text=True)
    assert ran.returncode == 1
    assert re.search(lacks, ran.stderr)


def refused(program, why, *pictures):
    ran = subprocess.run([program, *map(str, pictures)], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert why in ran.stderr
