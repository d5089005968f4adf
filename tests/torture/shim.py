"""The preloaded library that watches, fails and kills system calls: compiled where it is used."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
OFF, COUNT, FAIL, SHORT, KILL_BEFORE, KILL_AFTER, FULL = range(7)


def library() -> Path:
    """Compiles the library, once a source."""
    name = f"nformer-edge-torture-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    path = Path(tempfile.gettempdir()) / name
    if not path.exists():
        made = path.with_suffix(f".{os.getpid()}")
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-o", made, SOURCE, "-ldl"], check=True)
        made.rename(path)
    return path


def preloaded() -> bool:
    return hasattr(ctypes.CDLL(None), "shim_arm")


def environment() -> dict[str, str]:
    """For a process that is to have the library."""
    return os.environ | {"LD_PRELOAD": str(library()), "OMP_NUM_THREADS": "1", "NFORMER_TORTURE": "1"}


def arm(folder: Path, mode: int, at: int = 0, error: int = 0, room: int = 0, log: int = -1) -> None:
    """From now on, in this process: the `at`-th call below `folder` fails, is cut short or kills."""
    ctypes.CDLL(None).shim_arm(os.fsencode(folder), mode, at, error, ctypes.c_long(room), log)


def calls() -> int:
    """Calls below the folder since `arm`."""
    return int(ctypes.CDLL(None).shim_calls())


def off() -> None:
    ctypes.CDLL(None).shim_off()
