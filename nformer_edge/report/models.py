"""What the measuring commands share: opening data and models, and describing them in a result's JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from nformer_edge.backends.open import open_model as open_any
from nformer_edge.backends.runner import Runner
from nformer_edge.core.errors import ArtifactError, DataError
from nformer_edge.core.features import Features, load_features
from nformer_edge.core.spec import Precision
from nformer_edge.data.readers import read_dataset
from nformer_edge.data.records import Dataset

Data = Dataset | str | os.PathLike[str]
Opener = Callable[..., Runner]

#: What a manifest lists beside the model itself.
_NOT_MODEL = (".json", ".npz", ".cache", ".txt", ".md")


def open_model(
    path: str | os.PathLike[str],
    threads: int | None,
    opener: Opener | None = None,
    reference: bool = False,
    native: bool = True,
) -> Runner:
    """Opens a checkpoint, bundle or engine. `opener` stands in for `backends.open.open_model`."""
    if opener is not None:
        return opener(path, threads=threads)
    return open_any(path, intra_op_threads=threads, reference=reference, native=native)


def open_dataset(data: Data, layout: str = "auto") -> Dataset:
    """A dataset as it is, or the one that lies at a path.

    Raises:
        DataError: if it has no query or no gallery images.
    """
    dataset = data if isinstance(data, Dataset) else read_dataset(data, layout)
    for split in ("query", "gallery"):
        if not dataset.split(split):
            raise DataError(
                f"{dataset.root}: {split}", "no image", "at least one", "Give a dataset with query and gallery images."
            )
    return dataset


def evenly(count: int, of: int) -> list[int]:
    """At most `count` of the numbers 0..`of` - 1, evenly spaced, the first among them."""
    return [i * of // count for i in range(count)] if count < of else list(range(of))


def is_feature_store(data: Data) -> bool:
    """Whether `data` is the path of a feature store rather than of images."""
    return not isinstance(data, Dataset) and Path(data).suffix == ".npz"


def open_features(path: str | os.PathLike[str]) -> tuple[Features, Features]:
    """Query and gallery of a feature store.

    Raises:
        ArtifactError: if it lacks either.
    """
    sets = load_features(path)
    for split in ("query", "gallery"):
        if split not in sets:
            raise ArtifactError(
                str(path),
                f"splits {', '.join(sets)}",
                f"a split {split}",
                "Embed a whole dataset with `nformer-edge embed`.",
            )
    return sets["query"], sets["gallery"]


def describe_data(data: Data, query: Features, gallery: Features) -> dict[str, Any]:
    """What was ranked, as a result's ``data`` tells it: name, numbers of images, and whether it is a feature store."""
    stored = is_feature_store(data)
    return {
        "name": os.path.basename(str(data)) if stored else open_dataset(data).name,
        "query": len(query),
        "gallery": len(gallery),
        "source": "features" if stored else "images",
    }


def stage_precision(runner: Runner, stage: str) -> Precision:
    """The precision of ``backbone`` or ``head`` as built; of ``end_to_end``, the coarser of the two."""
    coarseness: tuple[Precision, ...] = get_args(Precision)
    names = runner.precision.values() if stage == "end_to_end" else (runner.precision[stage],)
    for name in names:
        if name not in coarseness:
            raise ArtifactError(runner.name, f"precision {name!r}", " | ".join(coarseness), "Build the engine again.")
    return coarseness[max(coarseness.index(name) for name in names)]


def _checkpoint_bytes(path: Path) -> dict[str, int]:
    """Bytes of each stage's tensors by a safetensors file's header: 8 bytes of length, then JSON."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    sizes: dict[str, int] = {}
    for name, entry in header.items():
        stage = name.partition(".")[0]
        if stage in ("backbone", "head"):
            begin, end = entry["data_offsets"]
            sizes[stage] = sizes.get(stage, 0) + end - begin
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
                stage = "head" if file.name.startswith("nformer") else "backbone"
                sizes[stage] = sizes.get(stage, 0) + file.stat().st_size
    return {stage: size / 1e6 for stage, size in (sizes | {"total": sum(sizes.values())}).items()}


def describe_model(path: str | os.PathLike[str], runner: Runner, label: str | None = None) -> dict[str, Any]:
    """A model as every result's ``model`` tells it: label, path, backend, precision and megabytes of each stage."""
    stages = ("backbone", "head") if runner.has_head else ("backbone",)
    return {
        "label": label or f"{runner.name} {runner.backend} {runner.precision['backbone']}",
        "path": str(path),
        "name": runner.name,
        "backend": runner.backend,
        "precision": {stage: stage_precision(runner, stage) for stage in stages},
        "size_mb": model_sizes(path),
        "landmark_seed": runner.landmark_seed,
    }
