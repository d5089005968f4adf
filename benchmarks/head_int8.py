"""The head on a CPU with its linear layers in INT8, against itself in FP32: time of the whole head, in turn.

    python benchmarks/head_int8.py --images 19281 --rounds 3
    python benchmarks/head_int8.py --store market1501.npz --weights market1501

Every linear layer quantizes what it reads anew in each run (dynamic INT8, weights with one scale a channel); the two
operators run in our kernels, in float. The paper's head with the affinity rule: with random weights and generated
features, people of 20 images; or made from a store of Market-1501 by a recipe of `market_head.py`, on its test split,
with the mAP of both. Cosines are between the two outputs.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from market_head import RECIPES

from nformer_edge.core.errors import Error
from nformer_edge.core.features import Features, load_features
from nformer_edge.core.spec import HeadSpec
from nformer_edge.exporting.session import open_session
from nformer_edge.exporting.trace import trace_head
from nformer_edge.metrics.agreement import cosines
from nformer_edge.metrics.ranking import evaluate
from nformer_edge.model.gated import Head
from nformer_edge.model.nformer import NFormer
from nformer_edge.ops.bodies import DEFAULT_OPSET
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.quantize.dynamic import quantize_linear_layers
from nformer_edge.training.head import train_head


def market(path: str, weights: str) -> tuple[Head, tuple[Features, Features]]:
    """The head of `market_head.py`'s recipe, and the test split."""
    sets, (spec, config) = load_features(path), RECIPES[weights]["affinity"]
    head, _ = train_head([sets["train"].view(v) for v in range(config.views)], spec, config)
    return head, (sets["query"], sets["gallery"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="feature store with splits train, query and gallery")
    parser.add_argument("--weights", choices=tuple(RECIPES), help="whose features they are")
    parser.add_argument("--images", type=int, default=19281, help="generated ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    rng, pair = np.random.default_rng(0), None
    if args.store:
        head, pair = market(args.store, args.weights)
        features = np.concatenate([s.features for s in pair])
    else:
        head = NFormer(HeadSpec(features=512, rule="affinity"))
        people = np.repeat(rng.normal(size=(args.images // 20 + 1, 512)), 20, axis=0)[: args.images]
        features = (people + 0.7 * rng.normal(size=people.shape)).astype(np.float32)
    spec = head.spec
    feed = {"features": features, "landmarks": draw_landmarks(len(features), spec.layers, spec.landmarks, 0)}
    plain = trace_head(head, DEFAULT_OPSET)
    graphs = {"FP32": plain, "INT8": quantize_linear_layers(plain)}
    sessions = {
        name: open_session(graph.SerializeToString(), name, args.threads, native=True) for name, graph in graphs.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    outputs = {name: session.run(None, feed)[0] for name, session in sessions.items()}
    for _ in range(args.rounds):
        for name, session in sessions.items():
            begun = time.perf_counter()
            session.run(None, feed)
            taken[name].append(time.perf_counter() - begun)
    ratios = [a / b for a, b in zip(taken["FP32"], taken["INT8"], strict=True)]
    same = cosines(outputs["FP32"], outputs["INT8"])
    for name, seconds in taken.items():
        print(f"{name}: {statistics.median(seconds):.2f} s")
    print(f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f}), {len(features)} images")
    print(f"cosine: lowest {same.min():.4f}, mean {same.mean():.4f}")
    for name, rows in outputs.items() if pair else ():
        query, gallery = (s.with_features(x) for s, x in zip(pair, np.split(rows, [len(pair[0])]), strict=True))
        found = evaluate(query, gallery)
        print(f"{name}: mAP {100 * found.mAP:.2f}, Rank-1 {100 * float(found.cmc[0]):.2f}")


if __name__ == "__main__":
    try:
        main()
    except Error as e:
        raise SystemExit(str(e)) from e
