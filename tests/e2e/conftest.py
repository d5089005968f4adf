"""The road, walked once for all end-to-end tests: through the command line, as a user would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from nformer_edge import cli


@dataclass(frozen=True)
class Ran:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs a command in this process; arguments may be paths."""

    def command(*args: object) -> Ran:
        capfd.readouterr()
        try:
            code = cli.main([str(a) for a in args])
        except SystemExit as e:  # argparse leaves this way
            code = int(e.code or 0)
        return Ran(code, *capfd.readouterr())

    return command


def must(*args: object) -> None:
    assert cli.main([str(a) for a in args]) == 0, args


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, model.safetensors, bundle, fp32 and int8: a small dataset and a training of two epochs."""
    root = tmp_path_factory.mktemp("road")
    must("make-data", "-o", root / "data", "--train-ids", 8, "--test-ids", 6, "--seed", 3)
    must("train", "--data", root / "data", "-o", root / "model.safetensors", "--preset", "demo",
         "--imgsz", 64, 32, "--epochs", 2, "--head-epochs", 1)  # fmt: skip
    must("export", root / "model.safetensors", "-o", root / "bundle")
    must("build-engine", root / "bundle", "-o", root / "fp32", "--backend", "onnxruntime")
    must(
        "build-engine", root / "bundle", "-o", root / "int8", "--int8", "--calib-data", root / "data", "--calib-num", 48
    )
    return root


def pytest_terminal_summary(terminalreporter) -> None:
    """Last lines: how many blocks of the docs were run, and how many only parsed, with the reason that each gives."""
    done = {r.nodeid for r in terminalreporter.stats.get("passed", ()) if "test_docs.py" in r.nodeid}
    if done:
        run = sum("at_toy_size" in name for name in done)
        parsed = sum("its_parser_takes" in name for name in done)
        terminalreporter.write_line(f"docs: {run} blocks run at toy size, {parsed - run} parsed by the real parsers")
