"""Which head, started and trained how: an ablation on training identities that are held out.

Takes a feature store with a split ``train`` (`nformer-edge embed ... --splits train --views 4`). A third of the
identities is held out; of each of them one image a camera asks and the others answer, all related together. With
`--folds 3` each third is held out in turn, and figures are means. The test split is never opened. Each `--vary`
changes one setting of the base that `--set` describes.

    python benchmarks/head_ablation.py msmt17.npz --set rule=affinity layers=3 --vary k=10,30 start=random -o out.json

Settings are the fields of HeadSpec and HeadConfig, and ``views`` (of the store's views, how many are learnt from).
Features of images that their own weights were trained on are saturated: `--spread 2.25` moves each image so much
farther from its person's mean in what is held out; the setting ``spread`` does so in what is learnt from.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np

from nformer_edge.core.artifact import atomic_write_json
from nformer_edge.core.features import Features, load_features
from nformer_edge.core.machine import machine
from nformer_edge.core.spec import HeadSpec, from_dict
from nformer_edge.metrics.ranking import evaluate
from nformer_edge.metrics.rerank import reciprocal_mean
from nformer_edge.report.table import format_table
from nformer_edge.training.config import HeadConfig
from nformer_edge.training.head import spread, train_head
from nformer_edge.training.relate import relate

#: Parts of the identities, of which one is held out.
FOLDS = 3


def hold_out(
    pids: np.ndarray, camids: np.ndarray, seed: int, fold: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows to learn from, and of the identities held out the rows that ask and those that answer."""
    people = np.unique(pids)
    rng = np.random.default_rng(seed)
    rng.shuffle(people)
    third = round(len(people) / FOLDS)
    held = np.isin(pids, people[fold * third : (fold + 1) * third if fold + 1 < FOLDS else None])
    rows = np.random.default_rng([seed, 7]).permutation(np.flatnonzero(held))
    _, first = np.unique(np.stack([pids[rows], camids[rows]]), axis=1, return_index=True)
    query = np.sort(rows[first])
    return np.flatnonzero(~held), query, np.setdiff1d(np.flatnonzero(held), query)


def score(query: Features, gallery: Features) -> dict[str, float]:
    result = evaluate(query, gallery)
    return {"mAP": 100 * result.mAP, "rank1": 100 * float(result.cmc[0])}


class Setting:
    """One line of the table: a head's spec, its training, and how many views it learns from."""

    def __init__(self, values: dict[str, Any], features: int) -> None:
        own = {f.name for f in fields(HeadSpec)}
        head = {k: v for k, v in values.items() if k in own}
        self.spec = from_dict(HeadSpec, {**head, "features": features})
        self.config = from_dict(HeadConfig, {k: v for k, v in values.items() if k not in own})

    def run(self, fold: Fold, seed: int, landmark_seeds: int) -> dict[str, Any]:
        """Trains, and scores the start and the last epoch's head."""
        views = fold.views[: self.config.views]
        head, epochs = train_head(views, self.spec, replace(self.config, epochs=0), seed=seed)
        start = score(*relate(head, fold.query, fold.gallery))
        begin = time.perf_counter()
        if self.config.epochs:
            head, epochs = train_head(views, self.spec, self.config, seed=seed)
        seconds = time.perf_counter() - begin
        seeds = range(0 if self.config.epochs else 1, landmark_seeds)
        trained = [score(*relate(head, fold.query, fold.gallery, seed=s)) for s in seeds]
        trained = trained if self.config.epochs else [start, *trained]
        return {"start": start, "seconds": seconds, "epochs": epochs, "trained": trained}


def _parse(assignment: str) -> tuple[str, list[Any]]:
    key, _, values = assignment.partition("=")
    return key, [_value(v) for v in values.split(",")]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _over_folds(tables: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Each figure's mean over tables of one shape."""
    return {
        name: {key: float(np.mean([table[name][key] for table in tables])) for key in row}
        for name, row in tables[0].items()
    }


def _line(name: str, runs: list[dict[str, Any]]) -> list[str]:
    figures = [np.mean([run["start"][key] for run in runs]) for key in ("mAP", "rank1")]
    figures += [np.mean([t[key] for run in runs for t in run["trained"]]) for key in ("mAP", "rank1")]
    return [name, *(f"{figure:.1f}" for figure in figures), f"{sum(run['seconds'] for run in runs):.0f}"]


class Fold:
    """The training images apart from a third of the people, and that third as query and gallery."""

    def __init__(self, train: Features, factor: float, seed: int, fold: int) -> None:
        learn, ask, answer = hold_out(train.pids, train.camids, seed, fold)
        held = train.with_features(spread(train.features, train.pids, factor))
        self.query, self.gallery = held.take(ask), held.take(answer)
        self.views = [train.view(v).take(learn) for v in range(train.views)]
        self.images = {"learn": len(learn), "query": len(ask), "gallery": len(answer)}

    def baselines(self) -> dict[str, dict[str, float]]:
        mean = reciprocal_mean(self.query.features, self.gallery.features)
        related = self.query.with_features(mean[0]), self.gallery.with_features(mean[1])
        return {"cosine": score(self.query, self.gallery), "reciprocal mean": score(*related)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("features", metavar="STORE", help="feature store with a split train")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="the base")
    parser.add_argument("--vary", nargs="+", default=[], metavar="KEY=A,B", help="settings tried one at a time")
    parser.add_argument("--spread", type=float, default=1.0, metavar="X")
    parser.add_argument("--seed", type=int, default=0, help="of the identities held out and of the training")
    parser.add_argument("--folds", type=int, default=1, choices=range(1, FOLDS + 1), help="thirds held out in turn")
    parser.add_argument("--landmark-seeds", type=int, default=1)
    parser.add_argument("-o", "--output", metavar="FILE", default="head_ablation.json")
    args = parser.parse_args()
    train = load_features(args.features)["train"]
    folds = [Fold(train, args.spread, args.seed, fold) for fold in range(args.folds)]
    baselines = _over_folds([fold.baselines() for fold in folds])
    base = {key: values[0] for key, values in map(_parse, args.set)}
    tried = [("base", base)]
    tried += [(f"{k}={v}", {**base, k: v}) for k, values in map(_parse, args.vary) for v in values]
    body = [[n, "", "", f"{s['mAP']:.1f}", f"{s['rank1']:.1f}", ""] for n, s in baselines.items()]
    document: dict[str, Any] = {
        "kind": "head_ablation", "machine": asdict(machine()), "store": args.features, "spread": args.spread,
        "seed": args.seed, "baselines": baselines, "images": [fold.images for fold in folds], "rows": [],
    }  # fmt: skip
    for name, values in tried:
        setting = Setting(values, train.features.shape[1])
        runs = [setting.run(fold, args.seed, args.landmark_seeds) for fold in folds]
        document["rows"].append({"name": name, "settings": values, "folds": runs})
        atomic_write_json(args.output, document)
        body.append(_line(name, runs))
        print("  ".join(body[-1]), flush=True)
    print(format_table(["", "start mAP", "Rank-1", "trained mAP", "Rank-1", "s"], body))


if __name__ == "__main__":
    main()
