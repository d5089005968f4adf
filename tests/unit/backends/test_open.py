"""What a machine does the first time that it opens a model, and what it remembers of that."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest

from nformer_edge.backends import open as opening
from nformer_edge.backends.build import build_engine
from nformer_edge.backends.onnxruntime import build as onnxruntime_build
from nformer_edge.backends.onnxruntime.run import OnnxRuntimeRunner
from nformer_edge.backends.open import open_model, self_test
from nformer_edge.backends.spec import EngineSpec
from nformer_edge.core import machine
from nformer_edge.core.artifact import read_manifest, write_manifest
from nformer_edge.core.errors import ArtifactError, BackendError
from nformer_edge.exporting.bundle import GOLDEN, open_bundle

HASWELL, ICE_LAKE = ("sse4_2", "avx", "avx2", "fma"), ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_vnni")


@pytest.fixture
def cpu(monkeypatch):
    """Plants the instruction sets of another CPU, wherever they are looked at."""

    def plant(*flags: str) -> None:
        for module in (machine, opening, onnxruntime_build):
            monkeypatch.setattr(module, "instruction_sets", lambda: flags)

    return plant


@pytest.fixture
def tested(monkeypatch, tmp_path):
    """The names of models whose self-test has run, of a user whose cache folder is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names: list[str] = []
    monkeypatch.setattr(opening, "self_test", lambda runner: (names.append(runner.name), self_test(runner))[1])
    return names


def rewritten(folder: Path, out: Path, **arrays: np.ndarray) -> Path:
    """A consistent copy with other golden arrays; None leaves one out."""
    shutil.copytree(folder, out)
    held = {**open_bundle(folder).golden, **arrays} if arrays else {}
    buffer = io.BytesIO()
    np.savez(buffer, **{name: array for name, array in held.items() if array is not None})
    (out / GOLDEN).write_bytes(buffer.getvalue())
    write_manifest(out, "bundle", read_manifest(folder, "bundle"))
    return out


def test_golden_vectors_run_once_a_machine(tiny_bundle, tested, tmp_path):
    for _ in range(2):
        with open_model(tiny_bundle):
            pass
    assert len(tested) == 1
    shutil.rmtree(tmp_path / "cache")
    open_model(tiny_bundle)
    assert len(tested) == 2, "what is not remembered is tested again"


def test_another_cpu_another_runtime_and_another_model_are_tested_again(
    tiny_bundle, tested, cpu, monkeypatch, tmp_path
):
    open_model(tiny_bundle)
    cpu("asimd")
    open_model(tiny_bundle)
    assert len(tested) == 2
    monkeypatch.setattr(opening, "versions", lambda *_: {"onnxruntime": "99"})
    open_model(tiny_bundle)
    assert len(tested) == 3
    nearly = open_bundle(tiny_bundle).golden["features"] * np.float32(1.00001)
    open_model(rewritten(tiny_bundle, tmp_path / "copy", features=nearly))
    assert len(tested) == 4


def test_without_a_folder_to_write_to_the_test_runs_every_time(tiny_bundle, tested, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        with open_model(tiny_bundle) as runner:
            assert runner.has_head
    assert len(tested) == 2


def test_a_model_that_gives_something_else_is_refused_and_not_remembered(tiny_bundle, tested, tmp_path):
    features = open_bundle(tiny_bundle).golden["features"]
    changed = rewritten(tiny_bundle, tmp_path / "changed", features=features * np.float32(1.001))
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"backbone: got a golden vector 0.001 of its norm off .*most 0.0001"):
            open_model(changed)
    assert len(tested) == 2


def test_fp16_in_the_name_of_fp32_shows(tiny_bundle, tested, monkeypatch):
    real = OnnxRuntimeRunner.embed
    monkeypatch.setattr(OnnxRuntimeRunner, "embed", lambda *args: real(*args).astype(np.float16).astype(np.float32))
    with pytest.raises(ArtifactError, match="backbone: got a golden vector"):
        open_model(tiny_bundle)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({}, "got the arrays none"),
        ({"features": None}, "got the arrays embeddings, head_input, images, landmarks"),
        ({"landmarks": None}, "got the arrays embeddings, features, head_input, images"),
        ({"more": np.zeros(1)}, "more"),
        ({"features": np.zeros((1, 3), np.float32)}, "features: got shapes"),
        ({"images": np.zeros((1, 3, 8, 8), np.float32)}, "images: got float32"),
    ],
)
def test_golden_vectors_that_are_none_are_refused(arrays, match, tiny_bundle, tested, tmp_path):
    with pytest.raises(Exception, match=match) as caught:
        open_model(rewritten(tiny_bundle, tmp_path / "other", **arrays))
    assert caught.value.exit_code == 2


def test_a_model_without_golden_vectors_is_refused(tiny_bundle, tested, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(tiny_bundle, folder)
    (folder / GOLDEN).unlink()
    write_manifest(folder, "bundle", read_manifest(tiny_bundle, "bundle"))
    with pytest.raises(ArtifactError, match=r"golden\.npz: got no such file in the manifest"):
        open_model(folder)


def test_golden_images_are_bright_where_int8_saturates(tiny_bundle):
    images = open_bundle(tiny_bundle).golden["images"]
    assert images.shape == (4, 3, 64, 32)
    spec = open_bundle(tiny_bundle).spec.preprocess
    white = (1 - np.asarray(spec.mean)) / np.asarray(spec.std)
    np.testing.assert_allclose(images[1].mean(axis=(1, 2)), white, rtol=1e-5)
    assert all(len(np.unique(image[0])) == 2 for image in images[2:])


@pytest.fixture(scope="module")
def int8_engines(tiny_bundle, tiny_market, tmp_path_factory):
    """By whether weights have 7 bits."""
    folder, engines = tmp_path_factory.mktemp("int8"), {}
    calib = tiny_market
    with pytest.MonkeyPatch.context() as patch:
        for module in (machine, onnxruntime_build):
            patch.setattr(module, "instruction_sets", lambda: ICE_LAKE)
        for reduce_range in (None, True):
            spec = EngineSpec(backend="onnxruntime", precision="int8", calib_num=4, reduce_range=reduce_range)
            engines[bool(reduce_range)] = build_engine(tiny_bundle, folder / str(reduce_range), spec, calib_data=calib)
            calib = engines[False] / "calibration.json"
    return engines


def test_8_bit_weights_are_refused_on_a_cpu_without_vnni_with_the_command(int8_engines, cpu):
    cpu(*HASWELL)
    match = (
        r"got INT8 with 8-bit weights, built on .*avx512_vnni, expected 7-bit weights on this CPU, which has none of "
        r"avx512_vnni, .*build-engine BUNDLE --backend onnxruntime --int8 .*--reduce-range"
    )
    with pytest.raises(BackendError, match=match):
        open_model(int8_engines[False])


def test_7_bit_weights_open_on_every_cpu(int8_engines, cpu):
    for flags in (HASWELL, ("asimd",)):
        cpu(*flags)
        with open_model(int8_engines[True]) as runner:
            assert runner.precision["backbone"] == "int8"


def test_8_bit_weights_are_not_built_where_they_saturate(int8_engines, tiny_bundle, cpu, tmp_path):
    cpu(*HASWELL)
    spec = EngineSpec(backend="onnxruntime", precision="int8", reduce_range=False)
    with pytest.raises(BackendError, match="reduce_range: got False, expected a CPU with one of avx512_vnni"):
        build_engine(tiny_bundle, tmp_path / "e", spec, calib_data=int8_engines[False] / "calibration.json")
