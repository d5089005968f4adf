"""Cross-model evaluation: queries embedded by one model against a gallery embedded by another (a mixed fleet)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from nformer_edge.core.errors import DataError, UsageError
from nformer_edge.core.machine import MachineFacts, machine
from nformer_edge.core.values import Result
from nformer_edge.data.records import Dataset
from nformer_edge.gallery.embed import embed_dataset
from nformer_edge.metrics.bootstrap import DRAWS, TWO_SIDED, Ratio, paired_ratio
from nformer_edge.metrics.ranking import Pair, evaluate
from nformer_edge.metrics.verification import Operating, Rates, fit_threshold
from nformer_edge.report.models import Data, MeasuredData, MeasuredModel, Source, open_dataset, open_model, open_store
from nformer_edge.report.table import format_table, number, percent

HEADERS = ("query", "gallery", "mAP", "Rank-1", "mAP kept", "Rank-1 kept", "threshold", "TMR", "FMR, shared")


@dataclass(frozen=True)
class Pairing:
    """One query model with one gallery model.

    Args:
        query: label of the model that embedded the queries.
        gallery: label of the model that embedded the gallery.
        mAP: mean average precision, 0 to 1.
        rank1: share of queries whose first match is correct.
        queries: that have a match in the gallery.
        mAP_kept: share of the reference's own mAP, with two-sided 95 % bounds by the paired bootstrap; null bounds are
            undecided.
        rank1_kept: likewise, of Rank-1.
        threshold: cosine from which a pair is accepted as one person, fitted to this pairing.
        rates: at that threshold.
        shared_rates: at the threshold that was fitted to the reference's own pairing.
    """

    query: str
    gallery: str
    mAP: float
    rank1: float
    queries: int
    mAP_kept: Ratio
    rank1_kept: Ratio
    threshold: float
    rates: Rates
    shared_rates: Rates

    def cells(self) -> list[str]:
        """As text, under `HEADERS`."""
        scores = [percent(self.mAP, 2), percent(self.rank1, 2), _kept(self.mAP_kept), _kept(self.rank1_kept)]
        rates = [percent(self.rates.true_match, 2), f"{self.shared_rates.false_match:.3g}"]
        return [self.query, self.gallery, *scores, f"{self.threshold:.4f}", *rates]


def _kept(ratio: Ratio) -> str:
    """Percent with its bounds; NaN, which no comparison holds for, is undecided."""
    if not ratio.value >= 0:
        return "undecided"
    bounds = f"{percent(ratio.lower, 2)}, {percent(ratio.upper, 2)}" if ratio.lower >= 0 else "undecided"
    return f"{percent(ratio.value, 2)} [{bounds}]"


@dataclass(frozen=True)
class CrossModel(Result):
    """The accuracy and the decision threshold of every pairing of query model and gallery model.

    Devices exchange backbone features, so these are ranked; the head is not run.

    Args:
        machine: where it was measured.
        models: the first, paired with itself, is the reference.
        data: what was ranked.
        wanted_false_match_rate: wanted share of pairs of different people, across cameras, that are accepted.
        genuine_pairs: pairs of one person across cameras.
        impostor_pairs: pairs of different people across cameras.
        pairings: each query model with each gallery model.
        notes: models whose images come otherwise than the reference's, and how.
    """

    kind: ClassVar[str] = "cross-model"
    version: ClassVar[int] = 4

    machine: MachineFacts
    models: tuple[MeasuredModel, ...]
    data: MeasuredData
    wanted_false_match_rate: float
    genuine_pairs: int
    impostor_pairs: int
    pairings: tuple[Pairing, ...]
    notes: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """How to read the pairings."""
        reference = self.models[0].label
        return (
            f"Threshold: the cosine from which {self.wanted_false_match_rate:g} of "
            f"{number(self.impostor_pairs, 0)} pairs of different people across cameras are accepted. TMR: the share "
            f"of {number(self.genuine_pairs, 0)} pairs of one person that it accepts. FMR, shared: the share of pairs "
            f"of different people accepted at the threshold of {reference} alone. mAP, Rank-1 and TMR in percent. "
            f"Kept: percent of the figure of {reference} alone, with 95 % intervals (paired bootstrap over queries)."
        )

    def __str__(self) -> str:
        return "\n".join([format_table(HEADERS, [p.cells() for p in self.pairings], left=2), self.note, *self.notes])


def cross_model(
    models: Sequence[Source],
    data: Data | None = None,
    *,
    false_match_rate: float = 0.001,
    batch: int = 32,
    draws: int = DRAWS,
    seed: int = 0,
    intra_op_threads: int | None = None,
    layout: str = "auto",
) -> CrossModel:
    """Accuracy and fitted threshold of every pairing of query model and gallery model.

    Args:
        models: open models, checkpoints, bundles, engines, or feature stores that `embed` wrote. Each embeds queries
            and gallery; the first with itself is the reference.
        data: a dataset or its folder; not needed where all `models` are feature stores.
        false_match_rate: wanted share of pairs of different people, across cameras, that are accepted.
        batch: images that the backbone sees at once.
        draws: of the bootstrap.
        seed: of the bootstrap.
        intra_op_threads: of the backends; their own choice if None.
        layout: of the dataset's folder.

    Raises:
        UsageError: for fewer than two models, a model without `data`, or a rate below one pair.
        DataError: if two models did not embed the same images, or to vectors of different length.
    """
    if len(models) < 2:
        raise UsageError("models", len(models), "at least two", "Name one for each kind of device.")
    stores = [open_store(model) for model in models]
    dataset = None if all(stores) or data is None else open_dataset(data, layout)
    described: list[MeasuredModel] = []
    embedded: list[Pair] = []
    for source, store in zip(models, stores, strict=True):
        model, pair = _embedded(source, store, dataset, batch, intra_op_threads)
        described.append(model)
        embedded.append(pair)
        _check_same_images(described[0].label, embedded[0], model.label, pair)
    described = _with_own_labels(described)
    pairings, first = _pairings([m.label for m in described], embedded, false_match_rate, draws, seed)
    told = MeasuredData.of(described[0].path if dataset is None else dataset, *embedded[0])
    pairs = first.genuine, first.impostor
    notes = other_images([m.label for m in described], [query.spec for query, _ in embedded])
    return CrossModel(machine(), tuple(described), told, false_match_rate, *pairs, tuple(pairings), notes)


def other_images(labels: list[str], specs: list[str]) -> tuple[str, ...]:
    """Of each model that prepares images otherwise than the first: what differs. `specs` are JSON, "" if unknown."""
    prepared = [json.loads(spec).get("preprocess", {}) if spec else {} for spec in specs]
    found = []
    for label, theirs in zip(labels[1:], prepared[1:], strict=True):
        both = prepared[0].keys() & theirs.keys()
        differs = [f"{k} {theirs[k]}, not {prepared[0][k]}" for k in sorted(both) if theirs[k] != prepared[0][k]]
        if differs:
            found.append(f"{label} prepares images otherwise than {labels[0]}: {'; '.join(differs)}")
    return tuple(found)


def _embedded(
    source: Source, store: Pair | None, dataset: Dataset | None, batch: int, intra_op_threads: int | None
) -> tuple[MeasuredModel, Pair]:
    """A model's description and its features of queries and gallery; the model is closed again."""
    if store is not None:
        path = str(source)
        return MeasuredModel(Path(path).stem, path), store
    if dataset is None:
        raise UsageError(str(source), "a model and no data", "a dataset", "Name it with --data.")
    with open_model(source, intra_op_threads) as runner:
        query, gallery = embed_dataset(runner, dataset, ("query", "gallery"), batch).values()
        return MeasuredModel.of(source, runner), (query, gallery)


def _check_same_images(name: str, reference: Pair, other_name: str, other: Pair) -> None:
    for split, ours, theirs in zip(("query", "gallery"), reference, other, strict=True):
        subject = f"{other_name}: {split}"
        files = [[os.path.basename(p) for p in s.paths] for s in (ours, theirs)]
        same = len(ours) == len(theirs) and files[0] == files[1]
        if not (same and (ours.pids == theirs.pids).all() and (ours.camids == theirs.camids).all()):
            got, expected = f"other images, labels or another order than {name}", f"the same {len(ours)} images"
            raise DataError(subject, got, expected, "Embed the same dataset with both.")
        sizes = [s.features.shape[1] for s in (theirs, ours)]
        if sizes[0] != sizes[1]:
            got, expected = f"{sizes[0]} numbers a row", f"{sizes[1]}, as {name}"
            raise DataError(subject, got, expected, "Use models of one checkpoint.")


def _with_own_labels(models: list[MeasuredModel]) -> list[MeasuredModel]:
    """Adds the path, or else the place, to labels that several models have."""
    labels = [m.label for m in models]
    return [
        replace(m, label=f"{m.label} ({m.path or i})") if labels.count(m.label) > 1 else m
        for i, m in enumerate(models, 1)
    ]


def _pairings(
    labels: list[str], embedded: list[Pair], rate: float, draws: int, seed: int
) -> tuple[list[Pairing], Operating]:
    """Each query model with each gallery model, the reference's own first; and the reference's threshold."""
    own = evaluate(*embedded[0])
    fit = fit_threshold(*embedded[0], rate)
    valid = own.valid  # labels alone decide it: the same in every pairing
    results: list[Pairing] = []
    for query, (queries, _) in zip(labels, embedded, strict=True):
        for gallery, (_, images) in zip(labels, embedded, strict=True):
            ranked, fitted = own, fit
            if results:
                ranked, fitted = evaluate(queries, images), fit_threshold(queries, images, rate, also_at=fit.threshold)
            ap = paired_ratio(ranked.ap[valid], own.ap[valid], draws, seed, TWO_SIDED)
            hits = paired_ratio(ranked.hits(1)[valid], own.hits(1)[valid], draws, seed, TWO_SIDED)
            scores = ranked.mAP, ranked.rank(1), int(ranked.valid.sum()), ap, hits
            rates = fitted.rates, fitted.elsewhere or fitted.rates
            results.append(Pairing(query, gallery, *scores, fitted.threshold, *rates))
    return results, fit
