"""What is wrong, or likely so, with a dataset's labels: judged before any pixel is read."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from nformer_edge.core.artifact import sha256_file
from nformer_edge.core.errors import DataError
from nformer_edge.data.records import DISTRACTOR, UNKNOWN_CAMERA, Dataset, ImageRecord, cameras, identities


@dataclass(frozen=True)
class LabelReport:
    """Counts of what makes a dataset's figures wrong or impossible.

    Args:
        root: the dataset's folder.
        queries: query images.
        test_people: people in query and gallery.
        people_in_both: of these, who is in training too.
        copies: query images whose bytes are in the gallery as a match that counts.
        images: images of all splits.
        unknown_cameras: of these, images whose camera nobody recorded.
        one_camera: the one camera of query and gallery, where all images are of one; None otherwise.
        unmatched: queries without another camera's image of the same person in the gallery.
    """

    root: str
    queries: int
    test_people: int
    people_in_both: int
    copies: int
    images: int
    unknown_cameras: int
    one_camera: int | None
    unmatched: int

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each count that its user should know."""
        said = []
        if self.people_in_both:
            said.append(f"{self.people_in_both} of {self.test_people} test people are also in training")
        if self.copies:
            said.append(f"{self.copies} of {self.queries} query images are byte for byte in the gallery")
        if self.unknown_cameras:
            unknown = f"the camera of {self.unknown_cameras} of {self.images} images is unknown"
            said.append(f"{unknown}: matches of the same camera count")
        if self.one_camera is not None:
            said.append(f"all test images are of camera {self.one_camera}; --same-camera counts matches of one camera")
        elif self.unmatched:
            said.append(f"{self.unmatched} of {self.queries} queries have no match from another camera in the gallery")
        return tuple(said)

    def require_matches(self) -> None:
        """Raises DataError if no query has a match, so that nothing can be scored."""
        if self.queries and self.unmatched == self.queries:
            cams = "" if self.one_camera is None else f"; all are of camera {self.one_camera}"
            got = f"{self.queries} queries, none with a match in the gallery from another camera{cams}"
            hint = "Count matches of the same camera with --same-camera, or check identities and cameras."
            raise DataError(f"{self.root}: query", got, "at least one", hint)


def judge_labels(dataset: Dataset) -> LabelReport:
    """Counts people in training and test, copies, unknown cameras and queries without a match. Decodes no image."""
    test = dataset.query + dataset.gallery
    people = set(identities(test))
    both = set() if dataset.apart else people & set(identities(dataset.train))
    everything = dataset.train + test + dataset.junk
    known = cameras(test)
    one = known[0] if len(known) == 1 and all(r.camid == known[0] for r in test) and dataset.query else None
    return LabelReport(
        dataset.root,
        len(dataset.query),
        len(people),
        len(both),
        _copies(dataset.query, dataset.gallery),
        len(everything),
        sum(r.camid == UNKNOWN_CAMERA for r in everything),
        one,
        _unmatched(dataset),
    )


def _unmatched(dataset: Dataset) -> int:
    seen: Counter[int] = Counter(r.pid for r in dataset.gallery)
    own: Counter[tuple[int, int]] = Counter((r.pid, r.camid) for r in dataset.gallery if r.camid != UNKNOWN_CAMERA)
    asking = [r for r in dataset.query if r.pid > DISTRACTOR]
    return len(dataset.query) - sum(seen[r.pid] > own[r.pid, r.camid] for r in asking)


def _copies(query: Sequence[ImageRecord], gallery: Sequence[ImageRecord]) -> int:
    """Queries that have a copy in the gallery, without those that the rule of the same camera leaves out anyway.

    Contents are hashed only where the sizes agree.
    """
    asking = [r for r in query if os.path.isfile(r.path)]
    sizes = {os.path.getsize(r.path) for r in asking}
    contents: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for record in gallery:
        if os.path.isfile(record.path) and os.path.getsize(record.path) in sizes:
            contents[sha256_file(record.path)].add((record.pid, record.camid))
    if not contents:
        return 0
    count = 0
    for record in asking:
        own = set() if record.camid == UNKNOWN_CAMERA else {(record.pid, record.camid)}
        count += bool(contents.get(sha256_file(record.path), set()) - own)
    return count
