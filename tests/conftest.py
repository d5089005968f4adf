"""What every test may ask for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory) -> Iterator[None]:
    """What this run remembers of passed self-tests and signatures is its own, also in the commands that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("cache", "state"):
            patch.setenv(f"XDG_{name.upper()}_HOME", str(tmp_path_factory.mktemp(name)))
        yield


@pytest.fixture(scope="session")
def golden():
    """Opens one golden file by its stem: arrays computed with the published implementation."""

    def load(stem: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{stem}.npz", allow_pickle=False) as z:
            return {name: z[name] for name in z.files}

    return load


def pytest_terminal_summary(terminalreporter) -> None:
    """The run's last lines count the skipped tests by what they lack."""
    skipped = Counter(str(r.longrepr[2]).removeprefix("Skipped: ") for r in terminalreporter.stats.get("skipped", []))
    for reason, count in sorted(skipped.items()):
        terminalreporter.write_line(f"skipped {count}: {reason}")
