"""The C header for programs without Python gives what the package gives, and the vectors in docs/deploy.md."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nformer_edge.core.preprocess import normalize, resize
from nformer_edge.core.spec import PreprocessSpec
from nformer_edge.ops.contract import draw_landmarks

ROOT = Path(__file__).parents[3]
COMPILER = shutil.which("cc")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler (cc)")

#: The header's functions are static: a program includes them. These make them callable from here.
_DOORS = """
#include "nformer_inputs.h"
void landmarks(uint32_t n, int layers, int count, uint64_t seed, int32_t *out, int32_t *touched) {
  nformer_landmarks(n, layers, count, seed, out, touched);
}
int resize(const uint8_t *p, int w, int h, uint8_t *out, int ow, int oh) {
  return nformer_resize(p, w, h, out, ow, oh);
}
void normalize(const uint8_t *p, int w, int h, const float *mean, const float *std, int bgr, float *out) {
  nformer_normalize(p, w, h, mean, std, bgr, out);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c")
    (folder / "doors.c").write_text(_DOORS)
    strict = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-shared", "-fPIC"]
    command = [COMPILER, *strict, "-I", str(ROOT / "export" / "c"), "doors.c", "-o", "doors.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "doors.so"))


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def landmarks(library, num_images, layers, count, seed):
    out, touched = np.empty((layers, count), np.int32), np.empty(2 * count, np.int32)
    library.landmarks(num_images, layers, count, ctypes.c_uint64(seed), pointer(out), pointer(touched))
    return out


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 3])
@pytest.mark.parametrize(("num_images", "layers", "count"), [(1, 1, 1), (3, 2, 8), (144, 4, 5), (20_000, 2, 256)])
def test_landmarks_in_c_are_those_of_the_package(library, num_images, layers, count, seed):
    expected = draw_landmarks(num_images, layers, count, seed)
    np.testing.assert_array_equal(landmarks(library, num_images, layers, count, seed), expected)


def test_the_vectors_of_the_page_are_those_of_the_rule():
    page = (ROOT / "docs" / "deploy.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| `(\[\[.*\]\])` \|$", page, re.M)
    assert len(rows) >= 4
    for *given, listed in rows:
        assert str(draw_landmarks(*map(int, given)).tolist()) == listed


@pytest.mark.parametrize(
    ("size", "middle"),
    [
        ((64, 128), (128, 128)),
        ((61, 133), (128, 133)),
        ((384, 700), (128, 700)),
        ((1, 1), (128, 1)),
        ((300, 900), (300, 256)),
        ((3, 900), (3, 256)),
    ],
)
def test_the_resize_in_c_is_pillows_to_the_bit(library, size, middle):
    width, height = size
    spec = PreprocessSpec(256, 128)
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    out = np.empty((spec.height, spec.width, 3), np.uint8)
    assert library.resize(pointer(pixels), width, height, pointer(out), spec.width, spec.height) == 0
    image = Image.fromarray(pixels)
    np.testing.assert_array_equal(out, resize(image.resize(middle, Image.Resampling.BILINEAR), spec))
    whole = resize(image, spec).astype(int)  # Pillow 12 has another order
    assert np.abs(out - whole).max() <= 1


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_the_normalization_in_c_is_that_of_the_package(library, channels):
    spec = PreprocessSpec(32, 16, channels=channels)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 16, 3), np.uint8)
    out = np.empty((3, 32, 16), np.float32)
    mean, std = (np.array(x, np.float32) for x in (spec.mean, spec.std))
    library.normalize(pointer(pixels), 16, 32, pointer(mean), pointer(std), int(channels == "BGR"), pointer(out))
    np.testing.assert_allclose(out, normalize(pixels, spec), rtol=0, atol=1e-6)
