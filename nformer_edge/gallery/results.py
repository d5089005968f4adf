"""What a gallery gives back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

from nformer_edge.core.values import Result
from nformer_edge.gallery.codes import CodeScore
from nformer_edge.gallery.store import Entry


@dataclass(frozen=True)
class GalleryStats(Result):
    """What a gallery holds.

    Args:
        images: how many.
        ids: different ids.
        cameras: different cameras that are known.
        features: numbers an image, D.
        code: how they are kept (`gallery.codes`).
        bytes_per_image: of memory, labels excluded.
        memory_mib: of all images, labels excluded.
        disk_mib: of the gallery's files; null for one in memory.
        oldest: when the first image was seen, seconds since 1970; null where no time is known.
        newest: likewise the last.
        thumbnails: whether pictures are kept.
        audit: whether searches are logged.
        model: architecture and image size.
        path: the gallery's folder, or "".
        head_failure: why the head's landmarks could not be drawn anew; null where nothing failed. Searches go on with
            the old ones.
    """

    kind: ClassVar[str] = "gallery"
    version: ClassVar[int] = 2

    images: int
    ids: int
    cameras: int
    features: int
    code: str
    bytes_per_image: int
    memory_mib: float
    disk_mib: float | None
    oldest: float | None
    newest: float | None
    thumbnails: bool
    audit: bool
    model: str
    path: str
    head_failure: str | None

    def __str__(self) -> str:
        cameras = f", {self.cameras:,} cameras" if self.cameras else ""
        size = (
            f"{self.features} numbers as {self.code}, {self.bytes_per_image} bytes an image, {self.memory_mib:.1f} MiB"
        )
        disk = "" if self.disk_mib is None else f"\n{self.path}: {self.disk_mib:.1f} MiB on disk"
        failed = "" if self.head_failure is None else f"\nThe head's landmarks are old: {self.head_failure}"
        seen = (
            "" if self.oldest is None or self.newest is None else f", seen {_date(self.oldest)} to {_date(self.newest)}"
        )
        return f"{self.images:,} images of {self.ids:,} ids{cameras}{seen}: {size}, model {self.model}{disk}{failed}"


@dataclass(frozen=True)
class Changed(Result):
    """What was done to a gallery.

    Args:
        action: ``add``, ``remove``, ``merge``, ``migrate``, ``backup`` or ``upgrade``.
        images: how many were added, removed, taken over, embedded again, copied or brought to this version.
        ids: how many ids these have.
        total: images in the gallery now.
        path: the gallery's folder, of a backup the new one; "" for a gallery in memory.
        already: images of another gallery that were there before it was merged.
    """

    kind: ClassVar[str] = "gallery-changed"
    version: ClassVar[int] = 2

    action: str
    images: int
    ids: int
    total: int
    path: str
    already: int = 0

    def __str__(self) -> str:
        said = f"{self.action}: {self.images:,} images of {self.ids:,} ids, {self.total:,} images in the gallery now"
        said += f"; {self.already:,} were there before" if self.already else ""
        forgotten = "\n`gallery compact` takes what was removed out of the gallery's files"
        return said + (forgotten if self.action == "remove" and self.path else "")


@dataclass(frozen=True)
class Compacted(Result):
    """A gallery whose files were written anew.

    Args:
        images: how many it holds.
        code: how they are kept now.
        bytes_per_image: of memory, labels excluded.
        bytes_before: of its files; 0 for a gallery in memory.
        bytes_after: likewise.
        scores: of each code that was measured, FP32 first.
    """

    kind: ClassVar[str] = "gallery-compacted"

    images: int
    code: str
    bytes_per_image: int
    bytes_before: int
    bytes_after: int
    scores: tuple[CodeScore, ...]

    def __str__(self) -> str:
        lines = [f"{s.code:12}  {s.bytes_per_image:6,} bytes an image  mAP {100 * s.mAP:.2f}" for s in self.scores]
        mib = [f"{count / 2**20:.1f} MiB" for count in (self.bytes_before, self.bytes_after)]
        size = f"{self.images:,} images as {self.code}, {self.bytes_per_image:,} bytes each in memory"
        return "\n".join([*lines, size + (f"; files {mib[0]} before, {mib[1]} now" if self.bytes_after else "")])


@dataclass(frozen=True)
class Audit(Result):
    """What was done to a gallery and asked of it, oldest first. No entry holds a name.

    Args:
        entries: one a call.
    """

    kind: ClassVar[str] = "gallery-audit"

    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        lines = [f"{'time (UTC)':20}  {'action':8}  {'images':>8}  {'ids':>6}  note"]
        lines += [f"{_date(e.time):20}  {e.action:8}  {e.images:8,}  {e.ids:6,}  {e.note}" for e in self.entries]
        return "\n".join(lines)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
