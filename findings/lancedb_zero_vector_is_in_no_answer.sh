#!/usr/bin/env bash
# LanceDB: a row with a zero vector is stored and counted, and is in no cosine search, whatever the limit.
#
# Its cosine distance is 0 / 0. Other stores give such a row score 0 or distance 1, so that a search over everything
# returns everything. Here a search with room for all rows returns one row less, without a word; by L2 it is there.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check lancedb==0.40.0 numpy==2.4.6
cd "$work"
"$work/env/bin/python" -W ignore - <<'PY'
import lancedb
import numpy as np

vectors = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
vectors[2] = 0
table = lancedb.connect("store").create_table("t", [{"id": i, "vector": v} for i, v in enumerate(vectors)])
print("lancedb", lancedb.__version__, "rows:", table.count_rows())
seen = {}
for metric in ("l2", "cosine"):
    found = table.search(np.ones(8, np.float32)).distance_type(metric).limit(100).to_list()
    seen[metric] = sorted(row["id"] for row in found)
    print(f"{metric}, limit 100: rows {seen[metric]}")
assert seen == {"l2": [0, 1, 2, 3, 4], "cosine": [0, 1, 3, 4]}, f"changed: {seen}"
PY
