"""Millions of images to features by Ray Data: workers on one machine or many, which may die.

Images are dealt out in shards of whole batches, so that every row is computed in the batch that one process would
compute it in. A worker keeps finished batches in a journal of its shard; one that dies is replaced, and its shard goes
on there. So does a run that is started again.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nformer_edge.backends.open import open_model
from nformer_edge.core.errors import BackendError, DataError, Error
from nformer_edge.core.journal import Journal
from nformer_edge.core.spec import check_at_least
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.data.records import ImageRecord
from nformer_edge.metrics.distance import row_blocks

#: Batches in a shard: what a worker's death costs at most is one batch, what a shard costs is one task of Ray.
SHARD = 8

#: Deaths of workers over one shard before the run fails. Ray Data's own default is to try for ever.
RETRIES = 5


class Worker:
    """An open model in a process of Ray's.

    Args:
        model: its path, as every machine sees it.
        records: all images.
        folder: of journals, likewise.
        options: of `gallery.embed.embed_records`.
        threads: of the model.
    """

    def __init__(
        self, model: str, records: Sequence[ImageRecord], folder: str, options: Mapping[str, Any], threads: int
    ) -> None:
        self._records, self._folder, self._options = records, Path(folder), options
        self._runner = open_model(model, intra_op_threads=threads)

    def __call__(self, row: Mapping[str, int]) -> dict[str, object]:
        from nformer_edge.gallery.embed import embed_records

        start, stop = row["start"], row["stop"]
        journal = Journal(self._folder / f"{start}")
        try:
            made = embed_records(self._runner, self._records[start:stop], journal=journal, **self._options)
        except Error as e:  # an image's fault: no other worker would do better
            told = json.dumps([str(x) for x in (e.subject, e.got, e.expected, e.hint)])
            return {"start": start, "error": told, "features": np.zeros((0, 0, 0), np.float32), "hashes": []}
        views = np.stack([made.view(number).features for number in range(made.views)])
        return {"start": start, "error": "", "features": views, "hashes": list(made.hashes)}


def embed_by_ray(
    model: str | os.PathLike[str],
    records: Sequence[ImageRecord],
    folder: Path,
    workers: int,
    *,
    threads: int = 1,
    options: Mapping[str, Any],
) -> tuple[np.ndarray, tuple[str, ...]]:
    """What `gallery.embed.embed_records` computes, by up to `workers` processes of Ray's.

    They are of the cluster that RAY_ADDRESS names, or of this machine.

    Args:
        model: path of a checkpoint, bundle or engine.
        folder: of journals.
        threads: of each worker's model.
        options: other arguments of `embed_records`, batch among them.

    Returns:
        Features float32 [V, N, D] and the files' hashes.

    Raises:
        BackendError: if Ray is not installed, or the workers keep dying.
        DataError: for the first image that cannot be read, or whose feature is not finite.
    """
    check_at_least("workers", workers, 1)
    ray = _ray()
    size = SHARD * options["batch"]
    shards = [{"start": part.start, "stop": part.stop} for part in row_blocks(len(records), size)]
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[int, dict[str, Any]] = {}
    arguments = os.path.abspath(model), tuple(records), str(folder.absolute()), options, threads
    with warnings.catch_warnings():  # Ray 2.60 to 2.63 announce that the limits go, and have no other place for them
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        dataset = ray.data.from_items(shards, override_num_blocks=len(shards)).map(
            Worker,
            fn_constructor_args=arguments,
            concurrency=(1, min(workers, len(shards))),
            max_restarts=RETRIES,
            max_task_retries=RETRIES,
        )
    try:
        with tqdm(total=len(records), desc="embedding", unit="img", **PROGRESS) as bar:
            for part in dataset.iter_rows():
                if part["error"]:
                    subject, got, expected, hint = json.loads(part["error"])
                    raise DataError(subject, got, expected, hint)
                parts[part["start"]] = part
                bar.update(part["features"].shape[1])
    except ray.exceptions.RayError as e:
        got = f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200]}"
        raise BackendError("workers", got, "workers that live", "Run it again: it goes on where it stopped.") from e
    ordered = [parts[shard["start"]] for shard in shards]
    hashes = tuple(digest for part in ordered for digest in part["hashes"])
    return np.concatenate([part["features"] for part in ordered], axis=1), hashes


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        import ray
        import ray.data
    except ImportError as e:
        raise BackendError("workers", f"no {e.name} here", "Ray Data", "pip install 'nformer-edge[ray]'") from e
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    return ray
