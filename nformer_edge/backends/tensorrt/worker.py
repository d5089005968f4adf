"""The process that `backends.tensorrt.job` starts: one plan, one answer in a JSON file. Loads only the builder."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from nformer_edge.backends.tensorrt.job import PlanJob
from nformer_edge.backends.tensorrt.network import build_plan
from nformer_edge.core.errors import BackendError, Error


def work(job: PlanJob) -> dict[str, Any]:
    """Builds the plan. Returns the fields of `BuiltPlan`.

    Raises:
        Error: as `build_plan` does, or if the package cannot be imported.
    """
    if job.device:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(job.device)
    try:
        trt = importlib.import_module(job.package)
    except (ImportError, OSError) as e:
        raise BackendError(
            job.package,
            f"a package that cannot be imported ({e})",
            "one that can",
            "Install it again, with the CUDA libraries that it names.",
        ) from e
    return build_plan(trt, job)


def main(request: str, answer: str) -> int:
    """Reads a `PlanJob`, writes a `BuiltPlan` or an error."""
    job = PlanJob(**json.loads(Path(request).read_text()))
    try:
        found, code = work(job), 0
    except Error as e:
        plain = {key: None if (v := getattr(e, key)) is None else str(v) for key in ("got", "expected")}
        found, code = {"error": {"subject": e.subject, "hint": e.hint, **plain}}, 2
    Path(answer).write_text(json.dumps(found))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
