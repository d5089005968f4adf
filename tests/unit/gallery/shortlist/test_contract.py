"""One contract for every vector store: numpy's own here, the embedded forms of Qdrant and Milvus among the optional."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.galleries import SIZE
from helpers.shortlists import FAULTS, Faulty, hold

from nformer_edge.core.errors import Error
from nformer_edge.gallery.shortlist.base import NumpyShortlist
from nformer_edge.gallery.shortlist.milvus import MilvusShortlist
from nformer_edge.gallery.shortlist.qdrant import QdrantShortlist


def test_numpys_own_store_holds_the_contract() -> None:
    hold(lambda: NumpyShortlist(SIZE), reopens=False)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_contract_catches_a_store_that(fault: str) -> None:
    with pytest.raises((AssertionError, Error)):
        hold(lambda: Faulty(fault), reopens=False)


@pytest.mark.optional
def test_milvus_holds_the_contract(tmp_path: Path) -> None:
    pytest.importorskip("milvus_lite", reason="milvus-lite is not installed")
    hold(lambda: MilvusShortlist(str(tmp_path / "milvus.db"), SIZE))


@pytest.mark.optional
def test_qdrant_holds_the_contract(tmp_path: Path) -> None:
    pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")
    hold(lambda: QdrantShortlist(str(tmp_path / "qdrant"), SIZE))
