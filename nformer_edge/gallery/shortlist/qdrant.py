"""Rows in Qdrant: a server, or the client's own local form in a folder (for tests: slow, and all in memory)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nformer_edge.gallery.held import Where
from nformer_edge.gallery.shortlist.base import BATCH, Rows, person, required


class QdrantShortlist:
    """See `base.Shortlist`. Extra ``qdrant``.

    Args:
        where: a server's address, such as ``http://host:6333``, or a folder for the local form.
        features: D.
        collection: its name; made where there is none.
        token: of the server.
        exact: every row is compared; False: the server's index (HNSW).

    Raises:
        BackendError: if qdrant-client is not installed.
    """

    def __init__(
        self, where: str, features: int, *, collection: str = "gallery", token: str = "", exact: bool = True
    ) -> None:
        try:
            from qdrant_client import QdrantClient, models
        except ImportError as e:
            raise required("qdrant_client", "qdrant") from e
        self.name, self._collection, self._features, self._models = f"qdrant {where}", collection, features, models
        self._folder = None if "://" in where else Path(where)
        self._exact = models.SearchParams(exact=exact)
        if self._folder is None:
            self._client = QdrantClient(where, api_key=token or None)
        else:
            self._client = QdrantClient(path=where)
        if not self._client.collection_exists(collection):
            # by COSINE it would scale the rows once more before it keeps them
            vectors = models.VectorParams(size=features, distance=models.Distance.DOT)
            self._client.create_collection(collection, vectors_config=vectors)
            if self._folder is None:
                for field, kind in (("person", "integer"), ("camera", "integer"), ("time", "float")):
                    self._client.create_payload_index(collection, field, models.PayloadSchemaType(kind))

    def put(self, rows: Rows) -> None:
        points = self._models.Batch(ids=rows.keys.tolist(), vectors=rows.unit.tolist(), payloads=rows.records())
        if len(rows):
            self._client.upsert(self._collection, points, wait=True)

    def nearest(self, unit: np.ndarray, count: int, where: Where) -> list[Rows]:
        request = self._models.QueryRequest
        asked = [
            request(
                query=row,
                limit=count,
                filter=self._filter(where),
                params=self._exact,
                with_vector=True,
                with_payload=True,
            )
            for row in unit.tolist()
        ]
        return [self._rows(found.points) for found in self._client.query_batch_points(self._collection, asked)]

    def find(self, ids: Sequence[str]) -> Rows:
        match = self._models.MatchAny(any=sorted(map(person, ids)))
        condition = self._models.Filter(must=[self._models.FieldCondition(key="person", match=match)])
        return self._rows(
            self._client.scroll(self._collection, condition, limit=BATCH, with_vectors=True, with_payload=True)[0]
        )

    def holds(self, keys: np.ndarray) -> np.ndarray:
        found = self._client.retrieve(self._collection, keys.tolist(), with_payload=False) if len(keys) else []
        return np.isin(keys, [int(point.id) for point in found])

    def drop(self, keys: np.ndarray) -> None:
        if len(keys):
            self._client.delete(self._collection, self._models.PointIdsList(points=keys.tolist()), wait=True)

    def erase(self) -> None:
        """Nothing can be asked for: a server's optimizer rewrites segments when it sees fit."""

    def count(self, where: Where) -> int:
        return int(self._client.count(self._collection, self._filter(where), exact=True).count)

    def traces(self, row: np.ndarray) -> tuple[list[Path], bytes]:
        """The local form pickles a list of doubles."""
        files = [] if self._folder is None else sorted(self._folder.rglob("*.sqlite*"))
        return files, b"".join(b"G" + struct.pack(">d", x) for x in row[:8].tolist())

    def close(self) -> None:
        self._client.close()

    def _rows(self, points: Sequence) -> Rows:
        keys, vectors, payloads = ([getattr(p, name) for p in points] for name in ("id", "vector", "payload"))
        return Rows.of_records(keys, vectors, payloads, self._features)

    def _filter(self, where: Where) -> Any:
        m, must, never = self._models, [], []
        if where.cameras is not None:
            must.append(m.FieldCondition(key="camera", match=m.MatchAny(any=list(map(int, where.cameras)))))
        if where.times is not None:
            must.append(m.FieldCondition(key="time", range=m.Range(gte=where.times[0], lte=where.times[1])))
        if where.exclude_camera is not None:
            never.append(m.FieldCondition(key="camera", match=m.MatchValue(value=int(where.exclude_camera))))
        return m.Filter(must=must, must_not=never) if must or never else None
