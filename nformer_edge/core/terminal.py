"""How commands speak to a terminal: one setting for every progress bar, and text that cannot steer it."""

from __future__ import annotations

import re
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

#: Keyword arguments for every ``tqdm``: no bar when output is not a terminal, none in the first two seconds.
PROGRESS: dict[str, Any] = {"disable": None, "delay": 2.0, "dynamic_ncols": True, "leave": False}


def inert(text: str) -> str:
    """Text as a terminal may show it: control characters and stray bytes of file names become their escapes."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
