"""Learns the gates that every new gated head starts with (`nformer_edge/model/gates.json`), on training people alone.

From stores of Market-1501's training features by two backbones: one that was trained on these very people (its
features are moved apart, as those of people it never saw lie), and one that never saw the site, with and without the
discriminant map. People are split in three: maps are fitted to others than those that the gates learn from, and the
last third is held out and gives the tables. The gates learn from a ranking loss over sets of mixed composition
(`nformer_edge.training.mixed`), half of them as a search sees them: each query alone with the gallery. They are told
how many images a person has in the set, not quite exactly. The test split is not read.

    python benchmarks/gates.py market1501.npz msmt17.npz -o nformer_edge/model/gates.json
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nformer_edge.core.artifact import atomic_write_json
from nformer_edge.core.features import Features, load_features
from nformer_edge.core.spec import GATED_IMAGES, HeadSpec
from nformer_edge.core.values import to_json
from nformer_edge.metrics.composition import thin, typical_images
from nformer_edge.metrics.ranking import evaluate
from nformer_edge.metrics.rerank import k_reciprocal_distances
from nformer_edge.model.gated import RANKS, GatedHead, Map, make_head
from nformer_edge.model.nformer import scaled, unit
from nformer_edge.model.per_query import nearby_cosines
from nformer_edge.model.start import discriminant
from nformer_edge.ops.contract import gate_shares
from nformer_edge.ops.operators import Operators, operators, using
from nformer_edge.report.table import format_table
from nformer_edge.training.head import spread
from nformer_edge.training.mixed import IMAGES, draw_mixed, ranking_loss

STEPS, RATE, SETS = 260, 0.02, 4

#: Images of a set at most, before strangers; twice as many where a person has eight or more.
SIZE = 2200

#: Features of a set are its people's first principal directions, which keep 0.95 of their length and more.
DIRECTIONS = 256

#: Queries that a set ranks.
ASKED = 64

#: A set is told what it has, or up to so many doublings more or fewer.
DOUBT = 0.5

FOLDS = 3
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


def reduced(domain: Domain) -> Domain:
    """The same in `DIRECTIONS`, which is quicker to learn from."""
    center = domain.rows.mean(dim=0)
    directions = torch.linalg.svd(unit(domain.rows - center), full_matrices=False)[2][:DIRECTIONS].T
    return replace(domain, rows=(domain.rows - center) @ directions, strangers=(domain.strangers - center) @ directions)


class MixedRows(NamedTuple):
    """A set [N, D] of unit rows less their center, queries first: people, cameras, how many ask, and of how many images
    a person."""

    rows: Tensor
    labels: Tensor
    cameras: Tensor
    queries: int
    images: float


def draw(domain: Domain, images: int, rng: np.random.Generator) -> MixedRows:
    """A set, and strangers of the other thirds behind it."""
    drawn = draw_mixed(domain.labels, domain.cameras, images, SIZE if images < 8 else 2 * SIZE, rng)
    strangers = draw_strangers(domain, rng)
    rows = torch.cat([domain.rows[drawn.rows], strangers])
    nobody = np.full(len(strangers), -1)
    labels, cameras = (np.r_[x[drawn.rows], nobody].astype(np.int64) for x in (domain.labels, domain.cameras))
    there = labels[drawn.queries :][np.isin(labels[drawn.queries :], labels[: drawn.queries])]
    typical = typical_images(np.unique(there, return_counts=True)[1])
    rows, labels_, cameras_ = unit(rows - rows.mean(dim=0)), torch.from_numpy(labels), torch.from_numpy(cameras)
    return MixedRows(rows, labels_, cameras_, drawn.queries, typical)


class Asked(nn.Module):
    """A head as it is asked here: of features that are mapped and centered."""

    def __init__(self, size: int, layers: int) -> None:
        super().__init__()
        head = make_head(HeadSpec(size, layers, heads=1, k=20, landmarks=1024, rule="gated"))
        assert isinstance(head, GatedHead)
        self.head = head
        self.head.map = nn.Identity()  # type: ignore[assignment]

    def forward(
        self,
        rows: Tensor,  # [N, D]
        queries: int,
        ask: Tensor,  # int64 [Q], of the queries
        alone: bool,
    ) -> Tensor:  # [Q, N - queries], cosines
        """Each query alone with the gallery, all of whose images are landmarks, or all in one set."""
        gallery = rows[queries:]
        if alone:
            return nearby_cosines(self.head, rows[ask], gallery, torch.arange(len(gallery), dtype=torch.int32)[None])
        related = unit(self.head.relate(rows))
        return related[ask] @ related[queries:].T

    def told(self, images: float, *asked: Any) -> Tensor:
        """The same by gates for so many images a person; gradients reach `head.told`."""
        shares = torch.from_numpy(gate_shares(images)).float()
        numbers = {f"head.{name}": torch.tensordot(shares, x, 1) for name, x in self.head.told.named_parameters()}
        found: Tensor = torch.func.functional_call(self, numbers, asked)
        return found


@torch.no_grad()
def start(head: GatedHead) -> None:
    """By hand: for few images above the score that strangers would reach by chance, for many above that of the fourth
    neighbor, then of the eighth."""
    few, many = torch.linspace(1, 0, len(GATED_IMAGES)), torch.linspace(0, 1, len(GATED_IMAGES))
    fall = np.log(32) / np.log(128 / 32)
    head.told.own.copy_(0.1 * few)
    for layer, gate in enumerate(head.told.h):
        gate.profile[:, RANKS.index(32)] = (1 + fall) * few
        gate.profile[:, RANKS.index(128)] = -fall * few
        gate.profile[:, RANKS.index(4 if layer == 0 else 8)] = many
        gate.offset.copy_(0.05 * layer * few + 0.05 * many)


def learn(asked: Asked, sources: list[Domain], steps: int, rng: np.random.Generator) -> None:
    told = asked.head.told.requires_grad_(True)
    adam = torch.optim.Adam(told.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    order: list[tuple[int, int]] = []
    recent: list[float] = []
    since = time.perf_counter()
    for step in range(steps):
        adam.zero_grad()
        for _ in range(SETS):
            order = order or [(d, n) for d in rng.permutation(len(sources)) for n in rng.permutation(len(IMAGES))]
            source, place = order.pop()
            drawn = draw(sources[source], IMAGES[place], rng)
            ask = torch.from_numpy(rng.permutation(drawn.queries)[:ASKED])
            images = max(1.0, drawn.images * 2 ** rng.uniform(-DOUBT, DOUBT))
            scores = asked.told(images, drawn.rows, drawn.queries, ask, bool(rng.random() < 0.5))
            gallery = drawn.labels[drawn.queries :], drawn.cameras[drawn.queries :]
            loss, _ = ranking_loss(scores, (drawn.labels[ask], drawn.cameras[ask]), gallery, rng)
            loss.backward()
            recent.append(loss.item())
        adam.step()
        schedule.step()
        if (step + 1) % 20 == 0:
            print(f"step {step + 1}: loss {np.mean(recent[-20 * SETS :]):.4f}, {time.perf_counter() - since:.0f} s")
    told.requires_grad_(False)


#: Images a person that each composition is told; the last is what the package assumes untold.
TOLD = (1, 2, 4, 8, 16)


class Row(NamedTuple):
    """mAP and Rank-1 in percent on one composition of the held-out third, of each way by its name."""

    features: str
    images: str
    scores: dict[str, tuple[float, float]]


@torch.no_grad()
def table(asked: Asked, sources: list[Domain]) -> list[Row]:
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
            rows, count = unit(rows - rows.mean(dim=0)), len(q)
            pids = np.r_[g.pids, np.zeros(len(strangers), np.int64)]
            seen = Features(rows[count:].numpy(), pids, np.r_[g.camids, np.full(len(strangers), -1)])
            mapped = q.with_features(rows[:count].numpy())
            ways = {"cosine": rows[:count] @ rows[count:].T}
            ways["k-reciprocal"] = 1 - torch.from_numpy(k_reciprocal_distances(mapped.features, seen.features))
            with using(Remembered(operators())):
                for told in TOLD:
                    for name, alone in (("joint", False), ("per query", True)):
                        ways[f"told {told}, {name}"] = asked.told(told, rows, count, torch.arange(count), alone)
            found = {name: evaluate(q, seen, distances=1 - scores.numpy()) for name, scores in ways.items()}
            scores = {name: (100 * x.mAP, 100 * float(x.cmc[0])) for name, x in found.items()}
            lines.append(Row(domain.name, "all" if images is None else str(images), scores))
    return lines


class Remembered:
    """Operators that choose the lists of the same rows once."""

    def __init__(self, inner: Operators) -> None:
        self._inner, self._lists = inner, dict[tuple[object, ...], Tensor]()
        self.reciprocal_neighbor_attention = inner.reciprocal_neighbor_attention
        self.pair_scores = inner.pair_scores

    def row_top_k(self, a: Tensor, b: Tensor, k: int) -> Tensor:
        key = a.shape, b.shape, a.sum().item(), b.sum().item(), k
        if key not in self._lists:
            self._lists[key] = self._inner.row_top_k(a, b, k)
        return self._lists[key]


def gains(lines: list[Row]) -> str:
    """Of each way and composition what it gains over the cosine in mAP and Rank-1, mean over the kinds of features, and
    the lowest gain in mAP of one kind."""
    sizes = list(dict.fromkeys(line.images for line in lines))
    body = []
    for way in lines[0].scores:
        found = [[np.subtract(x.scores[way], x.scores["cosine"]) for x in lines if x.images == size] for size in sizes]
        if way != "cosine":
            body.append(
                [way, *("{:.1f}/{:.1f}, {:.1f}".format(*np.mean(x, axis=0), np.min(x, axis=0)[0]) for x in found)]
            )
    return format_table(("gain over cosine", *sizes), body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", help="store of a backbone that was trained on its split train")
    parser.add_argument("foreign", help="store of a backbone that never saw the site")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=2, choices=range(FOLDS), help="third that gives the tables")
    args = parser.parse_args()
    since = time.perf_counter()
    stores = [load_features(path)["train"] for path in (args.trained, args.foreign)]
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    asked = Asked(stores[0].features.shape[1], args.layers)
    start(asked.head)
    sources = [domain for fold in range(FOLDS) if fold != args.held_out for domain in domains(*stores, fold)]
    learn(asked, [reduced(domain) for domain in sources], args.steps, rng)
    seconds = round(time.perf_counter() - since)
    asked.eval()
    lines = table(asked, domains(*stores, args.held_out))
    ways = ("cosine", "k-reciprocal", *(f"told {told}, {name}" for told in TOLD for name in ("joint", "per query")))
    print(format_table(("features", "images", *ways), [
        [line.features, line.images, *("{:.1f}/{:.1f}".format(*line.scores[way]) for way in ways)] for line in lines
    ]))  # fmt: skip
    print(gains(lines))
    told = asked.head.told
    layers = [{name: value.tolist() for name, value in gate.state_dict().items()} for gate in told.h]
    made = {"by": "benchmarks/gates.py", "layers": args.layers, "steps": args.steps, "seed": args.seed}
    made |= {"third": args.held_out, "seconds": seconds}
    atomic_write_json(args.output, to_json({"made": made, "own": told.own.tolist(), "layers": layers}))


if __name__ == "__main__":
    main()
