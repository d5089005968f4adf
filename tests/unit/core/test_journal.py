"""What an interrupted run had finished, and what is not believed of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nformer_edge.core.journal import Journal, _sha256

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_an_array_is_computed_once_and_then_remembered(tmp_path: Path) -> None:
    Journal(tmp_path / "j").recall_array("facts", lambda: ARRAY)
    np.testing.assert_array_equal(Journal(tmp_path / "j").recall_array("facts", pytest.fail), ARRAY)


@pytest.mark.parametrize("value", [[[2, 3], "no base64"], [[-1], "AAAA"], [[7], "AAAAAA=="], "text", None, [[2], 5]])
def test_a_line_whose_hash_holds_and_that_is_no_array_is_computed_again(tmp_path: Path, value: object) -> None:
    key = _sha256("facts")
    entry = {"key": key, "seconds": 1.0, "sha256": _sha256([key, value]), "value": value}
    (tmp_path / "j").write_text(json.dumps(entry) + "\n")
    np.testing.assert_array_equal(Journal(tmp_path / "j").recall_array("facts", lambda: ARRAY), ARRAY)


def test_a_line_with_the_value_of_another_key_is_computed_again(tmp_path: Path) -> None:
    Journal(tmp_path / "j").recall_array("others", lambda: ARRAY + 1)
    line = json.loads((tmp_path / "j").read_text()) | {"key": _sha256("facts")}
    (tmp_path / "j").write_text(json.dumps(line) + "\n")
    np.testing.assert_array_equal(Journal(tmp_path / "j").recall_array("facts", lambda: ARRAY), ARRAY)
