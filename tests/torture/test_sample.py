"""A sample of the scoreboard (`make torture` runs all of it), and what it is built of."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torture import cases, shim

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the scoreboard needs Linux")


def test_a_sample_of_the_scoreboard_has_no_violation_and_catches_every_planted_fault() -> None:
    command = [sys.executable, "-m", "torture", "--each", "2", "--share", "0.01", "--workers", "2"]
    env = shim.environment()
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]


def test_no_violation_in_500_cases_bounds_the_rate_by_the_rule_of_three() -> None:
    assert abs(cases.upper_bound(0, 500) - 3 / 500) < 1e-4
    assert abs(cases.upper_bound(1, 500) - 0.00946) < 1e-4  # scipy.stats.beta.ppf(0.95, 2, 499)


ENDS = {
    cases.TRACE: lambda: 1 / 0,
    cases.CRASH: lambda: os._exit(7),
    cases.HANG: lambda: time.sleep(60),
    cases.INTERNAL: lambda: (3, None),
    cases.DONE: lambda: (0, "x" * 10**6),
}


@pytest.mark.parametrize("end", ENDS)
def test_how_a_case_ended_is_told(end: str) -> None:
    assert cases.attempt(ENDS[end], limit_s=2).status == end


def test_a_case_that_leaves_a_process_behind_ends_and_takes_it_along(tmp_path: Path) -> None:
    def body() -> tuple[int, int]:
        child = os.fork()
        if child == 0:
            time.sleep(60)
        return 0, child

    outcome = cases.attempt(body, limit_s=10)
    assert outcome.status == cases.DONE
    assert outcome.seconds < 9
    for _ in range(100):  # whoever adopts it reaps it
        if not Path(f"/proc/{outcome.value}").exists() or "Z" in Path(f"/proc/{outcome.value}/stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the process lives")


def test_a_row_goes_on_behind_a_worker_that_dies_or_hangs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cases, "HANG_S", 2.0)
    runs = [lambda _: (None, "done"), lambda _: os._exit(1), lambda _: time.sleep(60), lambda _: ("bad", "done")]
    row = cases.run_row("row", [cases.Case("kind", run) for run in runs], [], tmp_path, workers=2)
    assert row.outcomes == {"done": 2, "crash": 1, "hang": 1}
    assert sorted(row.violations) == ["kind: bad", "kind: case 1: crash", "kind: case 2: hang"]
