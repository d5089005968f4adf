"""Who is this? Queries to a ranked gallery."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from nformer_edge.backends.runner import Runner
from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.features import Features
from nformer_edge.core.spec import check_whole
from nformer_edge.core.values import JSON, Result
from nformer_edge.data.records import Dataset
from nformer_edge.data.summary import dataset_of
from nformer_edge.gallery.codes import best_scored, nearest_rows
from nformer_edge.gallery.embed import embed_images, embed_records
from nformer_edge.gallery.held import Held, images_a_person
from nformer_edge.gallery.images import Images
from nformer_edge.gallery.live import LiveHead
from nformer_edge.gallery.protocols import JOINT, PER_QUERY, can_ask, relate_each, relate_sets
from nformer_edge.ops.contract import check_images

#: Whether the head is used; ``auto``: where it is known to do no harm.
HeadUse: TypeAlias = "bool | Literal['auto']"

#: What the head saw.
Protocol: TypeAlias = Literal["per-query", "quick", "joint"]

#: What ``auto`` allows the head to lose against the backbone, by the model's own table: mAP and Rank-1.
ALLOWED_LOSS = (0.003, 0.005)

#: Images from which ``auto`` uses the head: among seven it ranks worse than the cosine (docs/results.md), and of one
#: image, or of its copies, nothing but rounding is left without their mean.
LEAST_IMAGES = 8

_OVERRIDE = "`evaluate` shows what the head gains; head=True (--head yes) uses it"


_NUMBERS = (("indices", np.int64), ("scores", np.float32), ("cameras", np.int64), ("keys", np.int64))


@dataclass(frozen=True)
class Match:
    """One gallery image that a query found.

    Args:
        rank: from 1.
        index: of the image in the gallery.
        score: cosine.
        id: what the image is called.
        path: its file, or "".
        camera: -1 is unknown.
        time: when it was seen, seconds since 1970; None is unknown.
        meta: the caller's own data of the image.
        key: the image's own number, which no other image of the gallery has or gets.
    """

    rank: int
    index: int
    score: float
    id: str
    path: str
    camera: int
    time: float | None
    meta: JSON
    key: int


@dataclass(frozen=True)
class Matches(Result):
    """What a search found: of Q queries the k best gallery images each, best first; ties by id, then by index.

    ``matches[q]`` lists a query's matches; iterating gives them query by query.

    Args:
        queries: what each query is called: its id, or its path, or "".
        indices: int64 [Q, k], gallery images.
        scores: float32 [Q, k], cosines.
        ids: [Q][k], what those images are called: the id they were added under, the person's number, or the path.
        paths: [Q][k], their files; "" for an image from memory.
        cameras: int64 [Q, k], -1 is unknown.
        times: float64 [Q, k], when they were seen, seconds since 1970; null is unknown.
        meta: [Q][k], the caller's own data of them.
        keys: int64 [Q, k], their own numbers, which stay when other images come and go.
        searched: gallery images that were ranked: those that the filters let through.
        threshold: cosine from which a match counts; null if none was given, and all count.
        protocol: what the head saw: ``per-query``, each query alone with the gallery; ``quick``, the same, but the
            gallery as it is without the query, or a shortlist of it; ``joint``, all queries and the gallery at once;
            null for the backbone alone.
        model: architecture and image size.
        backend: what computed.
        decision: why the head was used or not; "" where the caller said it.
    """

    kind: ClassVar[str] = "matches"
    version: ClassVar[int] = 3

    queries: tuple[str, ...]
    indices: np.ndarray
    scores: np.ndarray
    ids: tuple[tuple[str, ...], ...]
    paths: tuple[tuple[str, ...], ...]
    cameras: np.ndarray
    times: np.ndarray
    meta: tuple[tuple[JSON, ...], ...]
    keys: np.ndarray
    searched: int
    threshold: float | None
    protocol: Protocol | None
    model: str
    backend: str
    decision: str = ""

    def __post_init__(self) -> None:
        shape = len(self.queries), len(self.ids[0]) if self.ids else 0
        for name, dtype in (*_NUMBERS, ("times", np.float64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype).reshape(shape))

    @property
    def accepted(self) -> np.ndarray:
        """bool [Q, k], which matches count: those at the threshold or above."""
        return self.scores >= (-np.inf if self.threshold is None else self.threshold)

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, query: int) -> tuple[Match, ...]:
        columns = (self.indices, self.scores, self.ids, self.paths, self.cameras, self.times, self.meta, self.keys)
        rows = zip(*(column[query] for column in columns), strict=True)
        return tuple(
            Match(
                rank,
                int(i),
                float(score),
                name,
                path,
                int(camera),
                None if time != time else float(time),
                meta,
                int(key),
            )
            for rank, (i, score, name, path, camera, time, meta, key) in enumerate(rows, 1)
        )

    def __iter__(self) -> Iterator[tuple[Match, ...]]:
        return (self[query] for query in range(len(self)))

    def __str__(self) -> str:
        blocks = []
        for number, (query, found) in enumerate(zip(self.queries, self, strict=True)):
            counted = [m for m in found if self.accepted[number, m.rank - 1]]
            named = [(m, f"  {_line(m.path)}" if m.path not in ("", m.id) else "") for m in counted]
            lines = [f"{m.rank:4d}  {m.score:.4f}  {_line(m.id or f'image {m.index}')}{path}" for m, path in named]
            if not found:
                lines = ["      no match: no gallery image passes the filters"]
            elif not counted:
                lines = [f"      no match: the best cosine is {found[0].score:.4f}, under {self.threshold:g}"]
            blocks.append("\n".join([_line(query or f"query {number}"), *lines]))
        head = f"with the head ({self.protocol})" if self.protocol else "by the backbone"
        asked = f"{len(self):,} {'query' if len(self) == 1 else 'queries'}"
        summary = f"{asked}, {self.searched:,} gallery images searched {head}, {self.backend}"
        return "\n\n".join([*blocks, summary + (f"\n{self.decision}" if self.decision else "")])


def _line(name: str) -> str:
    """As it is where that is one line of text; else as Python writes it, so that no name looks like another match."""
    return name if name.isprintable() else repr(name)


def top_matches(
    query: Features, gallery: Held, top: int = 10, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The `top` gallery images of each query by cosine, best first; ties by id, then by index.

    Args:
        allowed: bool [N], the images that are ranked; all if None.

    Returns:
        indices int64 [Q, k] and cosines float32 of the same shape, k = min(top, images allowed).

    Raises:
        DataError: if the sets' features differ in length, or a query is not finite or all zeros.
    """
    check_whole("top", top, 1)
    size = gallery["codes"].shape[1] if gallery.code.directions is None else gallery.code.directions.shape[1]
    if query.features.shape[1] != size:
        hint = "Embed both with the same model."
        raise DataError("gallery features", f"{size} numbers a row", f"{query.features.shape[1]}, as the query's", hint)
    return nearest_rows(gallery.code, gallery.columns, query.features, top, allowed, gallery["ids"])


def rank(
    runner: Runner,
    query: Features,
    gallery: Held,
    found: tuple[np.ndarray, np.ndarray],
    searched: int,
    threshold: float | None,
    protocol: Protocol | None,
    decision: str,
) -> Matches:
    """What was found, with the images' labels."""
    indices, scores = found

    def labels(column: str) -> tuple[tuple[Any, ...], ...]:
        return tuple(tuple(row) for row in gallery[column][indices].tolist())

    return Matches(
        tuple(path or name for path, name in zip(query.paths, query.names, strict=True)),
        indices,
        scores,
        labels("ids"),
        labels("paths"),
        gallery["cameras"][indices],
        gallery["times"][indices],
        labels("meta"),
        gallery["key"][indices],
        searched,
        threshold,
        protocol,
        runner.name,
        runner.backend,
        decision,
    )


def features_of(
    runner: Runner,
    images: Images | Features,
    subject: str,
    boxes: ArrayLike | None = None,
    *,
    batch: int = 32,
    decoders: int | None = None,
) -> Features:
    """Features of this model as they are; images, as for `embed_images`, embedded.

    Raises:
        Error: as `embed_images` and `check_model`.
    """
    if not isinstance(images, Features):
        return embed_images(runner, images, boxes, batch=batch, decoders=decoders)
    check_model(runner, images, subject)
    return images


def search(
    runner: Runner,
    queries: Images | Features,
    gallery: Features | Dataset | str | os.PathLike[str],
    top: int = 10,
    *,
    boxes: ArrayLike | None = None,
    head: HeadUse = "auto",
    images_per_person: int | None = None,
    together: bool = False,
    batch: int = 32,
    decoders: int | None = None,
    threshold: float | None = None,
) -> Matches:
    """Ranks features, or images that are embedded for it, for each query; a `Gallery` keeps what this computes anew.

    Args:
        runner: an open model.
        queries: images, as for `embed_images`; or features of this model, or of another from the same checkpoint.
        gallery: features likewise, or the path of a feature store, a folder of images or a dataset.
        top: matches a query.
        boxes: of people in `queries`, one frame.
        head: let the NFormer head, where there is one, see each query with the gallery first: a pass a query.
            ``auto``: where the model's own measurement by images a person says that it does no harm (`head_decision`).
        images_per_person: that the gallery has, where the caller knows: the head's gates and ``auto`` go by it. If None
            the gates are as exported, and ``auto`` goes by the gallery's labels.
        together: all queries and the gallery in one pass. Quicker, and a query's matches depend on the other queries.
        batch: images decoded and run at once.
        decoders: threads that decode files; one a core if None.
        threshold: cosine from which a match counts, such as `report.threshold` recommends; None: all count.

    Raises:
        DataError: for an empty gallery, features of another model, or an image that cannot be read.
        UsageError: for an image of another kind, type or shape, or a threshold that is no cosine.
    """
    check_threshold(threshold)
    if not isinstance(gallery, Features):
        gallery = open_gallery(runner, gallery, batch, decoders)
    if not len(gallery):
        raise DataError("gallery", "zero images", "at least one", "Add images first.")
    check_model(runner, gallery, "gallery")
    query = features_of(runner, queries, "queries", boxes, batch=batch, decoders=decoders)
    use, decision = head_use(runner, head, gallery, images_per_person)
    held = Held.of_features(gallery)
    if not use:
        return rank(runner, query, held, top_matches(query, held, top), len(held), threshold, None, decision)
    found = search_related(runner, query, gallery, top, together, images=images_per_person)
    return rank(runner, query, held, found, len(held), threshold, JOINT if together else PER_QUERY, decision)


def check_threshold(threshold: float | None) -> None:
    """Raises UsageError for what is no cosine."""
    number = isinstance(threshold, numbers.Real) and not isinstance(threshold, bool)
    if threshold is not None and not (number and -1 <= threshold <= 1):
        hint = "Name the cosine that `nformer-edge threshold` recommends; 1 - cosine is a distance."
        raise UsageError("threshold", threshold, "a cosine, -1 to 1", hint)


def search_related(
    runner: Runner,
    query: Features,
    gallery: Features,
    top: int,
    together: bool = False,
    allowed: np.ndarray | None = None,
    images: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`top_matches` after the head: by a whole pass a query, or one of all queries.

    Where the head is told `images` a person, its live form answers.
    """
    live = LiveHead.open(runner) if images is not None and can_ask(runner) else None
    if live is not None and not together:
        live.build(gallery.features)
        live.tell(images)
        names = Held.of_features(gallery)["ids"]
        return best_scored(live.ask(query.features, exact=True), top, allowed, names)
    sets: Iterable[tuple[Features, Features]] = ()
    if live is not None and len(query):
        live.build(np.concatenate([query.features, gallery.features]))
        live.tell(images)
        asked, seen = np.split(live.related(), [len(query)])
        sets = [(query.with_features(asked), gallery.with_features(seen))]
    elif together and len(query):
        sets = [relate_sets(runner, query, gallery)]
    elif len(query):
        sets = relate_each(runner, query, gallery)
    found = [top_matches(asked, Held.of_features(seen), top, allowed) for asked, seen in sets]
    if not found:
        return top_matches(query, Held.of_features(gallery), top, allowed)
    indices, scores = map(np.concatenate, zip(*found, strict=True))
    return indices, scores


def head_use(
    runner: Runner, head: HeadUse, gallery: Features | Held, images_per_person: int | None = None
) -> tuple[bool, str]:
    """Whether a search uses the head, as asked or by `head_decision`, and why where that has to be said.

    Raises:
        UsageError: for another word, since "no" is true, and for less than one image a person.
    """
    if head not in (True, False, "auto"):
        raise UsageError("head", repr(head), "True, False or 'auto'", "`--head yes` and `--head no` are the command's.")
    if images_per_person is not None:
        check_images(images_per_person)
    if head == "auto":
        return head_decision(runner, gallery, images_per_person)
    return head and runner.has_head, "head not used: the model has none" if head and not runner.has_head else ""


def head_decision(runner: Runner, gallery: Features | Held, images_per_person: int | None = None) -> tuple[bool, str]:
    """Whether ``auto`` uses the head, and why.

    Images a person are `images_per_person` if given; else as the gallery's own people or ids have them; else 1, where a
    head does most harm. The head is used where the model's table (`metrics.composition`), averaged over the gallery's
    people, shows it no worse than the backbone by `ALLOWED_LOSS`. Without a table, and among fewer than `LEAST_IMAGES`,
    it is not used. Where the table has all queries in one set alone, a query that is searched alone may gain less, and
    the answer says so.
    """
    if not runner.has_head:
        return False, ""
    if len(gallery) < LEAST_IMAGES:
        return False, f"head not used: {len(gallery):,} images in the gallery, fewer than {LEAST_IMAGES}; {_OVERRIDE}"
    if runner.accuracy is None:
        return False, f"head not used: nothing was measured by images a person (`export --data` does); {_OVERRIDE}"
    if isinstance(gallery, Held):
        counts, known = gallery.images_a_person
    else:
        counts, known = images_a_person(gallery.pids, gallery.names, bool(gallery.ids))
    if images_per_person is not None:
        counts, known = np.array([images_per_person]), f"n = {images_per_person} images a person (given)"
    told = images_per_person is not None or (isinstance(gallery, Held) and gallery.told_images is not None)
    gain = runner.accuracy.expected_gain(counts, told)
    if gain is None:
        return False, f"head not used: the model's measurement has none; {_OVERRIDE}"
    use = all(found >= -allowed for found, allowed in zip(gain, ALLOWED_LOSS, strict=True))
    points = f"{100 * gain[0]:+.1f} points mAP, {100 * gain[1]:+.1f} Rank-1"
    way = "each query alone" if runner.accuracy.searched else "all queries in one set"
    measured = f"{points} at {known}, measured on {runner.accuracy.measured_on}, {way}"
    return use, f"head used: {measured}" if use else f"head not used: {measured}"


def check_model(
    runner: Runner, features: Features, subject: str, hint: str = "Embed the images again with this model."
) -> None:
    """Raises DataError for features of another model, unless it is of the same checkpoint and precision."""
    precision = runner.precision["backbone"]
    if not features.model or features.shares_model(runner.sha256, runner.checkpoint, precision):
        return
    if features.shares_model(runner.sha256, runner.checkpoint):
        hint = f"`nformer-edge fleet` measures what a mix of models costs. {hint}"
        raise DataError(subject, f"features computed in {features.precision}", f"{precision}, as here", hint)
    got = f"features of another model ({features.model[:12]}...)"
    raise DataError(subject, got, f"of this one ({runner.sha256[:12]}...)", hint)


def open_gallery(
    runner: Runner, source: Dataset | str | os.PathLike[str], batch: int = 32, decoders: int | None = None
) -> Features:
    """The features of a feature store, of a folder of images, or of a dataset's gallery.

    Raises:
        DataError: if an image cannot be read, or there is none.
    """
    if not isinstance(source, Dataset) and Path(source).suffix == ".npz":
        return Features.load(source)
    dataset = dataset_of(source, whole=True)
    return embed_records(runner, dataset.gallery or dataset.train, batch, decoders)
