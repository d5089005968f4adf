"""Trees of tiny images with the names and counts of the published benchmarks, in full or scaled down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

Counts = tuple[int, int]  # people, images

MARKET_FOLDERS = ("bounding_box_train", "query", "bounding_box_test")


@dataclass(frozen=True)
class Published:
    """A benchmark's table.

    Args:
        folder: where its tree lies.
        train, query, gallery: people and images.
        cameras: in each split.
        name: of a file, from person, camera and a count.
        folders: of the splits.
        val: of the training images, those of MSMT17's list_val.txt.
    """

    folder: str
    train: Counts
    query: Counts
    gallery: Counts
    cameras: int
    name: Callable[[int, int, int], str]
    folders: tuple[str, str, str] = MARKET_FOLDERS
    val: int = 0

    def scaled(self, by: int) -> Published:
        """One `by`-th of everything but the cameras."""
        counts = [(max(2, p // by), max(2, p // by, i // by)) for p, i in (self.train, self.query, self.gallery)]
        return Published(self.folder, *counts, self.cameras, self.name, self.folders, self.val // by)


def _duke(pid: int, cam: int, n: int) -> str:
    return f"{pid:04d}_c{cam}_f{n:07d}.jpg"


def _cuhk(pid: int, cam: int, n: int) -> str:
    return f"{pid:04d}_c{cam}_{n}.png"


def _veri(pid: int, cam: int, n: int) -> str:
    return f"{pid:04d}_c{cam:03d}_{n:08d}_0.jpg"


def _msmt(pid: int, cam: int, n: int) -> str:
    return f"{pid - 1:04d}/{pid - 1:04d}_{n:03d}_{cam:02d}_0303morning_{n:04d}_0.jpg"


_MSMT = ((1041, 32621), (3060, 11659), (3060, 82161), 15, _msmt)

#: The tables of the papers and their archives. VeRi-776's own text says 576 training vehicles in 37,778 images.
PUBLISHED = {
    "DukeMTMC-reID": Published("DukeMTMC-reID", (702, 16522), (702, 2228), (1110, 17661), 8, _duke),
    "Occluded-Duke": Published("Occluded_Duke", (702, 15618), (519, 2210), (1110, 17661), 8, _duke),
    "CUHK03-NP (labeled)": Published("labeled", (767, 7368), (700, 1400), (700, 5328), 2, _cuhk),
    "CUHK03-NP (detected)": Published("detected", (767, 7365), (700, 1400), (700, 5332), 2, _cuhk),
    "VeRi-776": Published(
        "VeRi", (576, 37778), (200, 1678), (200, 11579), 20, _veri, ("image_train", "image_query", "image_test")
    ),
    "MSMT17 V1": Published("MSMT17_V1", *_MSMT, ("train", "test", "test"), 2373),
    "MSMT17 V2": Published("MSMT17_V2", *_MSMT, ("mask_train_v2", "mask_test_v2", "mask_test_v2"), 2373),
}


def write_published(root: Path, published: Published) -> Path:
    """Writes the tree below `root`; every file is an image of one pixel with bytes of its own."""
    packed = BytesIO()
    Image.new("RGB", (1, 1)).save(packed, "PNG")
    tree = root / published.folder
    count = 0
    for key, folder in zip(("train", "query", "gallery"), published.folders, strict=True):
        people, images = getattr(published, key)
        first = 1 if published.val or key == "train" else published.train[0] + 1  # MSMT17 counts anew
        lines = []
        for n in range(images):
            pid, cam = first + n % people, 1 + (n // people + n) % published.cameras
            count += 1
            name = published.name(pid, cam, count)
            file = tree / folder / name
            if n < people or not published.val:
                file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(packed.getvalue() + str(count).encode())
            lines.append(f"{name} {pid - 1}\n")
        if published.val:
            lists = {key: lines} if key != "train" else {"train": lines[published.val :], "val": lines[: published.val]}
            for name, part in lists.items():
                (tree / f"list_{name}.txt").write_text("".join(part))
    return tree
