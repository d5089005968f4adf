"""The same features scored, and re-ranked by k-reciprocal neighbors (20, 6, 0.3), by other projects' own files.

    git clone --depth 1 ... into projects/: deep-person-reid, fast-reid, open-reid, reid-strong-baseline, TransReID,
        tao_pytorch_backend, Person_reID_baseline_pytorch, person-re-ranking, boxmot; one that is not there is left out
    pip install scipy scikit-learn faiss-cpu tqdm
    python benchmarks/other_projects.py market1501.npz --projects projects --skip-slow

The first 400 queries of the store, and 3,000 gallery images drawn from seed 0. A file is run as it is, with what it
imports of its own project replaced where that needs more than this file; re-ranked distances are scored by ours.
"""

from __future__ import annotations

import argparse
import re
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from nformer_edge.core.features import Features, load_features
from nformer_edge.metrics.distance import unit_rows
from nformer_edge.metrics.ranking import evaluate
from nformer_edge.metrics.rerank import k_reciprocal_distances
from nformer_edge.report.table import format_table

QUERIES, IMAGES = 400, 3000
TAO = "nvidia_tao_pytorch/cv/re_identification/utils"

#: Distances [Q, G], then people and cameras of queries and gallery, to mAP and Rank-1.
Scorer = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[float, float]]


def load(root: Path, file: str, **imported: object) -> dict[str, Any]:
    """The names of a file, {} where it is not there; `imported`: what it takes from other files, "__" for a dot."""
    if not (root / file).is_file():
        return {}
    replaced = {name.replace("__", "."): module for name, module in imported.items()}
    before = {name: sys.modules.get(name) for name in replaced}
    sys.modules.update(replaced)  # type: ignore[arg-type]
    try:
        return runpy.run_path(str(root / file), run_name=file.removesuffix(".py").partition("/")[2].replace("/", "."))
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def ours(scoring: str) -> Scorer:
    def score(distances, q_pids, g_pids, q_cams, g_cams):
        query, gallery = (
            Features(np.eye(len(p), 2, dtype=np.float32) + 1, p, c) for p, c in ((q_pids, q_cams), (g_pids, g_cams))
        )
        found = evaluate(query, gallery, distances=distances, scoring=scoring)
        return found.mAP, found.rank(1)

    return score


def person_reid_baseline(file: Path) -> Scorer:
    """Its evaluate.py is a script, which reads a file in the current folder and ranks by dot products."""
    run = f"import numpy, runpy; numpy.in1d = numpy.isin; runpy.run_path({str(file)!r})"  # numpy 2.4 has no in1d

    def score(distances, q_pids, g_pids, q_cams, g_cams):
        from scipy.io import savemat

        stored = {"query_f": np.eye(len(distances)), "gallery_f": -distances.T.astype(np.float64)}
        stored |= {"query_label": q_pids, "query_cam": q_cams, "gallery_label": g_pids, "gallery_cam": g_cams}
        with tempfile.TemporaryDirectory() as folder:
            savemat(Path(folder, "pytorch_result.mat"), stored)
            ran = subprocess.run([sys.executable, "-c", run], cwd=folder, capture_output=True, text=True, check=True)
        rank1, mean = re.findall(r"Rank@1:(\S+).*mAP:(\S+)", ran.stdout)[0]
        return float(mean), float(rank1)

    return score


def last(evaluate_as_they_do: Callable[..., tuple[np.ndarray, float]], **options: object) -> Scorer:
    """A function that returns the curve first, and mAP after it."""

    def score(*args):
        curve, mean, *_ = evaluate_as_they_do(*args, **options)
        return np.mean(mean), curve[0]

    return score


def scorers(root: Path) -> Iterator[tuple[str, Scorer]]:
    """Each project's scoring, where its file is there."""
    yield "ours", ours("market1501")
    if found := load(root, "fast-reid/fastreid/evaluation/rank.py"):
        yield "fast-reid", last(found["evaluate_rank"], use_cython=False)
    if found := load(root, "deep-person-reid/torchreid/metrics/rank.py"):
        yield "torchreid", last(found["evaluate_rank"], use_cython=False)
    if found := load(root, "reid-strong-baseline/data/datasets/eval_reid.py"):
        yield "reid-strong-baseline", last(found["eval_func"])
    if found := load(root, "TransReID/utils/metrics.py", utils__reranking=SimpleNamespace(re_ranking=None)):
        yield "TransReID", last(found["eval_func"])
    plots = {f"{TAO}/common_utils".replace("/", "__"): SimpleNamespace(plot_evaluation_results=None)}
    if found := load(root, f"tao_pytorch_backend/{TAO}/eval_reid.py", **plots):
        tao, cfg = found["eval_func"], {"re_ranking": {"max_rank": 50}}
        yield "TAO", last(lambda d, qp, gp, *cams: tao(cfg, torch.from_numpy(d), qp, gp, *cams, qp, gp, True))
    if found := load(root, "boxmot/boxmot/reid/training/evaluator.py"):
        yield "boxmot", last(found["evaluate_ranking"])
    numbers = SimpleNamespace(to_numpy=np.asarray)
    if found := load(root, "open-reid/reid/evaluation_metrics/ranking.py", reid__utils=numbers):
        cmc, mean_ap = found["cmc"], found["mean_ap"]
        yield "open-reid", last(lambda *args: (cmc(*args), mean_ap(*args)))
        yield "ours, as open-reid", ours("open-reid")
    file = root / "Person_reID_baseline_pytorch" / "evaluate.py"
    if file.is_file():
        yield "Person_reID_baseline_pytorch", person_reid_baseline(file.resolve())
        yield "ours, as person-reid-baseline", ours("person-reid-baseline")


def outcome(scorer: Scorer, *args: np.ndarray) -> list[str]:
    """mAP and Rank-1, or what was raised."""
    try:
        return [f"{float(value):.5f}" for value in scorer(*args)]
    except Exception as error:
        return [type(error).__name__, ""]


def corners() -> Iterator[tuple[str, tuple[np.ndarray, ...]]]:
    """Inputs on which projects differ: distances, people and cameras. Image i is of person i in its own camera."""
    people, far = np.arange(1, 41), np.linspace(0.1, 0.5, 40, dtype=np.float32)[None]
    cameras, one = people + 1, np.array([1])
    yield "40 images at one distance, the first a match", (0 * far, one, people, one, cameras)
    pair = far.repeat(2, axis=0)
    yield "one query of two has no match", (pair, np.array([1, 99]), people, np.array([1, 1]), cameras)
    yield "no query has a match", (pair, np.array([98, 99]), people, np.array([1, 1]), cameras)
    yield (
        "the nearest image is junk (-1), the next a match",
        (far, np.array([2]), np.where(people == 1, -1, people), one, cameras),
    )
    yield "the query is of person -1", (far, np.array([-1]), np.where(people == 1, -1, people), one, cameras)
    yield (
        "the distance to the match is NaN",
        (np.where(people == 1, np.float32(np.nan), far), one, people, one, cameras),
    )


def three(distance: Callable[[np.ndarray, np.ndarray], np.ndarray], q: np.ndarray, g: np.ndarray) -> list[np.ndarray]:
    """Query to gallery, queries among themselves, gallery among itself."""
    return [distance(q, g), distance(q, q), distance(g, g)]


def squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T


def rankings(root: Path, query: np.ndarray, gallery: np.ndarray, slow: bool) -> Iterator[tuple[str, np.ndarray]]:
    """What each way is called, and its distances [Q, G]."""
    q, g = unit_rows(query), unit_rows(gallery)
    tensors = torch.from_numpy(q), torch.from_numpy(g)
    euclidean = three(lambda a, b: np.sqrt(np.maximum(squared(a, b), 0)), q, g)
    yield "not", 1 - q @ g.T
    yield "ours", k_reciprocal_distances(query, gallery)
    if found := load(root, "reid-strong-baseline/utils/re_ranking.py"):
        yield "reid-strong-baseline", found["re_ranking"](*tensors, 20, 6, 0.3)
    if found := load(root, "TransReID/utils/reranking.py"):
        yield "TransReID, 20/6", found["re_ranking"](*tensors, 20, 6, 0.3)
        yield "TransReID, 50/15 as its evaluator", found["re_ranking"](*tensors, 50, 15, 0.3)
    if found := load(root, "person-re-ranking/python-version/re_ranking_ranklist.py"):
        yield "person-re-ranking's ranklist, Euclidean", found["re_ranking"](*euclidean)
    if found := load(root, "fast-reid/fastreid/evaluation/rerank.py"):
        yield "fast-reid's rerank.py, Euclidean", found["re_ranking"](*euclidean)
    if found := load(root, "deep-person-reid/torchreid/utils/rerank.py"):
        yield "torchreid's file, Euclidean", found["re_ranking"](*euclidean)
        yield "torchreid, cosine", found["re_ranking"](*three(lambda a, b: 1 - a @ b.T, q, g))
        yield "torchreid, default metric", found["re_ranking"](*three(squared, query, gallery))
    if found := load(root, "Person_reID_baseline_pytorch/re_ranking.py"):
        yield "Person_reID_baseline_pytorch", found["re_ranking"](*three(lambda a, b: a @ b.T, q, g))
    if (root / "fast-reid/fastreid/utils/compute_dist.py").is_file():
        import faiss

        names = ("index_init_gpu", "search_index_pytorch", "search_raw_array_pytorch")
        index = SimpleNamespace(index_init_cpu=faiss.IndexFlatL2, **dict.fromkeys(names))
        found = load(root, "fast-reid/fastreid/utils/compute_dist.py", fastreid__utils__faiss_utils=index)
        jaccard = found["compute_jaccard_distance"](torch.cat(tensors), 20, 6, search_option=3)  # 3: on the CPU
        yield "fast-reid's evaluator", jaccard[: len(q), len(q) :] * 0.7 + (1 - q @ g.T) * 0.3
    if slow and (found := load(root, "boxmot/boxmot/reid/training/evaluator.py")):
        yield "boxmot", found["re_ranking"](q, g)
    if slow and (found := load(root, f"tao_pytorch_backend/{TAO}/re_ranking.py")):
        yield "TAO, rerank_gpu", found["rerank_gpu"](*tensors, 20, 6, 0.3).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="features of a test split: `nformer-edge embed`")
    parser.add_argument("--projects", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--skip-slow", action="store_true", help="leave out re-ranking by boxmot and TAO")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # theirs: no Cython, old ways to call torch
    split = load_features(args.store)
    chosen = np.sort(np.random.default_rng(0).permutation(len(split["gallery"]))[:IMAGES])
    query, gallery = split["query"].take(np.arange(QUERIES)), split["gallery"].take(chosen)
    labels = query.pids, gallery.pids, query.camids, gallery.camids
    q, g = query.features.astype(np.float32), gallery.features.astype(np.float32)
    cosine = 1 - unit_rows(q) @ unit_rows(g).T
    found = list(scorers(args.projects))
    rows = [[name, *outcome(scorer, cosine, *labels)] for name, scorer in found]
    rows += [["ours, torchreid's default metric", *outcome(found[0][1], squared(q, g), *labels)]]
    people = gallery.pids != 0
    without = cosine[:, people], query.pids, gallery.pids[people], query.camids, gallery.camids[people]
    rows += [["ours, without distractors", *outcome(found[0][1], *without)]]
    print(format_table(["scored by", "mAP", "Rank-1"], rows))
    rows = [[name, case, *outcome(scorer, *arrays)] for case, arrays in corners() for name, scorer in found]
    print(format_table(["scored by", "case", "mAP", "Rank-1"], rows))
    rows = []
    for name, distances in rankings(args.projects, q, g, not args.skip_slow):
        score = evaluate(query, gallery, distances=distances.astype(np.float32))
        rows.append([name, f"{score.mAP:.5f}", f"{score.rank(1):.5f}"])
        print(rows[-1], file=sys.stderr)
    print(format_table(["re-ranked by", "mAP", "Rank-1"], rows))


if __name__ == "__main__":
    main()
