"""What every test may ask for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """Opens one golden file by its stem: arrays computed with the published implementation."""

    def load(stem: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{stem}.npz", allow_pickle=False) as z:
            return {name: z[name] for name in z.files}

    return load
