"""Learns the gates that every new gated head starts with (`nformer_edge/model/gates.json`), on training people alone.

From stores of Market-1501's training features by two backbones: one that was trained on these very people (its
features are moved apart, as those of people it never saw lie), and one that never saw the site, with and without the
discriminant map. People are split in three: maps are fitted to others than those that the gates learn from, and the
last third is held out and gives the table. The gates learn from a ranking loss over sets of mixed composition
(`nformer_edge.training.mixed`), half of them as a search sees them: each query alone with the gallery. First from
people with an image or two, where neighbors do most harm, then from all. The test split is not read.

    python benchmarks/gates.py market1501.npz msmt17.npz -o nformer_edge/model/gates.json
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nformer_edge.core.artifact import atomic_write_json
from nformer_edge.core.features import Features, load_features
from nformer_edge.core.spec import HeadSpec
from nformer_edge.core.values import to_json
from nformer_edge.metrics.composition import thin
from nformer_edge.metrics.ranking import evaluate
from nformer_edge.model.gated import RANKS, GatedHead, Map, make_head
from nformer_edge.model.nformer import scaled, unit
from nformer_edge.model.per_query import nearby_cosines
from nformer_edge.model.start import discriminant
from nformer_edge.report.table import format_table
from nformer_edge.training.head import spread
from nformer_edge.training.mixed import IMAGES, QUERIES, draw_mixed, ranking_loss

#: Steps, rate, and weight of a set's loss by `IMAGES`.
Phase = tuple[int, float, tuple[float, ...]]
PHASES: tuple[Phase, ...] = ((200, 0.02, (1.0, 0.7, 0.15, 0.0, 0.0)), (160, 0.006, (1.0, 0.8, 0.6, 0.6, 0.8)))

FOLDS, HELD_OUT = 3, 2
STRANGERS = 1000
POWER = 0.7


@dataclass(frozen=True)
class Domain:
    """One third of the people as one backbone sees them; `rows` [M, D] are mapped and not centered."""

    name: str
    rows: Tensor
    labels: np.ndarray
    cameras: np.ndarray
    strangers: Tensor


def domains(trained: Features, foreign: Features, fold: int) -> list[Domain]:
    people = np.random.default_rng(7).permutation(np.unique(trained.pids))
    inside = np.isin(trained.pids, people[fold::FOLDS])
    found = []
    for name, source, factor, is_mapped in (
        ("trained on these people, moved 2.25 times as far apart", trained, 2.25, False),
        ("the same, 1.6 times", trained, 1.6, False),
        ("another site's backbone", foreign, 1.0, False),
        ("another site's backbone, mapped", foreign, 1.0, True),
    ):
        x = torch.from_numpy(source.features if factor == 1 else spread(source.features, source.pids, factor))
        x = scaled(x, HeadSpec(x.shape[1]))
        if is_mapped:
            fitted = Map(x.shape[1])
            fitted.power.fill_(POWER)
            others = torch.from_numpy(~inside)
            labels, cameras = (torch.from_numpy(a.astype(np.int64)) for a in (source.pids, source.camids))
            w, mean = discriminant(fitted.raised(x[others]), labels[others], cameras[others])
            x = (fitted.raised(x) - mean) @ w
        found.append(Domain(name, x[inside], source.pids[inside], source.camids[inside], x[~inside]))
    return found


def draw_strangers(domain: Domain, rng: np.random.Generator) -> Tensor:
    """Images of the other thirds that nobody asks for, some alone and some in dense groups."""
    total, few, run = len(domain.strangers), int(rng.integers(STRANGERS)), 40
    starts = rng.integers(total - run, size=int(rng.integers(1 + 2 * STRANGERS // run)))  # rows stand by person
    dense = np.unique((starts[:, None] + np.arange(run)).ravel()).astype(np.int64)
    return domain.strangers[np.r_[np.setdiff1d(rng.permutation(total)[:few], dense), dense]]


def draw(domain: Domain, images: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, int]:
    """A set, and strangers of the other thirds behind it: unit rows less their center, people, cameras, and how many
    of the first rows are queries."""
    drawn = draw_mixed(domain.labels, domain.cameras, images, len(domain.labels), rng)
    strangers = draw_strangers(domain, rng)
    rows = torch.cat([domain.rows[drawn.rows], strangers])
    nobody = np.full(len(strangers), -1)
    labels, cameras = (np.r_[x[drawn.rows], nobody].astype(np.int64) for x in (domain.labels, domain.cameras))
    return unit(rows - rows.mean(dim=0)), torch.from_numpy(labels), torch.from_numpy(cameras), drawn.queries


def asked(head: GatedHead, queries: Tensor, gallery: Tensor) -> Tensor:  # [Q, D], [G, D] -> [Q, G]
    """Cosines of each query alone with the gallery, all of whose images are landmarks."""
    return nearby_cosines(head, queries, gallery, torch.arange(len(gallery), dtype=torch.int32)[None])


@torch.no_grad()
def start(head: GatedHead) -> None:
    """By hand: the score that strangers would reach by chance."""
    head.own.fill_(0.1)
    for layer, gate in enumerate(head.h):
        fall = np.log(32) / np.log(128 / 32)
        gate.profile[RANKS.index(32)], gate.profile[RANKS.index(128)] = 1 + fall, -fall
        gate.offset.fill_(0.05 * layer)
        gate.log_slope.requires_grad_(False)


def learn(head: GatedHead, sources: list[Domain], phase: Phase, sets: int, rng: np.random.Generator) -> None:
    steps, rate, weights = phase
    adam = torch.optim.Adam([p for p in head.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    order: list[tuple[int, int]] = []
    recent: list[float] = []
    since = time.perf_counter()
    for step in range(steps):
        adam.zero_grad()
        for _ in range(sets):
            order = order or [(d, n) for d in rng.permutation(len(sources)) for n in rng.permutation(len(IMAGES))]
            source, place = order.pop()
            if not weights[place]:
                continue
            rows, labels, cameras, queries = draw(sources[source], IMAGES[place], rng)
            ask = torch.from_numpy(rng.permutation(queries)[:QUERIES])
            if rng.random() < 0.5:
                scores = asked(head, rows[ask], rows[queries:])
            else:
                related = unit(head.relate(rows))
                scores = related[ask] @ related[queries:].T
            gallery = labels[queries:], cameras[queries:]
            loss, _ = ranking_loss(scores, (labels[ask], cameras[ask]), gallery, rng)
            (weights[place] * loss).backward()
            recent.append(loss.item())
        adam.step()
        schedule.step()
        if (step + 1) % 40 == 0:
            print(f"step {step + 1}: loss {np.mean(recent[-40 * sets :]):.4f}, {time.perf_counter() - since:.0f} s")


@torch.no_grad()
def table(head: GatedHead, sources: list[Domain]) -> list[list[str]]:
    lines = []
    for domain in sources:
        rng_of_split = np.random.default_rng(0)
        labels = Features(domain.rows.numpy(), domain.labels, domain.cameras)
        asks = np.zeros(len(labels), bool)
        for person in np.unique(labels.pids):
            mine = np.flatnonzero(labels.pids == person)
            asks[[rng_of_split.choice(mine[labels.camids[mine] == c]) for c in np.unique(labels.camids[mine])]] = True
        query, gallery = labels.take(asks), labels.take(~asks)
        strangers = draw_strangers(domain, np.random.default_rng(5))
        for images in (1, 2, 4, 8, None, "whole"):
            q, g = query, gallery
            if images != "whole":
                chosen = thin(query, gallery, images)
                q, g = query.take(chosen[0]), gallery.take(chosen[1])
            rows = torch.cat([torch.from_numpy(q.features), torch.from_numpy(g.features), strangers])
            rows = unit(rows - rows.mean(dim=0))
            related, count = unit(head.relate(rows)), len(q)
            pids = np.r_[g.pids, np.zeros(len(strangers), np.int64)]
            seen = Features(rows[count:].numpy(), pids, np.r_[g.camids, np.full(len(strangers), -1)])
            alone = asked(head, rows[:count], rows[count:])
            cells = []
            for scores in (rows[:count] @ rows[count:].T, related[:count] @ related[count:].T, alone):
                found = evaluate(q, seen, distances=1 - scores.numpy())
                cells.append(f"{100 * found.mAP:.1f}/{100 * float(found.cmc[0]):.1f}")
            lines.append([domain.name, "all" if images is None else str(images), *cells])
    return lines


HEADERS = ("features", "images", "cosine", "head, joint", "head, per query")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", help="store of a backbone that was trained on its split train")
    parser.add_argument("foreign", help="store of a backbone that never saw the site")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sets", type=int, default=4, help="sets a step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=2, choices=range(FOLDS), help="third that gives the table")
    args = parser.parse_args()
    since = time.perf_counter()
    stores = [load_features(path)["train"] for path in (args.trained, args.foreign)]
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    size = stores[0].features.shape[1]
    head = make_head(HeadSpec(size, args.layers, heads=1, k=20, landmarks=1024, rule="gated"))
    assert isinstance(head, GatedHead)
    start(head)
    sources = [domain for fold in range(FOLDS) if fold != args.held_out for domain in domains(*stores, fold)]
    for phase in PHASES:
        learn(head, sources, phase, args.sets, rng)
    head.eval()
    lines = table(head, domains(*stores, args.held_out))
    print(format_table(HEADERS, lines))
    layers = [{name: value.tolist() for name, value in gate.state_dict().items()} for gate in head.h]
    made = {"by": "benchmarks/gates.py", "layers": args.layers, "phases": PHASES, "sets": args.sets, "seed": args.seed}
    made |= {"third": args.held_out, "seconds": round(time.perf_counter() - since)}
    made |= {"held_out": [dict(zip(HEADERS, row, strict=True)) for row in lines]}
    atomic_write_json(args.output, to_json({"made": made, "own": head.own.item(), "layers": layers}))


if __name__ == "__main__":
    main()
