"""The table: rows, their cases, and what they show."""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from torture import corruption, gallery, hostile, interruption, signed
from torture.artifacts import Kind, Workshop
from torture.cases import DONE, Outcome, Row, attempt, run_row


def prepare(root: Path) -> tuple[Workshop, list[Kind], dict[str, Outcome]]:
    """Artifacts, doors that work, and everything imported before the first fork."""
    import torch

    from nformer_edge import cli

    torch.set_num_threads(1)
    cli.parser = cache(cli.parser)  # each command line is read anew, by the same parser
    cli.parser()
    workshop = Workshop(root / "made")
    workshop.make()
    kinds, sound = workshop.kinds(), {}
    for kind in kinds:
        work = root / "sound" / kind.name.replace(" ", "-")
        work.mkdir(parents=True)
        runs = [attempt(lambda k=kind, w=work: k.run(w), limit_s=300) for _ in range(2)]
        assert runs[0].status == DONE, (kind.name, runs)
        assert runs[0].value == runs[1].value, (kind.name, runs)
        sound[kind.name] = runs[1]
    return workshop, kinds, sound


def run(
    root: Path,
    each: int,
    share: float,
    only: tuple[str, ...],
    kinds_of: tuple[str, ...],
    workers: int,
    kept: Path | None = None,
) -> list[Row]:
    """Every row whose name holds one of `only`, and of its cases those whose kind holds one of `kinds_of`.

    Args:
        each: cases a kind of artifact in each row of corruption.
        share: of the other rows' cases.
        kept: rows that stand in this file are not run again; the others are added to it.
    """
    known = [Row(**json.loads(line)) for line in kept.read_text().splitlines()] if kept and kept.exists() else []
    workshop, kinds, sound = prepare(root)
    makers = {
        **corruption.rows(kinds, sound, each),
        **signed.rows(workshop, kinds, 15 * each),
        **hostile.rows(workshop, kinds, sound),
        **interruption.rows(workshop, root),
        **gallery.rows(root),
    }
    gc.collect()
    gc.freeze()
    rows = []
    for name, make in makers.items():
        done = [row for row in known if row.name == name]
        if not done and (not only or any(word in name for word in only)):
            cases, faults = make()
            cases = [c for c in cases if not kinds_of or any(word in c.kind for word in kinds_of)]
            if name not in (*corruption.CHANGES, signed.ROW):
                step = 1 / share
                cases = [cases[int(i * step)] for i in range(round(len(cases) * share))]
            done = [run_row(name, cases, faults, root / "cases", workers)]
            tell(done[0])
            if kept:
                with open(kept, "a") as file:
                    file.write(json.dumps(vars(done[0])) + "\n")
        rows += done
    return rows


def tell(row: Row) -> None:
    """A row in full, on standard error."""
    counts = f"{row.cases} cases, {len(row.violations)} violations, faults {row.caught}, {dict(row.outcomes)}"
    print(f"{row.name}: {counts}, {row.seconds:.0f} s, {row.cpu_seconds:.0f} s of CPU", file=sys.stderr)
    print("".join(f"  {violation}\n" for violation in row.violations), end="", file=sys.stderr, flush=True)


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| Row | cases | violations | upper 95 % bound | planted faults caught | seconds | of CPU |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        bound = f"{100 * r.upper:.2f} %"
        caught = f"{r.caught[0]} of {r.caught[1]}"
        times = f"{r.seconds:,.0f} | {r.cpu_seconds:,.0f}"
        lines.append(f"| {r.name} | {r.cases:,} | {len(r.violations)} | {bound} | {caught} | {times} |")
    cases, lost = sum(r.cases for r in rows), sum(len(r.violations) for r in rows)
    caught = f"{sum(r.caught[0] for r in rows)} of {sum(r.caught[1] for r in rows)}"
    times = f"{sum(r.seconds for r in rows):,.0f} | {sum(r.cpu_seconds for r in rows):,.0f}"
    lines.append(f"| all | {cases:,} | {lost} | | {caught} | {times} |")
    return "\n".join(lines) + "\n"


def where() -> str:
    """Commit, machine and day, in a sentence."""
    import nformer_edge

    folder = Path(nformer_edge.__file__).parents[1]
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=8", "--exclude", "*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    cpu = f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPUs"
    python = f"Python {platform.python_version()}, Linux {platform.release()}"
    return f"Commit {commit or 'unknown'}, {time.strftime('%Y-%m-%d')}; {cpu}; {python}.\n"


def write(path: Path, text: str) -> None:
    """Puts the table between the markers of a page."""
    start, end = "<!-- torture: begin -->\n", "<!-- torture: end -->\n"
    before, _, rest = path.read_text().partition(start)
    path.write_text(before + start + text + end + rest.partition(end)[2])
