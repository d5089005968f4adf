#!/usr/bin/env bash
# Milvus Lite: compact() answers "Completed" and does nothing; a deleted row's vector and text stay in the files.
#
# A deleted row is marked in a delta file and is in no answer. compact() gives job 0, whose state is at once Completed, but
# no file is rewritten: compaction runs after flushes alone, and only where several data files are of like size. So a
# deleted face stays readable, in the data file and once more in the index file, over any number of flushes, reloads
# and openings. Whoever must erase it has to write the rows that stay to a new collection and drop this one.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check milvus-lite==3.2.2 pymilvus==3.0.2 numpy==2.4.6
cd "$work"
"$work/env/bin/python" -W ignore - <<'PY'
from importlib.metadata import version
from pathlib import Path

import numpy as np
from pymilvus import DataType, MilvusClient

ROWS, SIZE, NAME = 200, 32, "the name of a person"
vectors = np.random.default_rng(0).standard_normal((ROWS, SIZE)).astype(np.float32)


def opened():
    client = MilvusClient("store.db")
    if not client.has_collection("faces"):
        schema = client.create_schema(auto_id=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=SIZE)
        schema.add_field("name", DataType.VARCHAR, max_length=100)
        index = client.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type="IP")
        client.create_collection("faces", schema=schema, index_params=index)
    client.load_collection("faces")
    return client


def files_with(what):
    return sum(what in path.read_bytes() for path in Path("store.db").rglob("*") if path.is_file())


client = opened()
rows = [{"id": i, "vector": v, "name": NAME if i == 5 else f"person {i}"} for i, v in enumerate(vectors)]
client.insert("faces", rows)
client.flush("faces")
client.delete("faces", ids=[5])
client.flush("faces")
job = client.compact("faces")
state = client.get_compaction_state(job)
client.release_collection("faces")
client.close()
client = opened()
left = len(client.get("faces", ids=[5]))
seen = files_with(vectors[5].tobytes()), files_with(NAME.encode())
print("milvus-lite", version("milvus-lite"), "pymilvus", version("pymilvus"))
print(f"deleted, flushed, compacted (job {job}: {state}), opened again: {left} rows found by id")
print(f"{seen[0]} files hold the deleted vector, {seen[1]} the name")
client.close()
assert (job, state, left, seen) == (0, "Completed", 0, (2, 1)), f"changed: {job, state, left, seen}"
PY
