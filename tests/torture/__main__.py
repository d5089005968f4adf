"""Runs the scoreboard and prints its table; see `make torture`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from torture import shim


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    parser.add_argument("--each", type=int, default=60, help="cases a kind of artifact in each row of corruption")
    parser.add_argument("--share", type=float, default=1.0, help="of the other rows' cases")
    parser.add_argument("--rows", nargs="+", default=(), metavar="WORD", help="only rows whose name holds one of these")
    parser.add_argument(
        "--kinds", nargs="+", default=(), metavar="WORD", help="only cases of these artifacts or commands"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kept", type=Path, metavar="FILE", help="rows that stand here are done; the others are added")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.md", help="write the table between its markers")
    args = parser.parse_args()
    if not shim.preloaded():
        os.execve(sys.executable, [sys.executable, "-m", "torture", *sys.argv[1:]], shim.environment())
    from torture import board

    root = Path(tempfile.mkdtemp(prefix="torture-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        rows = board.run(root, args.each, args.share, tuple(args.rows), tuple(args.kinds), args.workers, args.kept)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    table = f"{board.where()}\n{board.table(rows)}"
    print(table)
    if args.output:
        board.write(args.output, table)
    return 1 if any(row.lost for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
