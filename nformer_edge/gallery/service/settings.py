"""What a service is told when it starts: where it listens, who may ask, how much at once, and what it must forget."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from nformer_edge.core.errors import UsageError
from nformer_edge.core.spec import check_at_least, check_choice
from nformer_edge.gallery.search import HeadUse, check_threshold

Role: TypeAlias = Literal["read", "write", "admin"]

#: Each may do what those before it may.
ROLES: Final = ("read", "write", "admin")

_TOKEN_LENGTH = 32


@dataclass(frozen=True)
class Settings:
    """A service's settings; the command's flags have the same names.

    Args:
        host: address to listen at. Another than this machine's own needs `tokens`.
        port: 0 takes a free one.
        tokens: file of lines ``ROLE TOKEN``, for its owner's eyes alone; None: who reaches this machine may do all.
        queue: requests that are worked on or wait; more are refused with status 429.
        batch: images embedded at once.
        deadline_s: seconds from a request to its features; later it is refused with status 503.
        body_mib: size of an image file.
        megapixels: size of an image.
        rate: requests a second of one token, twice as many in a burst.
        receive_s: seconds that headers, and after them a body, may take to arrive, and a caller to ask again.
        stop_s: seconds that accepted requests have to finish after SIGTERM.
        threshold: cosine from which a match counts, where a search names none.
        head: let the NFormer head see each query with the gallery; ``auto`` as `Gallery.search`.
        purpose: what the gallery is for: shown on the page and in the API's description.
        require_note: refuse a search without a note, such as a case number.
        audit: of a new gallery: log each search.
        thumbnails: of a new gallery: keep a small picture of each image, for the page.
        keep_days: remove images that were seen longer ago; None: keep them.
        erase_minutes: after a removal, take what was removed out of the gallery's files within this time; 0: at once.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    tokens: str | None = None
    queue: int = 64
    batch: int = 16
    deadline_s: float = 10.0
    body_mib: float = 8.0
    megapixels: float = 16.0
    rate: float = 100.0
    receive_s: float = 4.0
    stop_s: float = 30.0
    threshold: float | None = None
    head: HeadUse = "auto"
    purpose: str = ""
    require_note: bool = False
    audit: bool = False
    thumbnails: bool = False
    keep_days: float | None = None
    erase_minutes: float = 0.0

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if not 0 <= self.port <= 65535:
            raise UsageError("port", self.port, "0 to 65535", "Leave it out for 8000.")
        for name in ("queue", "batch"):
            check_at_least(name, getattr(self, name), 1)
        for name in ("deadline_s", "body_mib", "megapixels", "rate", "receive_s", "stop_s"):
            if not getattr(self, name) > 0:
                raise UsageError(name, getattr(self, name), "above 0", "Leave it out for the default.")
        if not self.erase_minutes >= 0 or (self.keep_days is not None and not self.keep_days >= 0):
            got = f"keep_days {self.keep_days}, erase_minutes {self.erase_minutes}"
            raise UsageError("retention", got, "0 or more", "Name days to keep and minutes to erase in.")
        if not self.loopback and self.tokens is None:
            hint = "Write a file of tokens, docs/serve.md says how, and pass --tokens FILE."
            raise UsageError("host", f"{self.host} without tokens", "tokens, or this machine's own address", hint)

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def read_tokens(path: str | os.PathLike[str]) -> dict[bytes, Role]:
    """The sha256 of each token, and its role.

    Raises:
        UsageError: for a file that others can read, or a line that is no role and a token of 32 characters or more;
            the token itself is never in the message.
    """
    where = str(path)
    try:
        if stat.S_IMODE(os.stat(path).st_mode) & 0o077:
            raise UsageError(where, "a file that others can read", "mode 0600", f"Run chmod 600 {where}.")
        lines = Path(path).read_text("ascii").splitlines()
    except UnicodeDecodeError as e:
        raise UsageError(where, "other characters than ASCII", "lines ROLE TOKEN", "Write it anew.") from e
    found: dict[bytes, Role] = {}
    for number, line in enumerate(lines, 1):
        role, _, token = line.partition(" ")
        if not line.strip() or line.startswith("#"):
            continue
        check_choice(f"{where}:{number}", role, ROLES)
        if len(token) < _TOKEN_LENGTH or not token.isprintable() or " " in token:
            hint = "Make one: openssl rand -hex 32"
            raise UsageError(f"{where}:{number}", "a weak token", f"{_TOKEN_LENGTH} characters or more", hint)
        found[hashlib.sha256(token.encode()).digest()] = role  # type: ignore[assignment]
    if not found:
        raise UsageError(where, "no token", "lines ROLE TOKEN", "Write one: admin $(openssl rand -hex 32)")
    return found
