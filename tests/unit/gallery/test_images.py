"""Images as callers have them give the numbers that the file gives, and what is no image is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.preprocess import preprocess_files
from nformer_edge.core.spec import PreprocessSpec
from nformer_edge.data.batches import iter_batches
from nformer_edge.gallery.images import image_sources

SPEC = PreprocessSpec(64, 32)
FRAME = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)


def batch(images, boxes=None):
    return np.concatenate([*iter_batches(image_sources(images, boxes), SPEC, 2)])


@pytest.fixture
def file(tmp_path):
    Image.fromarray(FRAME).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_file_pil_image_and_array_give_the_same_bits(file):
    expected = preprocess_files([file], SPEC)
    for image in (file, str(file), Image.open(file), FRAME, FRAME[None], [FRAME], [str(file)], (Image.open(file),)):
        np.testing.assert_array_equal(batch(image), expected)
    np.testing.assert_array_equal(batch([FRAME, file, Image.open(file)]), np.repeat(expected, 3, axis=0))
    np.testing.assert_array_equal(batch(FRAME[::-1, ::-1]), batch(np.ascontiguousarray(FRAME[::-1, ::-1])))


def test_a_folder_stands_for_its_images_in_order(file):
    Image.fromarray(FRAME[::-1]).save(file.parent / "b.png")
    np.testing.assert_array_equal(batch(file.parent), preprocess_files([file, file.parent / "b.png"], SPEC))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_a_pil_image_of_another_mode_is_converted_as_its_file_is(mode, tmp_path):
    image = Image.fromarray(FRAME).convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    np.testing.assert_array_equal(batch(Image.open(path)), preprocess_files([path], SPEC))


@pytest.mark.parametrize(
    "boxes", [[[10, 20, 40, 80], [0, 0, 70, 90]], np.array([[10.9, 20.2, 39.1, 79.5], [-5, -9, 99, 95]])]
)
def test_boxes_are_cut_out_of_the_frame_and_cut_off_at_its_edge(boxes, file):
    expected = batch([FRAME[20:80, 10:40], FRAME])
    for frame in (FRAME, file, Image.open(file)):
        np.testing.assert_array_equal(batch(frame, boxes), expected)


def test_a_frame_without_boxes_has_no_image():
    assert image_sources(FRAME, []) == image_sources(FRAME, np.empty((0, 4))) == []


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([5, 5, 5, 9], r"boxes\[1\]: got an empty box, \[5.0, 5.0, 5.0, 9.0\]"),
        ([9, 5, 5, 9], r"boxes\[1\]: got an empty box"),
        ([5, 5, np.nan, 9], r"boxes\[1\]: got NaN or infinity"),
        ([5, 5, np.inf, 9], r"boxes\[1\]: got NaN or infinity"),
        ([70, 5, 80, 9], r"boxes\[1\]: got a box outside the frame.*70 x 90 pixels"),
        ([-9, 5, 0, 9], r"boxes\[1\]: got a box outside the frame"),
    ],
)
def test_a_box_that_shows_nobody_is_refused_by_its_row(box, message):
    with pytest.raises(DataError, match=message):
        image_sources(FRAME, [[0, 0, 9, 9], box])


def test_boxes_need_one_frame_and_four_numbers():
    with pytest.raises(UsageError, match=r"boxes: got shape \[4\], expected \[N, 4\]"):
        image_sources(FRAME, [0, 0, 9, 9])
    with pytest.raises(UsageError, match="boxes: got rows of unlike length"):
        image_sources(FRAME, [[0, 0, 9, 9], [1, 2]])
    with pytest.raises(
        UsageError, match=r"got all between 0 and 1, expected pixels\. Multiply x by the frame.s width, 70"
    ):
        image_sources(FRAME, [[0.1, 0.2, 0.5, 0.9]])
    with pytest.raises(UsageError, match="boxes: got 2 images, expected one frame"):
        image_sources([FRAME, FRAME], [[0, 0, 9, 9]])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (FRAME.astype(np.float32), r"float32 \[90, 70, 3\], expected uint8 .*astype\(np.uint8\)"),
        (FRAME[..., 0], r"uint8 \[90, 70\], expected .*Repeat the gray channel"),
        (FRAME.transpose(2, 0, 1), r"Put the channels last"),
        (np.concatenate([FRAME, FRAME[..., :1]], axis=2), r"Leave out the fourth channel"),
        (FRAME[:0], r"uint8 \[0, 70, 3\], expected uint8"),
        (3, r"images\[0\]: got int, expected paths, PIL images"),
    ],
)
def test_what_is_no_image_is_refused_with_a_hint(image, message):
    with pytest.raises(UsageError, match=message):
        image_sources(image)
    with pytest.raises(UsageError, match=r"images\[1\]: "):
        image_sources([FRAME, image])


def test_a_damaged_pil_image_is_refused_by_its_number(file):
    file.write_bytes(file.read_bytes()[:999])
    with Image.open(file) as image, pytest.raises(DataError, match=r"images\[1\]: got a damaged image"):
        image_sources([FRAME, image])


def test_a_folder_of_images_of_another_kind_is_refused_by_their_suffix(tmp_path):
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"got zero images.*Convert what is there \(.gif\)"):
        image_sources(tmp_path)


@pytest.mark.parametrize("none", [[], (), FRAME[None][:0]])
def test_no_image_is_refused(none):
    with pytest.raises(UsageError, match="images: got an empty list"):
        image_sources(none)
