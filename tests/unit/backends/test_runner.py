"""The door of every runner's `embed`: arrays that are not what they should be."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from nformer_edge.backends.runner import check_images
from nformer_edge.core.preprocess import normalize
from nformer_edge.core.spec import BackboneSpec, ModelSpec, PreprocessSpec

SPEC = ModelSpec(BackboneSpec("osnet_x0_25", 512, "fc"), None, PreprocessSpec(height=16, width=16))
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize(("scale", "looks"), [(1, "0..255"), (255, "0..1")])
def test_pixels_that_nobody_normalized_are_questioned(scale, looks):
    images = (PIXELS / scale).astype(np.float32).transpose(0, 3, 1, 2)
    with pytest.warns(UserWarning, match=rf"look like pixels in {looks}; .* minus mean .* RGB"):
        check_images(images, SPEC)


@pytest.mark.parametrize("pixels", [PIXELS, np.full_like(PIXELS, 255), np.zeros_like(PIXELS)])
def test_normalized_images_are_not(pixels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_images(normalize(pixels, SPEC.preprocess), SPEC)
        check_images(np.zeros((1, 3, 16, 16), np.float32), SPEC)


def test_a_model_that_takes_0_to_1_is_given_that():
    plain = PreprocessSpec(height=16, width=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    spec = ModelSpec(SPEC.backbone, None, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_images(normalize(PIXELS, plain), spec)
