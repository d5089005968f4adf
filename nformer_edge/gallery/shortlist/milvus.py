"""Rows in Milvus: a server, or its embedded form in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nformer_edge.gallery.held import Where
from nformer_edge.gallery.shortlist.base import BATCH, RECORD, Rows, person, required

_EVERYTHING = ["key", "unit", *RECORD]


class MilvusShortlist:
    """See `base.Shortlist`. Extra ``milvus``; the embedded form needs milvus-lite.

    Args:
        where: a server's address, such as ``http://host:19530``, or a folder for the embedded form.
        features: D.
        collection: its name, of letters, digits and ``_``; made where there is none.
        token: of the server.
        exact: every row is compared (FLAT); False, of a new collection: the server's own index (AUTOINDEX).

    Raises:
        BackendError: if pymilvus is not installed.
    """

    def __init__(
        self, where: str, features: int, *, collection: str = "gallery", token: str = "", exact: bool = True
    ) -> None:
        try:
            from pymilvus import DataType, MilvusClient
        except ImportError as e:
            raise required("pymilvus", "milvus") from e
        self.name, self._collection, self._features = f"milvus {where}", collection, features
        self._folder = None if "://" in where else Path(where)
        self._client = MilvusClient(where, token=token)
        if not self._client.has_collection(collection):
            schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
            schema.add_field("key", DataType.INT64, is_primary=True)
            schema.add_field("unit", DataType.FLOAT_VECTOR, dim=features)
            for field in RECORD:
                kind = DataType.INT64 if field in ("camera", "person") else DataType.DOUBLE
                if field in ("id", "path", "model"):
                    schema.add_field(field, DataType.VARCHAR, max_length=65535)
                else:
                    schema.add_field(field, kind)
            index = self._client.prepare_index_params()
            index.add_index("unit", index_type="FLAT" if exact else "AUTOINDEX", metric_type="IP")
            # a search sees what was written before it, whichever node answers
            self._client.create_collection(collection, schema=schema, index_params=index, consistency_level="Strong")
        self._client.load_collection(collection)

    def put(self, rows: Rows) -> None:
        vectors = zip(rows.keys.tolist(), rows.unit, rows.records(), strict=True)
        data = [{"key": key, "unit": unit, **record} for key, unit, record in vectors]
        if data:
            self._client.insert(self._collection, data)

    def nearest(self, unit: np.ndarray, count: int, where: Where) -> list[Rows]:
        found = self._client.search(
            self._collection,
            unit,
            filter=_expression(where),
            limit=count,
            output_fields=_EVERYTHING,
            search_params={"metric_type": "IP"},
        )
        return [self._rows([{"key": hit["key"], **hit["entity"]} for hit in hits]) for hits in found]

    def find(self, ids: Sequence[str]) -> Rows:
        numbers = sorted(map(person, ids))
        found = self._client.query(
            self._collection, filter=f"person in {numbers}", output_fields=_EVERYTHING, limit=BATCH
        )
        return self._rows(found)

    def holds(self, keys: np.ndarray) -> np.ndarray:
        found = self._client.get(self._collection, ids=keys.tolist(), output_fields=["key"]) if len(keys) else []
        return np.isin(keys, [hit["key"] for hit in found])

    def drop(self, keys: np.ndarray) -> None:
        if len(keys):
            self._client.delete(self._collection, ids=keys.tolist())

    def erase(self) -> None:
        self._client.flush(self._collection)
        self._client.compact(self._collection)

    def count(self, where: Where) -> int:
        found = self._client.query(self._collection, filter=_expression(where), output_fields=["count(*)"])
        return int(found[0]["count(*)"])

    def traces(self, row: np.ndarray) -> tuple[list[Path], bytes]:
        files = [] if self._folder is None else sorted(p for p in self._folder.rglob("*") if p.is_file())
        return files, row.astype("<f4").tobytes()

    def close(self) -> None:
        self._client.close()

    def _rows(self, found: Sequence[dict]) -> Rows:
        return Rows.of_records([hit["key"] for hit in found], [hit["unit"] for hit in found], found, self._features)


def _expression(where: Where) -> str:
    """Numbers alone: nothing that a caller wrote enters the text."""
    parts = []
    if where.cameras is not None:
        parts.append(f"camera in {list(map(int, where.cameras))}")
    if where.exclude_camera is not None:
        parts.append(f"camera != {int(where.exclude_camera)}")
    if where.times is not None:
        parts += [f"time >= {where.times[0]!r}", f"time <= {where.times[1]!r}"]
    return " and ".join(parts)
