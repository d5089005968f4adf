"""Learns the gates that every new gated head starts with (`nformer_edge/model/gates.json`), on training people alone.

From stores of Market-1501's training features by two backbones: one that was trained on these very people (its
features are moved apart, as those of people it never saw lie), and one that never saw the site, with and without the
discriminant map. People are split in three: maps are fitted to others than those that the gates learn from, and the
last third is held out and gives the table. First the gauge learns the number of images a person, then all numbers
learn together from a ranking loss over sets of mixed composition (`nformer_edge.training.mixed`). The test split is
not read.

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
from nformer_edge.metrics.composition import thin
from nformer_edge.metrics.ranking import evaluate
from nformer_edge.model.gated import LISTED, RANKS, GatedHead, Map, make_head, profile
from nformer_edge.model.nformer import scaled, unit
from nformer_edge.model.start import discriminant
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.ops.operators import operators
from nformer_edge.report.table import format_table
from nformer_edge.training.head import spread
from nformer_edge.training.mixed import IMAGES, MixedSet, draw_mixed, ranking_loss

#: What the gauge learns to say of images whose person has 1, 2, 4, 8 or about 20 others.
CROWDS = (0.02, 0.15, 0.5, 0.85, 0.98)

#: Weight of a set's loss, by `IMAGES`.
WEIGHTS = (2.0, 1.5, 1.2, 1.2, 3.0)

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


def draw_strangers(domain: Domain, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Images of the other thirds that nobody asks for, some alone and some in dense groups; and their crowds."""
    total, few, run = len(domain.strangers), int(rng.integers(STRANGERS)), 40
    starts = rng.integers(total - run, size=int(rng.integers(1 + 2 * STRANGERS // run)))  # rows stand by person
    dense = np.unique((starts[:, None] + np.arange(run)).ravel()).astype(np.int64)
    alone = np.setdiff1d(rng.permutation(total)[:few], dense)
    crowds = torch.cat([torch.full((len(alone),), CROWDS[1]), torch.full((len(dense),), CROWDS[-1])])
    return domain.strangers[np.r_[alone, dense]], crowds


def draw(domain: Domain, images: int, rng: np.random.Generator) -> tuple[Tensor, MixedSet, Tensor]:
    """A set, and strangers of the other thirds behind it: unit rows less their center, and each row's crowd."""
    drawn = draw_mixed(domain.labels, domain.cameras, images, len(domain.labels), rng)
    strangers, theirs = draw_strangers(domain, rng)
    rows = torch.cat([domain.rows[drawn.rows], strangers])
    _, person, counts = np.unique(domain.labels[drawn.rows], return_inverse=True, return_counts=True)
    own = np.interp(np.log2(np.maximum(counts - 1, 1)), [0, 1, 2, 3, 4.3], CROWDS)[person]
    return unit(rows - rows.mean(dim=0)), drawn, torch.cat([torch.from_numpy(own).float(), theirs])


def landmarks_of(rows: Tensor, head: GatedHead, rng: np.random.Generator) -> Tensor:
    seed = int(rng.integers(2**31))
    return torch.from_numpy(draw_landmarks(len(rows), head.spec.layers, head.spec.landmarks, seed))


@torch.no_grad()
def start(head: GatedHead) -> None:
    """By hand: sparse gates take the score that strangers would reach by chance; dense ones stand above the mean of
    the far end of the list."""
    head.own.fill_(0.1)
    for layer, gate in enumerate(head.h):
        line = torch.zeros(len(RANKS))
        fall = np.log(32) / np.log(128 / 32)
        line[RANKS.index(32)], line[RANKS.index(128)] = 1 + fall, -fall
        gate.profile[0] = line
        gate.profile[1] = line if layer == 0 else torch.tensor([0.0] * 9 + [0.2] * 5)
        gate.offset[0], gate.offset[1] = (0.0, 0.0) if layer == 0 else (0.05, 0.25)


def learn_gauge(head: GatedHead, sources: list[Domain], steps: int, rng: np.random.Generator) -> float:
    """Returns the last cross-entropy, a mean over images."""
    sets = []
    for domain in sources:
        for images in IMAGES:
            rows, _, crowds = draw(domain, images, rng)
            lists = operators().row_top_k(rows[None], rows[None], LISTED)
            scores = profile(rows, lists[0])
            sets.append(
                (scores, lists, head.gauge.whole(scores.index_select(0, landmarks_of(rows, head, rng)[0])), crowds)
            )
    adam = torch.optim.Adam(head.gauge.parameters(), lr=0.01, weight_decay=1e-4)
    recent: list[float] = []
    for _ in range(steps):
        adam.zero_grad()
        scores, lists, whole, crowds = sets[int(rng.integers(len(sets)))]
        loss = torch.nn.functional.binary_cross_entropy(head.gauge(scores, lists, whole), crowds)
        loss.backward()
        adam.step()
        recent.append(loss.item())
    return float(np.mean(recent[-len(sets) :]))


def learn(head: GatedHead, sources: list[Domain], steps: int, sets: int, lr: float, rng: np.random.Generator) -> None:
    adam = torch.optim.Adam([p for p in head.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    order: list[tuple[int, int]] = []
    recent: list[float] = []
    since = time.perf_counter()
    for step in range(steps):
        adam.zero_grad()
        for _ in range(sets):
            order = order or [(d, n) for d in rng.permutation(len(sources)) for n in rng.permutation(len(IMAGES))]
            source, place = order.pop()
            rows, drawn, _ = draw(sources[source], IMAGES[place], rng)
            y = head.relate(rows, landmarks_of(rows, head, rng))
            strangers = len(rows) - len(drawn.rows)
            labels = torch.from_numpy(
                np.r_[sources[source].labels[drawn.rows], np.full(strangers, -1)].astype(np.int64)
            )
            cameras = torch.from_numpy(
                np.r_[sources[source].cameras[drawn.rows], np.full(strangers, -1)].astype(np.int64)
            )
            loss, _ = ranking_loss(y, labels, cameras, drawn.queries, rng)
            (WEIGHTS[place] * loss).backward()
            recent.append(loss.item())
        adam.step()
        schedule.step()
        if (step + 1) % 25 == 0:
            print(
                f"step {step + 1}: loss {np.mean(recent[-25 * sets :]):.4f}, {time.perf_counter() - since:.0f} s",
                flush=True,
            )


@torch.no_grad()
def table(head: GatedHead, sources: list[Domain], rng: np.random.Generator) -> list[list[str]]:
    lines = []
    for domain in sources:
        rng_of_split = np.random.default_rng(0)
        labels = Features(domain.rows.numpy(), domain.labels, domain.cameras)
        asks = np.zeros(len(labels), bool)
        for person in np.unique(labels.pids):
            mine = np.flatnonzero(labels.pids == person)
            asks[[rng_of_split.choice(mine[labels.camids[mine] == c]) for c in np.unique(labels.camids[mine])]] = True
        query, gallery = labels.take(asks), labels.take(~asks)
        strangers, _ = draw_strangers(domain, np.random.default_rng(5))
        for images in (1, 2, 4, 8, None):
            chosen = thin(query, gallery, images)
            q, g = query.take(chosen[0]), gallery.take(chosen[1])
            rows = torch.cat([torch.from_numpy(q.features), torch.from_numpy(g.features), strangers])
            rows = unit(rows - rows.mean(dim=0))
            landmarks = landmarks_of(rows, head, rng)
            related = head.relate(rows, landmarks)
            lists = operators().row_top_k(rows[None], rows[None], LISTED)
            scores = profile(rows, lists[0])
            whole = head.gauge.whole(scores.index_select(0, landmarks[0]))
            crowd = float(head.gauge(scores, lists, whole)[: len(q)].mean())
            pids = np.r_[g.pids, np.zeros(len(strangers), np.int64)]
            camids = np.r_[g.camids, np.full(len(strangers), -1)]
            cells = []
            for x in (rows, related):
                first, rest = x[: len(q)].numpy(), x[len(q) :].numpy()
                found = evaluate(q.with_features(first), Features(rest, pids, camids))
                cells.append(f"{100 * found.mAP:.1f}/{100 * float(found.cmc[0]):.1f}")
            lines.append([domain.name, "all" if images is None else str(images), f"{crowd:.2f}", *cells])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", help="store of a backbone that was trained on its split train")
    parser.add_argument("foreign", help="store of a backbone that never saw the site")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--sets", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    since = time.perf_counter()
    stores = [load_features(path)["train"] for path in (args.trained, args.foreign)]
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    size = stores[0].features.shape[1]
    head = make_head(HeadSpec(size, args.layers, heads=1, k=20, landmarks=1024, rule="gated"))
    assert isinstance(head, GatedHead)
    start(head)
    sources = [domain for fold in range(FOLDS) if fold != HELD_OUT for domain in domains(*stores, fold)]
    print(f"gauge: cross-entropy {learn_gauge(head, sources, 1000, rng):.3f}", flush=True)
    learn(head, sources, args.steps, args.sets, args.lr, rng)
    head.eval()
    lines = table(head, domains(*stores, HELD_OUT), rng)
    print(format_table(("features", "images", "gauge", "cosine", "head"), lines))
    numbers = {name: value.tolist() for name, value in head.gauge.state_dict().items()}
    layers = [{name: value.tolist() for name, value in gate.state_dict().items()} for gate in head.h]
    made = {"by": "benchmarks/gates.py", "layers": args.layers, "steps": args.steps, "sets": args.sets, "lr": args.lr}
    made |= {"seed": args.seed, "seconds": round(time.perf_counter() - since)}
    made |= {
        "held_out": [dict(zip(("features", "images", "gauge", "cosine", "head"), row, strict=True)) for row in lines]
    }
    learnt = {"made": made, "own": head.own.tolist(), "gauge": numbers, "layers": layers}
    atomic_write_json(args.output, learnt)


if __name__ == "__main__":
    main()
