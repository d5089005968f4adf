"""One preprocessing for evaluation, calibration, training and runtime."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nformer_edge.core import preprocess
from nformer_edge.core.errors import DataError
from nformer_edge.core.spec import PreprocessSpec

SPEC = PreprocessSpec(height=32, width=16)


def save(path: Path, size: tuple[int, int] = (20, 40), mode: str = "RGB") -> Path:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_pixels_become_normalized_planes(tmp_path: Path) -> None:
    Image.new("RGB", (16, 32), (255, 128, 0)).save(tmp_path / "a.png")
    planes = preprocess.preprocess_files([tmp_path / "a.png"], SPEC)
    assert planes.shape == (1, 3, 32, 16)
    assert planes.dtype == np.float32
    expected = (np.array([255, 128, 0]) / 255 - SPEC.mean) / SPEC.std
    np.testing.assert_allclose(planes[0, :, 5, 5], expected, rtol=1e-6)


def test_bgr_swaps_the_planes_and_takes_the_mean_in_its_own_order(tmp_path: Path) -> None:
    Image.new("RGB", (16, 32), (255, 128, 0)).save(tmp_path / "a.png")
    spec = PreprocessSpec(32, 16, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0), channels="BGR")
    planes = preprocess.preprocess_files([tmp_path / "a.png"], spec)
    np.testing.assert_allclose(planes[0, :, 0, 0], np.array([0, 128, 255]) / 255 - (0.1, 0.2, 0.3), atol=1e-6)


def test_an_image_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.png"), save(tmp_path / "b.png", (31, 77))
    together = preprocess.preprocess_files([a, b], SPEC)
    np.testing.assert_array_equal(together[1], preprocess.preprocess_files([b], SPEC)[0])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_other_color_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    assert preprocess.preprocess_files([save(tmp_path / "a.png", mode=mode)], SPEC).shape == (1, 3, 32, 16)


@pytest.mark.parametrize("suffix", preprocess.SUFFIXES)
def test_the_four_formats_are_read(tmp_path: Path, suffix: str) -> None:
    assert preprocess.load_image(save(tmp_path / f"a{suffix}")).size == (20, 40)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a file of another kind"):
        preprocess.load_image(save(tmp_path / "a.gif"))


def test_files_that_are_no_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(DataError, match=r"empty\.jpg: got an empty file"):
        preprocess.load_image(tmp_path / "empty.jpg")
    with pytest.raises(DataError, match="no such file"):
        preprocess.load_image(tmp_path / "none.jpg")
    with pytest.raises(DataError, match="damaged or unreadable"):
        preprocess.load_image(tmp_path)


def test_a_truncated_image_is_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.jpg", (200, 400)).read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged or unreadable"):
        preprocess.load_image(tmp_path / "b.jpg")


def test_huge_images_are_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png")
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 799)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match="20 x 40 pixels"):
        preprocess.load_image(path)


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(png)
    with pytest.raises(DataError, match="expected at most"):
        preprocess.load_image(tmp_path / "bomb.png")


def test_no_files_give_an_empty_batch() -> None:
    assert preprocess.preprocess_files([], SPEC).shape == (0, 3, 32, 16)


def upright(pixels: int = 16) -> np.ndarray:
    image = np.zeros((2 * pixels, pixels, 3), np.uint8)
    image[:pixels, :, 0], image[:, : pixels // 2, 1] = 200, 100
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_an_image_is_read_as_a_viewer_turns_it(tmp_path: Path, orientation: int, suffix: str) -> None:
    seen = Image.fromarray(upright())
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that undoes each orientation
    stored = seen if orientation == 1 else seen.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **({"quality": 100} if suffix in ("jpg", "webp") else {}))
    read = np.asarray(preprocess.load_image(tmp_path / f"a.{suffix}"), int)
    assert read.shape == (32, 16, 3)
    assert np.abs(read - upright()).mean() <= 6, "JPEG and WebP blur the edges"


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_gray_becomes_its_upper_8_bits(tmp_path: Path, suffix: str) -> None:
    values = np.arange(0, 65536, 32, dtype=np.uint16).reshape(32, 64)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    read = np.asarray(preprocess.load_image(tmp_path / f"a.{suffix}"))
    assert np.array_equal(read, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_32_bit_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "a.tif")
    Image.fromarray(np.full((4, 4), 1 << 20, np.int32)).save(tmp_path / "b.tif")
    for name in "ab":
        with pytest.raises(DataError, match="32-bit pixels"):
            preprocess.load_image(tmp_path / f"{name}.tif")


def test_the_first_page_of_a_tiff_is_read(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (8, 16), color) for color in ("red", "blue")]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert preprocess.load_image(tmp_path / "a.tif").getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_the_stated_color(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (10, 10, 10, 0))
    image.paste((10, 10, 10, 255), (0, 0, 4, 8))
    image.convert(mode).save(tmp_path / "a.png")
    read = preprocess.load_image(tmp_path / "a.png")
    assert read.getpixel((6, 3)) == preprocess.BACKGROUND
    assert read.getpixel((1, 3)) == (10, 10, 10)


def test_cmyk_palette_and_1_bit_keep_their_colors(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    Image.new("RGB", (16, 16), (255, 0, 0)).quantize(4).save(tmp_path / "b.png")
    Image.new("1", (16, 16), 1).save(tmp_path / "c.png")
    for name, color in (("a.jpg", (255, 0, 0)), ("b.png", (255, 0, 0)), ("c.png", (255, 255, 255))):
        assert np.abs(np.subtract(preprocess.load_image(tmp_path / name).getpixel((5, 5)), color)).max() <= 3, name


def test_damaged_exif_does_not_refuse_the_picture(tmp_path: Path) -> None:
    Image.fromarray(upright()).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert preprocess.load_image(tmp_path / "a.jpg").size == (16, 32)


def test_a_side_over_the_limit_is_refused_before_decoding(tmp_path: Path) -> None:
    Image.new("1", (preprocess.MAX_SIDE + 1, 1)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=f"{preprocess.MAX_SIDE} a side"):
        preprocess.check_image(tmp_path / "a.png")


def test_a_fifo_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="got a device or a FIFO"):
        preprocess.load_image(tmp_path / "a.jpg")


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    """Four threads; with every image large, no two are being decoded at once."""
    busy, most = [], []
    real = preprocess.as_seen

    def watched(image, name):
        busy.append(name)
        most.append(len(busy))
        try:
            return real(image, name)
        finally:
            busy.remove(name)

    monkeypatch.setattr(preprocess, "as_seen", watched)
    monkeypatch.setattr(preprocess, "_LARGE_BYTES", 0)
    files = [tmp_path / f"{i}.png" for i in range(8)]
    for file in files:
        Image.new("RGB", (200, 200)).save(file)
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(lambda file: preprocess.load_resized(file, PreprocessSpec(64, 32)), files))) == 8
    assert max(most) == 1
