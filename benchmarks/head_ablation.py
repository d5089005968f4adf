"""Which head, started and trained how: an ablation on training identities that are held out.

Takes a feature store with a split ``train`` (`nformer-edge embed ... --splits train --views 4`). A third of the
identities is held out; of each of them one image a camera asks and the others answer, all related together. The test
split is never opened. Each `--vary` changes one setting of the base that `--set` describes.

    python benchmarks/head_ablation.py msmt17.npz --set rule=affinity layers=3 --vary k=10,30 start=random -o out.json

Settings are the fields of HeadSpec and HeadConfig, and ``views`` (of the store's views, how many are learnt from).
Features of images that their own weights were trained on are saturated: `--spread 2.25` moves each image so much
farther from its person's mean in what is held out; the setting ``spread`` does so in what is learnt from.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import fields, replace
from typing import Any

import numpy as np

from nformer_edge.core.artifact import atomic_write_json
from nformer_edge.core.features import FeatureSet, load_features
from nformer_edge.core.spec import HeadSpec, from_dict
from nformer_edge.evaluate.ranking import evaluate
from nformer_edge.evaluate.rerank import reciprocal_mean
from nformer_edge.measure.machine import machine
from nformer_edge.measure.table import format_table
from nformer_edge.train.config import HeadConfig
from nformer_edge.train.head import relate, spread, train_head

HELD_OUT = 1 / 3


def hold_out(pids: np.ndarray, camids: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows to learn from, and of the identities held out the rows that ask and those that answer."""
    people = np.unique(pids)
    rng = np.random.default_rng(seed)
    rng.shuffle(people)
    held = np.isin(pids, people[: round(len(people) * HELD_OUT)])
    rows = np.random.default_rng([seed, 7]).permutation(np.flatnonzero(held))
    _, first = np.unique(np.stack([pids[rows], camids[rows]]), axis=1, return_index=True)
    query = np.sort(rows[first])
    return np.flatnonzero(~held), query, np.setdiff1d(np.flatnonzero(held), query)


def score(query: FeatureSet, gallery: FeatureSet) -> dict[str, float]:
    result = evaluate(query, gallery)
    return {"mAP": 100 * result.mAP, "rank1": 100 * float(result.cmc[0])}


class Setting:
    """One line of the table: a head's spec, its training, and how many views it learns from."""

    def __init__(self, values: dict[str, Any], features: int) -> None:
        self.values = values
        own = {f.name for f in fields(HeadSpec)}
        head = {k: v for k, v in values.items() if k in own}
        self.spec = from_dict(HeadSpec, {**head, "features": features})
        self.config = from_dict(HeadConfig, {k: v for k, v in values.items() if k not in own})

    def run(
        self, views: list[FeatureSet], query: FeatureSet, gallery: FeatureSet, seed: int, landmark_seeds: int
    ) -> dict[str, Any]:
        """Trains, and scores the start and the last epoch's head."""
        chosen = views[: self.config.views]
        untrained, _ = train_head(chosen, self.spec, replace(self.config, epochs=0), seed=seed)
        row: dict[str, Any] = {"settings": self.values, "start": score(*relate(untrained, query, gallery))}
        begin = time.perf_counter()
        head, epochs = untrained, []
        if self.config.epochs:
            head, epochs = train_head(chosen, self.spec, self.config, seed=seed)
        row |= {"seconds": time.perf_counter() - begin, "epochs": epochs}
        row["trained"] = [score(*relate(head, query, gallery, seed=s)) for s in range(landmark_seeds)]
        return row


def _parse(assignment: str) -> tuple[str, list[Any]]:
    key, _, values = assignment.partition("=")
    return key, [_value(v) for v in values.split(",")]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _line(name: str, row: dict[str, Any]) -> list[str]:
    trained = {k: np.mean([t[k] for t in row["trained"]]) for k in ("mAP", "rank1")}
    start = row["start"]
    return [
        name, f"{start['mAP']:.1f}", f"{start['rank1']:.1f}", f"{trained['mAP']:.1f}", f"{trained['rank1']:.1f}",
        f"{row['seconds']:.0f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("features", metavar="STORE", help="feature store with a split train")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="the base")
    parser.add_argument("--vary", nargs="+", default=[], metavar="KEY=A,B", help="settings tried one at a time")
    parser.add_argument("--spread", type=float, default=1.0, metavar="X")
    parser.add_argument("--seed", type=int, default=0, help="of the identities held out and of the training")
    parser.add_argument("--landmark-seeds", type=int, default=1)
    parser.add_argument("-o", "--output", metavar="FILE", default="head_ablation.json")
    args = parser.parse_args()
    train = load_features(args.features)["train"]
    learn, ask, answer = hold_out(train.pids, train.camids, args.seed)
    held = train.with_features(spread(train.features, train.pids, args.spread))
    query, gallery = held.take(ask), held.take(answer)
    views = [train.view(v).take(learn) for v in range(train.views)]
    mean = reciprocal_mean(query.features, gallery.features)
    baselines = {
        "cosine": score(query, gallery),
        "reciprocal mean": score(query.with_features(mean[0]), gallery.with_features(mean[1])),
    }
    base = {key: values[0] for key, values in map(_parse, args.set)}
    tried = [("base", base)]
    tried += [(f"{k}={v}", {**base, k: v}) for k, values in map(_parse, args.vary) for v in values]
    body = [[n, "", "", f"{s['mAP']:.1f}", f"{s['rank1']:.1f}", ""] for n, s in baselines.items()]
    document: dict[str, Any] = {
        "kind": "head_ablation", "machine": machine(), "store": args.features, "spread": args.spread,
        "seed": args.seed, "baselines": baselines, "rows": [],
        "images": {"learn": len(learn), "query": len(ask), "gallery": len(answer)},
    }  # fmt: skip
    for name, values in tried:
        row = Setting(values, train.features.shape[1]).run(views, query, gallery, args.seed, args.landmark_seeds)
        document["rows"].append({"name": name, **row})
        atomic_write_json(args.output, document)
        body.append(_line(name, row))
        print("  ".join(body[-1]), flush=True)
    print(format_table(["", "start mAP", "Rank-1", "trained mAP", "Rank-1", "s"], body))


if __name__ == "__main__":
    main()
