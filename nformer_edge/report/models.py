"""What the measuring functions share: opening data and models, and the values that say what was measured."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from nformer_edge.backends.open import open_model as open_any
from nformer_edge.backends.runner import Runner
from nformer_edge.core.errors import ArtifactError, DataError
from nformer_edge.core.features import Features, load_features
from nformer_edge.core.spec import Precision
from nformer_edge.data.records import Dataset
from nformer_edge.data.summary import dataset_of
from nformer_edge.gallery.model import Model
from nformer_edge.metrics.ranking import Pair

Data: TypeAlias = "Dataset | str | os.PathLike[str]"
#: An open model, which stays open, or the path of a checkpoint, bundle or engine.
Source: TypeAlias = "Model | Runner | str | os.PathLike[str]"

#: What a manifest lists beside the model itself.
_NOT_MODEL = (".json", ".npz", ".cache", ".txt", ".md")


@dataclass(frozen=True)
class MeasuredModel:
    """A measured model. Of a feature store, `label` and `path` alone are given.

    Args:
        label: what tables and the report call it.
        path: the file or folder; empty for a model that was already open.
        name: architecture and image size.
        backend: what runs it.
        precision: of ``backbone`` and, where there is one, ``head``, as built.
        size_mb: megabytes on disk of ``backbone``, ``head`` and their ``total``.
        landmark_seed: seed from which the head's landmarks are drawn; null without a model.
    """

    label: str
    path: str
    name: str = ""
    backend: str = ""
    precision: Mapping[str, Precision] = field(default_factory=dict)
    size_mb: Mapping[str, float] = field(default_factory=dict)
    landmark_seed: int | None = None

    @classmethod
    def of(cls, model: Source, runner: Runner, label: str | None = None) -> MeasuredModel:
        """Of the model that `open_model` opened."""
        path = os.fspath(model) if isinstance(model, (str, os.PathLike)) else ""
        precision = {p: precision_of(runner, p) for p in (("backbone", "head") if runner.has_head else ("backbone",))}
        label = label or f"{runner.name} {runner.backend} {runner.precision['backbone']}"
        sizes = model_sizes(path) if path else {}
        return cls(label, path, runner.name, runner.backend, precision, sizes, runner.landmark_seed)


@dataclass(frozen=True)
class MeasuredData:
    """The data that a figure was measured on.

    Args:
        name: of the dataset or feature store.
        query: number of query images.
        gallery: number of gallery images.
        source: whether images were embedded, or a feature store was read.
    """

    name: str
    query: int
    gallery: int
    source: Literal["images", "features"] = "images"

    @classmethod
    def of(cls, data: Data, query: Features, gallery: Features) -> MeasuredData:
        """Of a dataset, or of a feature store by its file name."""
        if isinstance(data, Dataset):
            return cls(data.name, len(query), len(gallery))
        return cls(os.path.basename(data), len(query), len(gallery), "features")


def open_model(
    model: Source, threads: int | None, reference: bool = False, native: bool = True
) -> AbstractContextManager[Runner]:
    """Opens a checkpoint, bundle or engine; a model that is already open is given back and stays open."""
    if not isinstance(model, (str, os.PathLike)):
        return nullcontext(model.runner if isinstance(model, Model) else model)
    return open_any(model, intra_op_threads=threads, reference=reference, native=native)


def open_dataset(data: Data, layout: str = "auto", *, labels: bool = True) -> Dataset:
    """A dataset as it is, or the one that lies at a path.

    Args:
        labels: False accepts a gallery alone, of images that nobody labeled.

    Raises:
        DataError: if it has no query or no gallery images.
    """
    dataset = dataset_of(data, layout, labels=labels)
    for split in ("query", "gallery") if labels else ("gallery",):
        if not dataset.split(split):
            hint = "Give a dataset with query and gallery images."
            if dataset.unlabeled:
                hint = "Accuracy needs labels. Without them `parity` compares models, and `threshold` chooses a cosine."
            raise DataError(f"{dataset.root}: {split}", "no image", "at least one", hint)
    return dataset


def calibration_note(runner: Runner, *sets: Features) -> tuple[str, ...]:
    """A sentence where images that are scored with an engine are those that its INT8 ranges come from."""
    hashes = [digest for images in sets for digest in images.hashes]
    shared = sum(digest.startswith(runner.calibrated_on) for digest in hashes) if runner.calibrated_on else 0
    told = f"{shared} of {len(hashes)} images calibrated this engine too: other images may show more loss by INT8"
    return (told,) if shared else ()


def open_store(data: object) -> Pair | None:
    """Query and gallery of a feature store (`.npz`) at a path; None for anything else.

    Raises:
        ArtifactError: if it lacks either.
    """
    if not isinstance(data, (str, os.PathLike)) or Path(data).suffix != ".npz":
        return None
    sets = load_features(data)
    for split in ("query", "gallery"):
        if split not in sets:
            hint = "Embed a whole dataset with `nformer-edge embed`."
            raise ArtifactError(str(data), f"splits {', '.join(sets)}", f"a split {split}", hint)
    return sets["query"], sets["gallery"]


def precision_of(runner: Runner, part: str) -> Precision:
    """The precision of ``backbone`` or ``head`` as built; of ``end_to_end``, the coarser of the two."""
    coarseness: tuple[Precision, ...] = get_args(Precision)
    names = runner.precision.values() if part == "end_to_end" else (runner.precision[part],)
    for name in names:
        if name not in coarseness:
            raise ArtifactError(runner.name, f"precision {name!r}", " | ".join(coarseness), "Build the engine again.")
    return coarseness[max(coarseness.index(name) for name in names)]


def _checkpoint_bytes(path: Path) -> dict[str, int]:
    """Bytes of each part's tensors by a safetensors file's header: 8 bytes of length, then JSON."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    sizes: dict[str, int] = {}
    for name, entry in header.items():
        part = name.partition(".")[0]
        if part in ("backbone", "head"):
            begin, end = entry["data_offsets"]
            sizes[part] = sizes.get(part, 0) + end - begin
    return sizes


def model_sizes(path: str | os.PathLike[str]) -> dict[str, float]:
    """Megabytes of ``backbone`` and ``head`` on disk, as far as there are any, and their ``total``.

    Weights and graph count, golden vectors and manifest do not.
    """
    path = Path(path)
    sizes: dict[str, int] = {}
    if path.suffix == ".safetensors":
        sizes = _checkpoint_bytes(path)
    else:
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and file.suffix not in _NOT_MODEL:
                part = "head" if file.name.startswith("nformer") else "backbone"
                sizes[part] = sizes.get(part, 0) + file.stat().st_size
    return {part: size / 1e6 for part, size in (sizes | {"total": sum(sizes.values())}).items()}
