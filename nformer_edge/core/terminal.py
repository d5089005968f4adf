"""How commands speak to a terminal: one setting for every progress bar."""

from __future__ import annotations

from typing import Any

#: Keyword arguments for every ``tqdm``: no bar when output is not a terminal, none in the first two seconds.
PROGRESS: dict[str, Any] = {"disable": None, "delay": 2.0, "dynamic_ncols": True, "leave": False}
