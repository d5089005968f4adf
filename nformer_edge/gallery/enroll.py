"""A folder of images, a dataset or a feature store comes into a gallery."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from nformer_edge.core.errors import UsageError
from nformer_edge.core.features import UNKNOWN, Features
from nformer_edge.core.spec import check_choice
from nformer_edge.data.readers import read_dataset
from nformer_edge.data.records import Dataset, ImageRecord
from nformer_edge.gallery.gallery import Gallery
from nformer_edge.gallery.held import Time
from nformer_edge.gallery.images import Images
from nformer_edge.gallery.results import Changed


def add_data(
    gallery: Gallery,
    data: Dataset | str | os.PathLike[str],
    *,
    name: str | None = None,
    ids_from: Literal["labels", "folder", "file"] = "labels",
    camera: int | None = None,
    time: Time | None = None,
    batch: int = 32,
) -> Changed:
    """Adds a folder of images, a dataset (its gallery, or else all of it) or a feature store to a gallery.

    Args:
        name: the id of all of them.
        ids_from: where else ids come from: ``labels``, the dataset's (the folder's name where a folder is a person), or
            else the paths; ``folder``, the names of the folders that images lie in; ``file``, their names without the
            ending.
        camera: of all of them; the dataset's if None.
        time: when they were seen; now if None.

    Raises:
        Error: as `Gallery.add`.
    """
    images: Images | Features
    if not isinstance(data, Dataset) and os.fspath(data).endswith(".npz"):
        images = features = Features.load(data)
        paths, cameras, labels = features.paths, features.camids.tolist(), features.names
    else:
        dataset = data if isinstance(data, Dataset) else read_dataset(data, whole=True)
        records = dataset.gallery or dataset.train
        paths, cameras = tuple(r.path for r in records), [r.camid for r in records]
        labels = tuple(str(r.pid) if r.pid != UNKNOWN else r.path for r in records)
        images = [*paths]
        if folders := _people_folders(dataset, records):
            labels = tuple(folders.get(r.pid, label) for r, label in zip(records, labels, strict=True))
    ids: Sequence[str] = labels
    if ids_from != "labels":
        if name is not None:
            raise UsageError("ids_from", f"{ids_from}, and the id {name!r}", "one of them", "Leave out the other.")
        check_choice("ids_from", ids_from, ("labels", "folder", "file"))
        ids = [Path(path).parent.name if ids_from == "folder" else Path(path).stem for path in paths]
    return gallery.add(images, ids if name is None else name, cameras if camera is None else camera, time, batch=batch)


def _people_folders(dataset: Dataset, records: Sequence[ImageRecord]) -> dict[int, str]:
    """Each person's folder where a folder is a person: its name is who it is, and the number is the reader's own."""
    names: dict[int, set[str]] = {}
    for record in records:
        if record.pid != UNKNOWN:
            folder = Path(record.path).parent
            names.setdefault(record.pid, set()).add("" if folder == Path(dataset.root) else folder.name)
    found = {pid: next(iter(held)) for pid, held in names.items() if len(held) == 1}
    apart = len(found) == len(names) == len(set(found.values())) and "" not in found.values()
    return found if apart else {}
