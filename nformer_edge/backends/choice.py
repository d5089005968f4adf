"""The fastest engine that this machine runs: each is built, all are timed in turn, and one within the budget is taken.

One search over backends and precisions, behind ``--backend auto`` and ``--precision auto`` alike, each with the graph
as it is and with channels filled up to whole blocks (`quantize.padding`). ``--precision auto`` also tries INT8 in those
nodes alone that are faster by it here, by each node's time in a profile. INT8 is timed against FP32 even where nobody
asked for a choice: on some backbones it is slower.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nformer_edge.backends.base import get, names
from nformer_edge.backends.engine import KIND, Built, Engine, EngineManifest
from nformer_edge.backends.spec import AUTO, BuildSpec
from nformer_edge.core.artifact import Artifact
from nformer_edge.core.errors import ArtifactError, BackendError, GateError
from nformer_edge.core.machine import machine
from nformer_edge.core.spec import Precision
from nformer_edge.core.terminal import PROGRESS
from nformer_edge.core.values import Result
from nformer_edge.exporting.bundle import BACKBONE, Bundle, ModelManifest
from nformer_edge.quantize.prepare import CalibrationData, Judging, judging, prepare
from nformer_edge.quantize.spec import BudgetSpec
from nformer_edge.quantize.values import LowPrecision, Score

#: In an engine that was timed against others: the table.
CHOICE = "choice.json"

#: Rounds in turn, after so many that do not count. From the fewest on it ends when the fastest is known.
_WARMUP, _FEWEST, _ROUNDS = 2, 7, 31

#: Chance that one of two equally fast engines wins as often as it did, below which it counts as the faster one.
_CHANCE = 0.01

#: Seconds in which the process must hardly compute, how often to look, and seconds of runs that do not count.
_STILL, _LOOKS, _WARM = 0.02, 25, 0.02


@dataclass(frozen=True)
class Timed:
    """One engine that was tried.

    Args:
        backend: that runs it.
        precision: of the backbone.
        latency_ms: of one batch, the median; null where it was not timed.
        speed_up: over the first that was timed, the median of each round's ratio.
        score: on held-out people, where accuracy was asked for, in the scope of the budget.
        note: why it could not be taken; "" if it could.
        form: what is unlike the plain build: ``padded`` channels, ``mixed`` where INT8 is in the nodes that gain by it.
    """

    backend: str
    precision: Precision
    latency_ms: float = math.nan
    speed_up: float = math.nan
    score: Score | None = None
    note: str = ""
    form: str = ""

    @property
    def name(self) -> str:
        """Such as ``onnxruntime int8 padded``."""
        return " ".join(word for word in (self.backend, self.precision, self.form) if word)


@dataclass(frozen=True)
class Choice(Result):
    """Engines timed in turn on one machine: `CHOICE` in the one that was taken.

    Args:
        cpu: of the machine.
        batch: images in one forward pass of the backbone.
        rounds: that each was timed in.
        budget: what the accuracy of one may cost; null where it was not asked for.
        tried: every engine.
        chosen: index of the one that was taken.
    """

    kind = "choice"
    version = 1

    cpu: str
    batch: int
    rounds: int
    budget: BudgetSpec | None
    tried: tuple[Timed, ...]
    chosen: int

    @property
    def warning(self) -> str:
        """That FP32 is faster than what was taken, with both times; "" if it is not."""
        taken = self.tried[self.chosen]
        plain = [row for row in self.tried if row.precision == "fp32" and row.latency_ms < taken.latency_ms]
        if taken.precision == "fp32" or not plain:
            return ""
        best = min(plain, key=lambda row: row.latency_ms)
        times = f"{taken.latency_ms:.2f} ms against {best.latency_ms:.2f} ms of {best.name}, batch {self.batch}"
        return f"warning: {taken.precision} is slower than FP32 here: {times}; --precision auto takes the fastest"

    def __str__(self) -> str:
        lines = [f"timed in turn, {self.rounds} rounds, batch {self.batch}, on {self.cpu}:"]
        width = max(len(row.name) for row in self.tried)
        for i, row in enumerate(self.tried):
            line = f"  {row.name:<{width}}"
            if not math.isnan(row.latency_ms):
                line += f"  {row.latency_ms:8.2f} ms  {row.speed_up:5.2f} x"
            if row.score is not None and not math.isnan(row.score.map_drop):
                line += f"  {100 * row.score.map_drop:6.2f} points of mAP lost"
            if row.score is not None:
                line += f"  overlap@10 {row.score.overlap_at_10:.3f}"
            line += "  <- taken" if i == self.chosen else f"  ({row.note})" if row.note else ""
            lines.append(line)
        return "\n".join([*lines, *([self.warning] if self.warning else [])])


@dataclass(frozen=True)
class Attempt:
    """An engine that was built, not yet written to its place.

    Args:
        backend: that runs it.
        spec: with its precision.
        folder: of its files, without a manifest.
        low: what it was built by.
        built: what the backend knows of it.
        padded: whether channels were added.
        mixed: whether INT8 is in the nodes alone that gain by it.
    """

    backend: str
    spec: BuildSpec
    folder: Path
    low: LowPrecision
    built: Built
    padded: bool = False
    mixed: bool = False

    def timed(self, latency_ms: float = math.nan, speed_up: float = math.nan) -> Timed:
        """Its row of the table."""
        form = [word for word, is_so in (("mixed", self.mixed), ("padded", self.padded)) if is_so]
        return Timed(self.backend, self.spec.built_precision, latency_ms, speed_up, form=" ".join(form))

    def manifest(self, bundle: Bundle, why: str) -> EngineManifest:
        """What the engine's manifest says."""
        model = {field.name: getattr(bundle.manifest, field.name) for field in fields(ModelManifest)}
        return EngineManifest(
            **{**model, **vars(self.built)},
            backend=self.backend,
            why=why,
            spec=replace(self.spec, exclude_nodes=self.low.exclude_nodes),
            bundle_sha256=bundle.sha256,
            calibration=self.low.calibration,
            float_nodes=self.low.exclude_nodes,
            padded=self.padded,
        )

    def open(self, bundle: Bundle) -> Engine:
        """The engine, of files that were written a moment ago and are in no manifest."""
        files = {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}
        return Engine(Artifact(self.folder, KIND, {}, files, ""), self.manifest(bundle, ""))


def choose_backends(
    backend: str = AUTO, precision: str = "fp32", *, int8_head: bool = False
) -> tuple[tuple[str, ...], str]:
    """The backends to build for, and why them: one, or those of the CPU, among which the clock decides.

    Raises:
        BackendError: if the one asked for cannot build here, or none can build this precision.
    """
    if backend != AUTO:
        missing = get(backend).missing()
        if missing:
            hint = f"pip install 'nformer-edge[{get(backend).EXTRA}]', or --backend auto; see `nformer-edge doctor`."
            raise BackendError(backend, ", ".join(missing), "a machine that it can build on", hint)
        if precision not in (AUTO, *get(backend).PRECISIONS):
            expected = " | ".join(get(backend).PRECISIONS)
            raise BackendError("precision", f"{precision} for {backend}", expected, "Choose another backend for it.")
        if int8_head and not get(backend).INT8_HEAD:
            able = " | ".join(name for name in names() if get(name).INT8_HEAD)
            raise BackendError("head_precision", f"int8 for {backend}", f"{able}, or fp32", "Leave it out.")
        return (backend,), "as asked"
    excluded: list[str] = []
    found: list[str] = []
    for name in names():
        one = get(name)
        missing = tuple(dict.fromkeys((*one.missing(), *one.missing_to_run())))
        if missing or (precision != AUTO and precision not in one.PRECISIONS):
            excluded.append(f"{name}: {', '.join(missing) or f'no {precision} on this backend'}")
        elif int8_head and not one.INT8_HEAD:
            excluded.append(f"{name}: no int8 head on this backend")
        elif not found or one.ON_CPU:
            found.append(name)
        if found and not get(found[0]).ON_CPU:
            break
    if not found:
        hint = "Choose --int8 or no precision flag, or see `nformer-edge doctor`."
        raise BackendError("backend", "; ".join(excluded), f"one that can build {precision} here", hint)
    best = "the best" if len(found) == 1 else "the fastest"
    return tuple(found), f"{best} that this machine has ({'; '.join(excluded)})" if excluded else f"{best} there is"


def build_fastest(
    bundle: Bundle, work: Path, spec: BuildSpec, data: CalibrationData, out: Path
) -> tuple[Attempt, str, Choice | None]:
    """Builds what is asked for; where that leaves a choice, everything that may be taken, and times it.

    Args:
        bundle: what is built.
        work: an empty folder for the files.
        spec: what is asked for; backend and precision may be ``auto``.
        data: what low precision is measured on.
        out: the engine's folder to be, beside which a search keeps what it measured.

    Returns:
        The engine, why this backend, and the table; None where nothing was timed.

    Raises:
        BackendError: if nothing can be built.
        UsageError, DataError, GateError: as `quantize.prepare.prepare`.
    """
    backends, why = choose_backends(spec.backend, spec.precision, int8_head=spec.head_precision == "int8")
    on_cpu = get(backends[0]).ON_CPU
    judge = judging(bundle, spec, data) if spec.precision == AUTO else None
    graphs = {False: bundle}
    if on_cpu and (judge is not None or len(backends) > 1) and (padded := _with_padding(bundle)) is not None:
        graphs[True] = padded
    wanted = [
        (name, precision, form)
        for form in graphs
        for name in backends
        for precision in _precisions(spec, name, beside_fp32=on_cpu)
    ]
    wanted.sort(key=lambda one: (one[1] != "fp32", one[2]))  # what others are compared with comes first
    measured: dict[tuple[str, bool], LowPrecision] = {}
    attempts: list[Attempt] = []
    refused: list[Timed] = []
    for i, (name, precision, form) in enumerate(wanted):
        backend, folder, exact = get(name), work / str(i), precision == spec.precision
        folder.mkdir()
        try:
            half = "fp16" in backend.PRECISIONS and not backend.ON_CPU
            exclude = spec.exclude_nodes if precision == "int8" else ()
            one = replace(spec, precision=precision, exclude_nodes=exclude)
            if (precision, half) not in measured:
                others = {"int8": data, "fp16": replace(data, budget=None)}
                given = data if exact else others.get(precision, CalibrationData())
                measured[precision, half] = prepare(bundle, one, given, out, half=half, judge=judge)
            attempts.append(_attempt(graphs[form], name, one, folder, measured[precision, half], padded=form))
        except (BackendError, GateError) as e:
            if len(backends) == 1 and exact:
                raise
            form_of = "padded" if form else ""
            refused.append(Timed(name, precision, note=f"{e.subject}: got {e.got}", form=form_of))
    if not any(spec.precision in (AUTO, attempt.spec.precision) for attempt in attempts):
        got = "; ".join(f"{row.name}: {row.note}" for row in refused)
        raise BackendError("backend", got, f"one that can build {spec.precision} here", "See `nformer-edge doctor`.")
    if len(wanted) == 1:
        return attempts[0], why, None
    if judge is not None and on_cpu:
        attempts += _mixed(graphs, attempts, work)
    return _choose(bundle, attempts, refused, spec, judge, why)


def _with_padding(bundle: Bundle) -> Bundle | None:
    """The bundle with channels added to its backbone; None where that adds none, or without the package that does."""
    try:
        import onnx

        from nformer_edge.quantize.padding import pad_channels
    except ImportError:
        return None
    padded = pad_channels(onnx.load_from_string(bundle.backbone)) if bundle.backbone_precision == "fp32" else None
    if padded is None:
        return None
    return replace(
        bundle, files=replace(bundle.files, files={**bundle.files.files, BACKBONE: padded.SerializeToString()})
    )


def _attempt(
    bundle: Bundle, name: str, spec: BuildSpec, folder: Path, low: LowPrecision, *, padded: bool, mixed: bool = False
) -> Attempt:
    low.save(folder)
    return Attempt(name, spec, folder, low, get(name).build(bundle, folder, spec, low), padded, mixed)


def _mixed(graphs: Mapping[bool, Bundle], attempts: Sequence[Attempt], work: Path) -> list[Attempt]:
    """For each INT8 engine one in which the nodes that INT8 does not make faster here are in float."""
    import onnx

    from nformer_edge.quantize.placement_cpu import slower_nodes

    found: list[Attempt] = []
    for int8 in (a for a in attempts if a.spec.precision == "int8"):
        bundle = graphs[int8.padded]
        images = _batch(bundle, int8.spec)
        same = [a for a in attempts if (a.backend, a.padded) == (int8.backend, int8.padded)]
        times = {
            a.spec.built_precision: get(a.backend).node_ms(
                (a.folder / BACKBONE).read_bytes(), a.spec.built_precision, images
            )
            for a in same
        }
        slow = times.pop("int8")
        if not times:
            continue
        plain = min(times.values(), key=lambda found: sum(found.values()))
        excluded = slower_nodes(onnx.load_from_string(bundle.backbone), slow, plain)
        low = replace(int8.low, exclude_nodes=tuple(dict.fromkeys((*int8.low.exclude_nodes, *excluded))))
        folder = work / f"{int8.folder.name}_mixed"
        folder.mkdir()
        with suppress(ArtifactError):  # hardly a node gains by INT8
            found.append(_attempt(bundle, int8.backend, int8.spec, folder, low, padded=int8.padded, mixed=True))
    return found


def _batch(bundle: Bundle, spec: BuildSpec) -> np.ndarray:
    """Images of the usual number, of the self-test's."""
    return np.resize(bundle.golden["images"], (spec.batch[1], *bundle.golden["images"].shape[1:]))


def _precisions(spec: BuildSpec, backend: str, *, beside_fp32: bool) -> tuple[Precision, ...]:
    if spec.precision == AUTO:
        return get(backend).PRECISIONS
    asked = spec.built_precision
    return ("fp32", asked) if beside_fp32 and asked != "fp32" else (asked,)


def _choose(
    bundle: Bundle,
    attempts: Sequence[Attempt],
    refused: Sequence[Timed],
    spec: BuildSpec,
    judge: Judging | None,
    why: str,
) -> tuple[Attempt, str, Choice]:
    rows: list[Timed] = []
    with ExitStack() as stack:
        runners = [stack.enter_context(get(a.backend).run(a.open(bundle), device=spec.device)) for a in attempts]
        images = _batch(bundle, spec)
        taken = take_turns([partial(runner.embed, images) for runner in runners], seconds_of)
        for attempt, runner, times in zip(attempts, runners, taken, strict=True):
            speed_up = statistics.median((taken[0] / times).tolist())
            row = attempt.timed(statistics.median(times.tolist()), speed_up)
            rows.append(row if judge is None else _judged(row, judge, runner.embed))
    may = [i for i, a in enumerate(attempts) if spec.precision in (AUTO, a.spec.precision) and not rows[i].note]
    chosen = fastest([taken[i] for i in may])
    choice = Choice(
        cpu=machine().cpu,
        batch=spec.batch[1],
        rounds=taken.shape[1],
        budget=None if judge is None else judge.budget,
        tried=(*rows, *refused),
        chosen=may[chosen],
    )
    return attempts[may[chosen]], "by the clock" if len(may) > 1 else why, choice


def _judged(row: Timed, judge: Judging, embed: Callable[[np.ndarray], np.ndarray]) -> Timed:
    """With its score on held-out people, unless it is what the others are compared with."""
    if row.precision == "fp32":
        return row
    score = judge.evaluator.engine_score(embed)[judge.budget.counts(judge.evaluator.scopes)]
    return replace(row, score=score, note="" if judge.budget.holds(score) else f"not {judge.budget}")


def seconds_of(run: Callable[[], object]) -> float:
    """What one run takes, after `settle`: as in a process of its own."""
    settle(run)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def settle(run: Callable[[], object]) -> None:
    """Waits until the process hardly computes, then runs for `_WARM` seconds, once at least, as a row of runs does.

    The threads of an onnxruntime session spin for 32 ms after a run, on cores that the next engine would have: of five
    that took turns 20 ms apart, OSNet x0.25 took 9.2 ms a batch in place of 5.4. A run after a pause is slower too.
    """
    for _ in range(_LOOKS):
        used = time.process_time()
        time.sleep(_STILL)
        if time.process_time() - used < 0.1 * _STILL:
            break
    begun = time.perf_counter()
    while True:
        run()
        if time.perf_counter() - begun >= _WARM:
            return


def take_turns(runs: Sequence[Callable[[], object]], seconds: Callable[[Callable[[], object]], float]) -> np.ndarray:
    """Times `runs` in turn, beginning with another one each round, until the fastest is known or `_ROUNDS` are over.

    Args:
        runs: what is timed.
        seconds: times one run.

    Returns:
        Milliseconds [runs, rounds].
    """
    taken = np.empty((len(runs), _ROUNDS))
    for i in tqdm(range(-_WARMUP, _ROUNDS), desc="timing", unit="round", **PROGRESS):
        for turn in range(len(runs)):
            which = (i + turn) % len(runs)
            found = 1000 * seconds(runs[which])
            if i >= 0:
                taken[which, i] = found
        if i + 1 >= _FEWEST:
            so_far = taken[:, : i + 1]
            first = int(np.argmin(np.median(so_far, axis=1)))
            if all(is_faster(so_far[first], other) for j, other in enumerate(so_far) if j != first):
                return so_far
    return taken


def is_faster(times: np.ndarray, other: np.ndarray) -> bool:
    """Whether `times` won more of the rounds than two equally fast ones would but with `_CHANCE`: the sign test."""
    wins, rounds = int((times < other).sum()), len(times)
    return sum(math.comb(rounds, k) for k in range(wins, rounds + 1)) / 2**rounds < _CHANCE


def fastest(taken: Sequence[np.ndarray]) -> int:
    """Index of the smallest median among those that are faster than the first; the first if none is."""
    better = [i for i in range(1, len(taken)) if is_faster(taken[i], taken[0])]
    return min(better, key=lambda i: float(np.median(taken[i])), default=0)
