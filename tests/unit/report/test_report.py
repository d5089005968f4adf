from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from nformer_edge.core.errors import ArtifactError
from nformer_edge.core.values import dumps
from nformer_edge.quantize.spec import BudgetSpec
from nformer_edge.quantize.values import BudgetSearch, HeldOutFacts, NodeCost, Point, Score
from nformer_edge.report.accuracy import Evaluation, evaluate
from nformer_edge.report.benchmark import benchmark, compare
from nformer_edge.report.diagnosis import FirstOutside, Layers, Node, NodeInput
from nformer_edge.report.html.page import write_report
from nformer_edge.report.html.svg import Dot, Line, chart, decades, line_chart, linear, ticks
from nformer_edge.report.parity import parity
from nformer_edge.report.summary import format_ends, format_summary
from nformer_edge.report.table import format_table
from nformer_edge.training.config import TrainConfig
from nformer_edge.training.history import Best, Epoch, History, Identity, Stage

VOID = {"meta", "img", "br"}


class Wellformed(HTMLParser):
    """Fails on a tag that is closed out of turn; `open` holds those never closed."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def node(name, op, error, band, inside):
    return {"node": name, "op": op, "tensor": f"{name}_output", "error": error, "band": band, "sqnr_db": 20.0,
            "cosine": 0.9, "inside": inside}  # fmt: skip


CONV = node("/conv2", "Conv", 0.5, 0.02, False)

#: What the layer-wise comparison of a broken backbone gives.
LAYERS = Layers(
    "backbone", samples=4, compared=3, tensors=3, outside=2,
    nodes=(
        Node(**node("/conv1", "Conv", 0.0, 0.001, True)), Node(**CONV),
        Node(**node("/relu", "Relu", math.inf, 0.02, False)),
    ),
    first=FirstOutside(**CONV, own_error=0.5, inputs=(NodeInput("/conv1_output", True),)),
)  # fmt: skip


def score(mAP, overlap=0.9):
    return Score(mAP, 0.9, map_drop=0.8 - mAP, map_drop_upper=0.81 - mAP, overlap_at_10=overlap)


def point(nodes, mAP, latency_ms, size_mb=12.0):
    scores = {"backbone": score(mAP, 0.9 + len(nodes) / 50)}
    return Point(nodes, scores, 4.0, latency_ms / 4, latency_ms, size_mb + len(nodes))


#: What a search for a budget gives; the worst node first.
BUDGET = BudgetSearch(
    model="resnet18_64x32",
    calibration="percentile",
    scope="backbone",
    budget=BudgetSpec(max_map_drop=0.5),
    held_out=HeldOutFacts(40, 80, 600, "0" * 64),
    fp32=point((), 0.8, 4.0, size_mb=45.0),
    nodes=tuple(
        NodeCost(f"/conv{i}", "Conv", (f"/conv{i}",), 0.1, score(0.79 + i / 1000), score(0.784 - i / 1000))
        for i in range(20)
    ),
    frontier=(point((), 0.78, 1.0), point(("/conv0",), 0.796, 1.2), point(("/conv0", "/conv1"), 0.799, 1.4)),
    chosen=1,
    measured=43,
    reused=0,
    seconds=60.0,
)


@pytest.fixture(scope="session")
def measured(dataset, grid_runner):
    int8 = grid_runner("int8", precision={"backbone": "int8", "head": "fp32"}, distort=lambda x: x[::-1])
    runners = {"ref": grid_runner("ref"), "int8": int8}

    backbone = Stage(tuple(Epoch(e, loss=5 / e) for e in (1, 2, 3)), None, 61.2)
    head = Stage((Epoch(0, held_out_map=0.5), Epoch(1, loss=2.0, held_out_map=0.6)), Best(1, 0.6), 8.0)
    judged = parity(runners["ref"], int8, dataset, draws=100, reference_label="PyTorch", engine_label="INT8")
    return [
        evaluate(runners["ref"], dataset, label="PyTorch", rerank=True, rank_lists=2),
        evaluate(int8, dataset, label="INT8", rank_lists=0),
        replace(judged, layers=(LAYERS,)),
        benchmark(runners["ref"], dataset, single_stream=3, offline=8, warmup=0, label="PyTorch"),
        compare([runners["ref"], int8], dataset, rounds=2, warmup=0, labels=["PyTorch", "INT8"]),
        History(
            dataset="made",
            checkpoint="m.safetensors",
            sha256="",
            images=24,
            identities=6,
            config=TrainConfig(),
            identity=Identity({}),
            stages={"backbone": backbone, "head": head},
            notes=(),
            versions={},
            threads=1,
            ranks=1,
            device="cpu",
            seconds=70.0,
        ),
        BUDGET,
    ]


@pytest.fixture
def results(measured):
    return copy.deepcopy(measured)


@pytest.fixture
def page(results, tmp_path):
    return write_report(results, tmp_path / "report.html").read_text()


def test_the_page_is_well_formed_and_stands_alone(page):
    parsed = Wellformed(page)
    assert parsed.open == []
    assert not [tag for tag, _ in parsed.seen if tag in ("script", "link", "iframe")]
    sources = [a[k] for _, a in parsed.seen for k in ("src", "href") if k in a]
    assert sources
    assert all(s.startswith("data:image/jpeg;base64,") for s in sources)
    assert "url(" not in page
    assert "@import" not in page


def test_every_section_is_drawn(page):
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Summary", "Images a person", "Gates", "Cosine to the reference", "Layer by layer", "Accuracy budget",
        "Rank lists", "CMC", "Latency", "Latency ratios", "Re-ranking", "Training", "Machine",
    ]  # fmt: skip


def test_the_ends_of_the_composition_table_are_one_and_all_images_a_person(results):
    lines = [line.split() for line in format_ends(results).splitlines()[2:]]
    rows = results[0].composition.rows
    assert [line[-4:] for line in lines[:4]] == [
        [row.title, part, f"{100 * scores.mAP.value:.1f}", f"{100 * scores.rank1.value:.1f}"]
        for row in (rows[0], rows[-1])
        for part, scores in (("backbone", row.backbone), ("+NFormer", row.head))
    ]
    assert len(lines) == 8
    assert format_ends([replace(results[0], composition=None)]) == ""


def test_what_stands_on_the_page_stands_in_the_json(page, results):
    for evaluation in results[:2]:
        for scored in evaluation.rankings:
            lower, upper = (f"{100 * bound:.1f}" for bound in scored.mAP_interval)
            assert f"<td>{100 * scored.mAP:.1f} <small>{lower}\N{EN DASH}{upper}</small></td>" in page
        for line in evaluation.composition.rows:
            assert f"<td>{100 * line.gain.mAP.value:+.1f}</td><td>{100 * line.gain.rank1.value:+.1f}</td>" in page
    for part in results[2].parts:
        for gate in part.gates:
            assert f"<td>{gate.measured:.6g}" in page


def test_a_budget_is_drawn_with_its_choice_its_bound_and_the_worst_nodes(page):
    drawn = page[page.index("<h2>Accuracy budget") : page.index("<h2>Rank lists")]
    assert drawn.count('<circle class="dot') == 2 * (1 + 3)  # FP32 and the frontier, against latency and against size
    assert drawn.count(">1 chosen</text>") == 2
    assert drawn.count("budget: 79.5 % mAP") == 2
    for label in ("latency, ms an image", "size, MB", "mAP, %"):
        assert f">{label}</text>" in drawn
    assert re.findall(r'bar-label">(\S+) ', drawn) == [f"/conv{i}" for i in range(15)]
    assert ">10.00 %</span>" in drawn
    assert "<td>1.00</td><td>0.40</td>" in drawn  # mAP of the worst node, in points


def test_a_budget_that_nothing_holds_is_drawn_without_a_choice(tmp_path):
    search = replace(BUDGET, chosen=None, budget=BudgetSpec(min_overlap=0.99))
    page = write_report([search], tmp_path / "report.html").read_text()
    assert "chosen" not in page.partition("</style>")[2]
    assert "budget: 79.5 % mAP" not in page
    assert Wellformed(page).open == []


def test_an_overlap_that_was_asked_for_has_a_chart_of_its_own(tmp_path):
    search = replace(BUDGET, budget=BudgetSpec(max_map_drop=0.5, min_overlap=0.92))
    page = write_report([search], tmp_path / "report.html").read_text()
    assert "overlap@10 at least 0.92; measured" in page
    assert page.count("budget: 79.5 % mAP") == page.count("budget: 92.0 % overlap@10") == 2
    assert page.count('<circle class="dot') == 4 * (1 + 3)
    assert "<h3>overlap@10 against latency</h3>" in page
    assert ">overlap@10, %</text>" in page
    assert "<td>92.0</td>" in page


def test_cosines_of_each_part_are_a_picture_with_a_line_for_each_engine(results, tmp_path):
    other = replace(results[2], engine=replace(results[2].engine, label="another"))
    page = write_report([results[2], other], tmp_path / "report.html").read_text()
    drawn = page[page.index("<h2>Cosine") : page.index("<h2>Layer")]
    assert drawn.count("<svg") == 3
    assert drawn.count("<polyline") == 6
    assert drawn.count(">cosine to the reference</text>") == 3


def test_every_landmark_seed_and_the_difference_in_points_stand_on_the_page(page, results):
    for part in results[2].parts:
        for run in part.runs:
            found = run.differences.mAP
            assert f"{100 * found.value:+.2f} <small>{100 * found.lower:+.2f} to" in page
    assert page.count("head, all images, landmark seed ") == page.count("head, 1 image a person, landmark seed ") == 3


def test_the_first_node_out_of_its_band_is_named_and_marked(page):
    assert page.count("first node out of its band: /conv2 (Conv; error 0.5, band 0.02") == 2  # in gates and in layers
    assert re.search(r'<circle class="dot c4"[^>]*/><text class="mark"[^>]*>/conv2</text>', page)


def test_cmc_curves_of_all_engines_are_in_one_picture(page):
    drawn = page[page.index("<h2>CMC") : page.index("<h2>Latency")]
    assert drawn.count("<svg") == 1
    assert drawn.count("<polyline") == 4


def test_right_and_wrong_matches_are_marked(page, results):
    flags = [g.correct for ranked in results[0].rank_lists for g in ranked.gallery]
    assert page.count('<figure class="right"') == sum(flags)
    assert page.count('<figure class="wrong"') == len(flags) - sum(flags)


def test_an_image_that_is_gone_leaves_a_placeholder(results, tmp_path):
    plain = results[0].to_json()
    for ranked in plain["rank_lists"]:
        ranked["query"] = str(tmp_path / "gone.jpg")
    page = write_report([Evaluation.from_json(plain)], tmp_path / "report.html").read_text()
    assert page.count("image not available") == len(plain["rank_lists"])


def test_text_from_results_is_escaped(results, tmp_path):
    evil = "<script>alert('x')</script>\"&"
    models = {side: replace(getattr(results[2], side), label=evil) for side in ("engine", "reference")}
    results[2] = replace(results[2], **models)
    results[6] = replace(results[6], model=evil)
    for place in (0, 3):
        results[place] = replace(results[place], model=replace(results[place].model, label=evil))
    listed = results[0].rank_lists[0]
    match = replace(listed.gallery[0], path=f"/nowhere/{evil}")
    results[0] = replace(results[0], rank_lists=(replace(listed, gallery=(match,)),))
    page = write_report(results, tmp_path / "report.html", title=evil).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert Wellformed(page).open == []


def test_each_kind_alone_makes_a_page(results, tmp_path):
    for result in results:
        page = write_report([result], tmp_path / "one.html").read_text()
        assert Wellformed(page).open == []
        assert "<section>" in page


def test_a_gate_that_is_no_number_is_shown_as_such(results, tmp_path):
    backbone, *others = results[2].parts
    broken = replace(backbone.gates[3], measured=math.nan, margin=math.nan, status="failed")
    parts = (replace(backbone, gates=(broken, *backbone.gates[4:])), *others)
    assert "not a number" in write_report([replace(results[2], parts=parts)], tmp_path / "report.html").read_text()


def test_results_are_read_from_files(results, tmp_path):
    (tmp_path / "e.json").write_text(dumps(results[0].to_json()))
    from_file = write_report([tmp_path / "e.json"], tmp_path / "a.html").read_text()
    assert from_file == write_report([results[0]], tmp_path / "b.html").read_text()


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "recipe"}', '{"kind": "evaluation", "version": 1}', None])
def test_what_is_no_result_is_refused(tmp_path, content):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ArtifactError, match=r"r\.json"):
        write_report([path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_result_of_another_version_is_refused_and_the_old_page_stays(results, tmp_path):
    out = write_report(results, tmp_path / "report.html")
    before = out.read_bytes()
    plain = results[0].to_json()
    del plain["rankings"][0]["mINP"]
    (tmp_path / "old.json").write_text(dumps(plain))
    with pytest.raises(ArtifactError, match=r"old\.json.*mINP"):
        write_report([tmp_path / "old.json"], out)
    assert out.read_bytes() == before


def test_the_summary_table_has_a_row_for_each_model_and_part(results):
    lines = format_summary(results).splitlines()
    assert lines[0].split() == ["model", "part", "mAP", "Rank-1", "ms/image", "(median,", "short)", "MB"]
    assert [line.split()[:2] for line in lines[2:]] == [
        ["PyTorch", "backbone"], ["PyTorch", "+NFormer"], ["INT8", "backbone"], ["INT8", "+NFormer"],
    ]  # fmt: skip


def test_the_gates_table_ends_with_the_verdict_and_the_blame(results):
    assert "\nINT8 against PyTorch: failed, to blame: backbone\n" in str(results[2])


def test_an_evaluation_a_benchmark_and_a_comparison_have_their_text(results):
    evaluation, benchmarked, compared = results[0], results[3], results[4]
    text = str(evaluation)
    assert f"{100 * evaluation.rankings[0].mAP:.1f}" in text
    assert "PyTorch on people: 24 queries, 54 in the gallery" in text
    text = str(benchmarked)
    assert "SingleStream (short: 3 of 64 samples)" in text
    assert text.count("mean ms a query") == len(benchmarked.runs)
    assert f"{compared.runs[1].ratio:.3f}" in str(compared)


def test_table_columns_line_up():
    assert format_table(["a", "b"], [["xyz", "1"], ["", "23"]]) == "a     b\n---  --\nxyz   1\n     23"


def test_ticks_are_round_and_cover_the_range():
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert [round(t, 9) for t in ticks(0.31, 0.52)] == [0.3, 0.35, 0.4, 0.45, 0.5, 0.55]


def test_words_beside_dots_do_not_lie_over_each_other():
    x, y = linear("x", [0, 10]), linear("y", [0, 10])
    apart = chart("t", x, y, dots=[Dot(1, 1, 0, "one"), Dot(9, 9, 0, "two")])
    assert re.findall(r"class=\"mark\"[^>]*>(\w+)<", apart) == ["one", "two"]
    crowd = chart("t", x, y, dots=[Dot(5 + i / 100, 5, 0, f"word{i}") for i in range(9)])
    assert crowd.count("<circle") == 9
    written = re.findall(r'class="mark" x="([\d.]+)" y="([\d.]+)"', crowd)
    assert len(written) == len(set(written)) == 4


def test_axes_cover_what_is_drawn_and_ticks_are_labeled():
    axis = decades("error", [0.002, 0.3])
    assert (axis.low, axis.high) == (pytest.approx(1e-3), pytest.approx(1.0))
    assert axis.place(axis.low) == 0
    assert axis.place(0) == 0  # no error: at the lower end
    assert axis.place(0.0316227766) == pytest.approx(0.5)
    assert [words for _, words in axis.ticks] == ["0.001", "0.01", "0.1", "1"]
    alone = linear("mAP, %", [57.0])
    assert alone.low < 57 < alone.high


def test_a_chart_without_points_is_nothing_and_one_point_is_drawn():
    assert line_chart([Line("a", [], 0)], "t", "x", "y") == ""
    assert "polyline" in line_chart([Line("a", [(1, 1.0)], 0)], "t", "x", "y")
