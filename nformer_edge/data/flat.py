"""Market-1501, DukeMTMC-reID and CUHK03-NP: three folders of images whose names are the labels."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from nformer_edge.core.artifact import MANIFEST
from nformer_edge.core.errors import DataError
from nformer_edge.core.preprocess import SUFFIXES
from nformer_edge.data.files import is_image
from nformer_edge.data.records import JUNK, Dataset, ImageRecord

FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
_VERI_FOLDERS = {"train": "image_train", "query": "image_query", "gallery": "image_test"}

# Some files of the original Market-1501 archive end in .jpg.jpg.
_IMAGE = r"(?:\.(?:jpg|jpeg|png|bmp|webp|tiff?))+$"
MARKET1501 = re.compile(r"(-1|\d{4,18})_c(\d{1,18})s\d+_\d+_\d+" + _IMAGE, re.IGNORECASE)
DUKEMTMC = re.compile(r"(\d{4,18})_c(\d{1,18})_f\d+" + _IMAGE, re.IGNORECASE)
VERI776 = re.compile(r"(\d{4,18})_c(\d{1,18})_\d+_\d+" + _IMAGE, re.IGNORECASE)
CUHK03_NP = re.compile(r"(\d{4,18})_c(\d{1,18})_\d+" + _IMAGE, re.IGNORECASE)


def _image_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(str(folder), "no such folder", "a folder of images", "Unpack the dataset again.")
    names = sorted(filter(is_image, os.listdir(folder)))
    if not names:
        raise DataError(str(folder), "zero images", " ".join(SUFFIXES), "Unpack the dataset again.")
    return names


def _read_folder(folder: Path, pattern: re.Pattern[str], example: str) -> list[ImageRecord]:
    names = _image_names(folder)
    matches = [pattern.match(name) for name in names]
    bad = [name for name, match in zip(names, matches, strict=True) if match is None]
    if bad:
        count = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        got, hint = f"a name that does not parse{count}", "Rename or remove it, or name the dataset's layout."
        raise DataError(str(folder / bad[0]), got, f"one like {example}", hint)
    return [
        ImageRecord(os.path.join(folder, name), int(match[1]), int(match[2]))
        for name, match in zip(names, matches, strict=True)
        if match is not None
    ]


def _read(root: Path, name: str, pattern: re.Pattern[str], example: str, folders: dict[str, str] = FOLDERS) -> Dataset:
    splits = {split: _read_folder(root / folder, pattern, example) for split, folder in folders.items()}
    return Dataset(
        name,
        str(root),
        train=tuple(splits["train"]),
        query=tuple(splits["query"]),
        gallery=tuple(r for r in splits["gallery"] if r.pid != JUNK),
        junk=tuple(r for r in splits["gallery"] if r.pid == JUNK),
    )


def _has_names(folder: Path, pattern: re.Pattern[str]) -> bool:
    """Whether any image in `folder` has such a name: one stray file must not hide the layout from detection."""
    return folder.is_dir() and any(pattern.match(entry.name) for entry in os.scandir(folder))


def looks_like_market1501(root: Path) -> bool:
    return _has_names(root / FOLDERS["train"], MARKET1501)


def read_market1501(root: Path) -> Dataset:
    """Market-1501 (Zheng et al., ICCV 2015). In the gallery -1 is junk and 0 a distractor.

    A generated dataset has the same layout; its manifest tells it apart, so that no table names it Market-1501.
    """
    name = "generated" if _is_generated(root) else "Market-1501"
    return _read(root, name, MARKET1501, "0002_c1s1_000451_03.jpg")


def _is_generated(root: Path) -> bool:
    try:
        return bool(json.loads((root / MANIFEST).read_text())["kind"] == "dataset")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def looks_like_dukemtmc(root: Path) -> bool:
    return _has_names(root / FOLDERS["train"], DUKEMTMC)


def read_dukemtmc(root: Path) -> Dataset:
    """DukeMTMC-reID (Zheng et al., ICCV 2017). No junk; its 408 distractor identities keep their numbers.

    Occluded-Duke (Miao et al., ICCV 2019) is the same layout with other splits; its folder's name tells it apart.
    """
    name = "Occluded-Duke" if "occluded" in root.resolve().name.lower() else "DukeMTMC-reID"
    return _read(root, name, DUKEMTMC, "0001_c2_f0046182.jpg")


def looks_like_veri776(root: Path) -> bool:
    return _has_names(root / _VERI_FOLDERS["train"], VERI776)


def read_veri776(root: Path) -> Dataset:
    """VeRi-776 (Liu et al., ECCV 2016), vehicles. No junk, no distractors."""
    return _read(root, "VeRi-776", VERI776, "0002_c002_00030600_0.jpg", _VERI_FOLDERS)


def _cuhk03_np_root(root: Path) -> Path:
    return next((root / kind for kind in ("detected", "labeled") if (root / kind).is_dir()), root)


def looks_like_cuhk03_np(root: Path) -> bool:
    return _has_names(_cuhk03_np_root(root) / FOLDERS["train"], CUHK03_NP)


def read_cuhk03_np(root: Path) -> Dataset:
    """CUHK03 under the new protocol (Zhong et al., CVPR 2017). No junk, no distractors.

    `root` is the ``detected`` or ``labeled`` folder; of their parent, ``detected`` (the harder) is read.
    """
    chosen = _cuhk03_np_root(root)
    kind = f" ({chosen.name})" if chosen.name in ("detected", "labeled") else ""
    return _read(chosen, f"CUHK03-NP{kind}", CUHK03_NP, "0001_c1_2.png")
