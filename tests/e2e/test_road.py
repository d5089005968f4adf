"""From person images to an INT8 engine and its proof, command by command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nformer_edge.core.artifact import read_manifest
from nformer_edge.core.features import load_features
from nformer_edge.gallery.search import Matches

Run = Callable[..., object]


@pytest.mark.parametrize("model", ["model.safetensors", "bundle", "fp32", "int8"])
def test_every_model_file_is_evaluated_with_and_without_the_head(run: Run, road: Path, model: str) -> None:
    ran = run("evaluate", road / model, "--data", road / "data", "--json")
    assert ran.code == 0, ran.err
    results = {r["name"]: r for r in json.loads(ran.out)["rankings"]}
    alone = {"+NFormer per-query"} if model == "model.safetensors" else set()
    assert set(results) == {"backbone", "+NFormer"} | alone
    assert all(0 < r["mAP"] <= 1 and r["queries"] > 0 for r in results.values())


def test_onnx_ranks_exactly_as_pytorch_and_parity_exits_zero(run: Run, road: Path) -> None:
    ran = run("parity", road / "model.safetensors", road / "fp32", "--data", road / "data")
    assert ran.code == 0, ran.err
    assert "failed" not in ran.out


def test_parity_with_another_model_exits_one_and_names_gate_and_stage(run: Run, road: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    assert run("train", "--data", road / "data", "-o", other, "--preset", "demo", "--imgsz", 64, 32,
               "--epochs", 0, "--head-epochs", 0, "--seed", 9).code == 0  # fmt: skip
    ran = run("parity", other, road / "fp32", "--data", road / "data")
    assert ran.code == 1
    assert "to blame: backbone" in ran.err
    assert "cosine" in ran.err


def test_the_int8_engine_says_what_it_was_calibrated_on(road: Path) -> None:
    manifest = read_manifest(road / "int8", "engine")
    assert manifest["precision"] == {"backbone": "int8", "head": "fp32"}
    assert manifest["calibration"]["num"] == 48
    assert len(manifest["calibration"]["sha256"]) == 64


def test_embed_writes_a_store_that_evaluate_reads(run: Run, road: Path, tmp_path: Path) -> None:
    store = tmp_path / "features.npz"
    assert run("embed", road / "bundle", "--data", road / "data", "-o", store).code == 0
    sets = load_features(store)
    assert {"query", "gallery"} <= set(sets)
    by_store = json.loads(run("evaluate", road / "bundle", "--data", store, "--json").out)
    by_images = json.loads(run("evaluate", road / "bundle", "--data", road / "data", "--json").out)
    assert [r["mAP"] for r in by_store["rankings"]] == [r["mAP"] for r in by_images["rankings"]]


def test_search_finds_the_query_itself_first(run: Run, road: Path) -> None:
    query = sorted((road / "data" / "query").iterdir())[0]
    ran = run("search", road / "fp32", "--query", query, "--gallery", road / "data" / "query", "--top", 3, "--no-head",
              "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    (found,) = Matches.from_json(json.loads(ran.out))
    assert Path(found[0].path).name == query.name
    assert found[0].score == pytest.approx(1, abs=1e-5)
    assert len(found) == 3


def test_search_decides_by_what_training_measured_and_says_so(run: Run, road: Path, tmp_path: Path) -> None:
    trained, engine = (
        read_manifest(road / folder, kind) for folder, kind in (("bundle", "bundle"), ("int8", "engine"))
    )
    assert trained["accuracy"] == engine["accuracy"]
    assert "held out of this training" in trained["accuracy"]["measured_on"]
    query = sorted((road / "data" / "query").iterdir())[0]
    asked = ("search", road / "int8", "--query", query, "--gallery", road / "data")
    for known, said in (((), "n = "), (("--images-per-person", 1), "n = 1 images a person (given)")):
        out = run(*asked, *known).out
        assert "head used: " in out or "head not used: " in out
        assert said in out
    ran = run("export", road / "model.safetensors", "-o", tmp_path / "b", "--data", road / "data")
    assert ran.code == 0, ran.err
    assert read_manifest(tmp_path / "b", "bundle")["accuracy"]["measured_on"] == "generated"


def test_benchmark_and_report_draw_one_page_from_json(run: Run, road: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.json" for name in ("evaluation", "parity", "benchmark", "comparison")]
    assert run("evaluate", road / "int8", "--data", road / "data", "-o", files[0]).code == 0
    run("parity", road / "model.safetensors", road / "int8", "--data", road / "data", "-o", files[1])
    few = ("--data", road / "data", "--gallery", 20, "--single-stream", 4)
    assert run("benchmark", road / "int8", *few, "-o", files[2]).code == 0
    assert run("benchmark", road / "fp32", road / "int8", *few, "-o", files[3]).code == 0
    page = tmp_path / "report.html"
    assert run("report", *files, road / "model.training.json", "-o", page).code == 0
    html = page.read_text()
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "<script" not in html
    assert "short: 4 of 64 samples" in html


def test_training_again_gives_the_same_checkpoint(run: Run, road: Path, tmp_path: Path) -> None:
    assert run("train", "--data", road / "data", "-o", tmp_path / "m.safetensors", "--preset", "demo",
               "--imgsz", 64, 32, "--epochs", 2, "--head-epochs", 1).code == 0  # fmt: skip
    assert (tmp_path / "m.safetensors").read_bytes() == (road / "model.safetensors").read_bytes()


def test_stock_onnxruntime_runs_both_files_with_nothing_of_ours(road: Path, tmp_path: Path) -> None:
    for name in ("backbone.onnx", "nformer.onnx", "golden.npz"):
        shutil.copy(road / "bundle" / name, tmp_path)
    code = """
import numpy as np, onnxruntime, sys
golden = np.load("golden.npz", allow_pickle=False)
run = lambda name, **feed: onnxruntime.InferenceSession(name, providers=["CPUExecutionProvider"]).run(None, feed)[0]
features = run("backbone.onnx", images=golden["images"])
embeddings = run("nformer.onnx", features=golden["head_input"], landmarks=golden["landmarks"])
unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)  # as the FP32 tensor gate takes them
np.testing.assert_allclose(unit(features), unit(golden["features"]), rtol=1e-3, atol=1e-6)
np.testing.assert_allclose(unit(embeddings), unit(golden["embeddings"]), rtol=1e-3, atol=1e-6)
assert not [m for m in sys.modules if m.startswith("nformer_edge")]
"""
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)


def test_doctor_tells_backends_and_next_steps(run: Run) -> None:
    ran = run("doctor")
    assert ran.code == 0
    for word in ("onnxruntime", "tensorrt", "CPU"):
        assert word in ran.out


def test_no_progress_bar_reaches_a_pipe(run: Run, road: Path) -> None:
    ran = run("evaluate", road / "fp32", "--data", road / "data")
    assert ran.err == ""
    assert np.all([ord(c) >= 32 or c == "\n" for c in ran.out])
