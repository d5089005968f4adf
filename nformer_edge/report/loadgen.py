"""MLPerf LoadGen around a benchmark's queries: it issues them, has its own clock, and says what the run is worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

#: LoadGen's own of its log: "early_stopping_latency_ss" for SingleStream, "_ms" for MultiStream.
_ESTIMATE = {"SingleStream": "early_stopping_latency_ss", "MultiStream": "early_stopping_latency_ms"}


@dataclass(frozen=True)
class LoadGen:
    """What LoadGen says of a run.

    Args:
        version: of LoadGen.
        valid: its verdict.
        count: queries that it issued.
        early_stopping_ms: its estimate of the scenario's percentile; null where it gives none.
        percentile_ms: the plain percentile that its summary begins with, which is another number.
        latency_ms: of each query by LoadGen's clock, in the order of issue.
    """

    version: str
    valid: bool
    count: int
    early_stopping_ms: float | None
    percentile_ms: float
    latency_ms: tuple[float, ...]


def run_loadgen(answer: Callable[[Sequence[int]], None], scenario: str, count: int, images: int, known: int) -> LoadGen:
    """Lets LoadGen issue `count` queries of `images` images, one after the other.

    Args:
        answer: processes the images with these numbers; returns once the query is answered.
        scenario: SingleStream or MultiStream.
        count: queries.
        images: in one query.
        known: different images; LoadGen draws their numbers by its own seeds.

    Raises:
        ModuleNotFoundError: if LoadGen is not installed (``pip install 'nformer-edge[loadgen]'``).
    """
    import mlperf_loadgen as lg

    failed: list[BaseException] = []

    def issue(samples: Sequence[lg.QuerySample]) -> None:
        try:
            if not failed:
                answer([sample.index for sample in samples])
        except BaseException as e:  # LoadGen calls from a thread of its own, where an exception would end the process
            failed.append(e)
        lg.QuerySamplesComplete([lg.QuerySampleResponse(sample.id, 0, 0) for sample in samples])

    def nothing(*_: object) -> None:
        """Images are read with their query: decoding is part of what is timed."""

    settings, log = lg.TestSettings(), lg.LogSettings()
    settings.scenario, settings.mode = getattr(lg.TestScenario, scenario), lg.TestMode.PerformanceOnly
    settings.min_query_count = settings.max_query_count = count
    settings.min_duration_ms = 0
    settings.multi_stream_samples_per_query = images
    sut, library = lg.ConstructSUT(issue, nothing), lg.ConstructQSL(known, known, nothing, nothing)
    try:
        with TemporaryDirectory() as folder:
            log.log_output.outdir, log.log_output.copy_summary_to_stdout = folder, False
            log.enable_trace = True
            lg.StartTestWithLogSettings(sut, library, settings, log, "")
            if failed:
                raise failed[0]
            return _read(Path(folder), scenario)
    finally:
        lg.DestroyQSL(library)
        lg.DestroySUT(sut)


def _read(folder: Path, scenario: str) -> LoadGen:
    """What LoadGen wrote: its detailed log, and of its trace the begin and end of each query."""
    said = {}
    for line in (folder / "mlperf_log_detail.txt").read_text().splitlines():
        entry = json.loads(line.removeprefix(":::MLLOG "))
        said[entry["key"]] = entry["value"]
    queries: dict[int, float] = {}
    for line in (folder / "mlperf_log_trace.json").read_text().splitlines():  # the whole is no JSON: quotes in quotes
        if line.startswith('{"name":"Sample"') and "complete_ns" in line:
            at = json.loads(line.rstrip(","))["args"]
            seq, taken = at["query_seq"], (at["complete_ns"] - at["issue_start_ns"]) / 1e6
            queries[seq] = max(taken, queries.get(seq, 0.0))  # of several images, the last one's end counts
    estimate = said.get(_ESTIMATE[scenario], 0)
    share = "90.00" if scenario == "SingleStream" else "99.00"
    return LoadGen(
        version=str(said["loadgen_version"]),
        valid=said["result_validity"] == "VALID",
        count=len(queries),
        early_stopping_ms=estimate / 1e6 if estimate else None,
        percentile_ms=said[f"result_{share}_percentile_latency_ns"] / 1e6,
        latency_ms=tuple(queries[seq] for seq in sorted(queries)),
    )
