#!/usr/bin/env bash
# LanceDB: a deleted vector's bytes stay in the table's files after optimize() with clean-up of all old versions.
#
# delete() marks rows, which is usual. optimize(cleanup_older_than=0) drops old versions, but rewrites a data file only
# where more than a tenth of its rows are deleted. One person's few images in a gallery are less, so they stay readable
# in the live file for good. With a fifth of the rows deleted they go. Whoever must erase a face has to rewrite the table.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check lancedb==0.40.0 numpy==2.4.6
cd "$work"
"$work/env/bin/python" -W ignore - <<'PY'
from datetime import timedelta
from pathlib import Path

import lancedb
import numpy as np

ROWS = 64
vectors = np.random.default_rng(0).standard_normal((ROWS, 32)).astype(np.float32)


def files_with(folder, row):
    return sum(vectors[row].tobytes() in f.read_bytes() for f in Path(folder).rglob("*") if f.is_file())


print("lancedb", lancedb.__version__)
seen = {}
for deleted in (1, ROWS // 5):
    folder = f"store{deleted}"
    table = lancedb.connect(folder).create_table("t", [{"id": i, "vector": vectors[i]} for i in range(ROWS)])
    table.delete(f"id < {deleted}")
    for _ in range(2):
        table.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)
    seen[deleted] = files_with(folder, 0)
    print(f"{deleted} of {ROWS} rows deleted, {table.count_rows()} left: {seen[deleted]} files hold a deleted vector")
assert seen == {1: 1, ROWS // 5: 0}, f"changed: {seen}"
PY
