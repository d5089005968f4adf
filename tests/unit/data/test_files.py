"""One rule for what an image file is, and all damaged images named in one run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nformer_edge.core.errors import DataError
from nformer_edge.data.files import bad_images, has_images, is_image, require_images, walk_images


@pytest.mark.parametrize("name", ["a.jpg", "A.JPEG", "b.tif", "c.webp", "x.jpg.jpg"])
def test_images_are_known_by_their_suffix(name: str) -> None:
    assert is_image(name)


@pytest.mark.parametrize("name", ["._a.jpg", "Thumbs.db", ".DS_Store", "a.txt", "jpg"])
def test_what_other_programs_leave_is_no_image(name: str) -> None:
    assert not is_image(name)


def test_a_walk_passes_over_folders_of_other_programs_follows_links_once_and_counts(tmp_path: Path) -> None:
    for file in ("b/1.jpg", "b/2/3.png", "@eaDir/1.jpg", "__MACOSX/b/._1.jpg", "b/.ipynb_checkpoints/1.jpg", "n.txt"):
        (tmp_path / "x" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / file).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "9.jpg").touch()
    (tmp_path / "x" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "x" / "b" / "up").symlink_to(tmp_path / "x")
    found = walk_images(tmp_path / "x")
    assert [Path(p).relative_to(tmp_path / "x").as_posix() for p in found.images] == [
        "b/1.jpg",
        "b/2/3.png",
        "linked/9.jpg",
    ]
    assert found.passed_over == 4
    assert has_images(tmp_path / "x")
    (tmp_path / "none" / "a").mkdir(parents=True)
    for name in "bcde":
        (tmp_path / "none" / "a" / name).symlink_to(tmp_path / "none")
    assert not has_images(tmp_path / "none")


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8)
    paths = [str(tmp_path / f"{i}.{'jpg' if i % 2 else 'png'}") for i in range(8)]
    for path in paths:
        Image.fromarray(pixels).save(path)
    return paths


@pytest.mark.parametrize("decode", [False, True])
def test_all_cut_empty_and_foreign_files_are_named_in_order(images: list[str], decode: bool) -> None:
    assert bad_images(images, decode) == ()
    require_images(images)
    for row in (1, 4):
        data = Path(images[row]).read_bytes()
        Path(images[row]).write_bytes(data[: len(data) // 2])
    Path(images[6]).write_bytes(b"")
    assert [bad.path for bad in bad_images(images, decode)] == [images[1], images[4], images[6]]
    with pytest.raises(DataError, match="3 of 8 that cannot be read") as error:
        require_images(images)
    assert all(images[row] in str(error.value) for row in (1, 4, 6))


def test_damage_inside_a_whole_file_is_found_by_decoding(images: list[str]) -> None:
    data = bytearray(Path(images[0]).read_bytes())
    data[200:400] = bytes(200)
    Path(images[0]).write_bytes(bytes(data))
    assert [bad.path for bad in bad_images(images, decode=True)] == [images[0]]
