"""The thirteen names of `import nformer_edge as ne`, and what importing them costs."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nformer_edge as ne

NAMES = {"open", "embed", "search", "evaluate", "parity", "benchmark", "export", "build", "train"}
NAMES |= {"Features", "Gallery", "Matches", "Error"}


def test_the_face_has_thirteen_names_and_each_resolves():
    assert len(ne.__all__) == 13
    assert set(ne.__all__) == NAMES
    assert set(dir(ne)) >= NAMES
    for name in NAMES:
        assert callable(getattr(ne, name)), name
        assert inspect.getdoc(getattr(ne, name)), name
    assert issubclass(ne.Error, Exception)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'nformer_edge' has no attribute 'serach'"):
        ne.serach  # noqa: B018


def test_type_checkers_see_what_callers_get():
    source = ast.parse(Path(ne.__file__).read_text())
    block = next(node for node in source.body if isinstance(node, ast.If))
    told = {
        alias.asname or alias.name: f"{node.module.removeprefix('nformer_edge.')}:{alias.name}"
        for node in block.body
        for alias in node.names
    }
    homes = {name: home if ":" in home else f"{home}:{name}" for name, home in ne._HOMES.items()}
    assert told == homes


def loaded(code: str, modules: tuple[str, ...]) -> str:
    script = f"{code}; import sys; print([m for m in {modules!r} if m in sys.modules])"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_loads_no_numpy_and_using_a_model_no_more_than_it_needs():
    frameworks = ("torch", "onnx", "onnxruntime", "tensorrt", "scipy", "matplotlib")
    assert loaded("import nformer_edge", ("numpy", "PIL", "tqdm", *frameworks)) == "[]"
    assert loaded("import nformer_edge as ne; ne.open; ne.Gallery; ne.search; ne.Error", frameworks) == "[]"


def test_a_folder_given_by_its_path_warns_of_what_the_commands_say(tiny_bundle, tmp_path):
    rng = np.random.default_rng(0)
    for person in range(1, 7):
        (tmp_path / str(person)).mkdir()
        for shot in "abc":
            pixels = rng.integers(0, 256, (16, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / str(person) / f"{shot}.png")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ne.evaluate(tiny_bundle, tmp_path, draws=0)
        ne.search(tiny_bundle, tmp_path / "1" / "a.png", tmp_path)
    said = {str(warning.message).removeprefix(f"{tmp_path}: ") for warning in told}
    assert said == {
        "a folder a person: 6 people (1, 2, 3, 4, 5 and 1 more)",
        "no splits found: half of the people train, of the others 3 images are queries",
        "the camera of 18 of 18 images is unknown: matches of the same camera count",
    }


def test_from_arrays_to_matches(tiny_bundle):
    crops = np.random.default_rng(0).integers(0, 256, (4, 80, 40, 3), dtype=np.uint8)
    with ne.open(tiny_bundle) as model:
        gallery = model.gallery(path=None)
        gallery.add(crops, ids=["ann", "ben", "eve", "joe"])
        found = gallery.search(crops[2:], top=2)
    assert [row[0] for row in found.ids] == ["eve", "joe"]
    assert isinstance(found, ne.Matches)
    assert isinstance(gallery, ne.Gallery)
    assert isinstance(gallery.features, ne.Features)
    with pytest.raises(ne.Error, match="images: got an empty list"):
        ne.embed(tiny_bundle, [])


def test_an_open_model_is_evaluated_and_benchmarked_and_stays_open(tiny_bundle, tiny_market):
    with ne.open(tiny_bundle, intra_op_threads=1) as model:
        found = ne.evaluate(model, tiny_market, rank_lists=0)
        assert found.model.name == "osnet_x0_25_64x32"
        assert ne.benchmark(model, tiny_market, single_stream=1, warmup=0).model.name == found.model.name
        assert len(model.embed(tiny_market / "query")) == 6


def test_an_engine_is_built_by_keywords(tiny_bundle, tmp_path):
    built = ne.build(tiny_bundle, tmp_path / "engine", precision="fp32", backend="onnxruntime", batch=(1, 2, 4))
    with ne.open(tmp_path / "engine") as model:
        assert model.embed(np.zeros((1, 64, 32, 3), np.uint8)).features.shape == (1, 32)
    assert built
    with pytest.raises(ne.Error, match="Did you mean 'gallery_size'"):
        ne.build(tiny_bundle, tmp_path / "other", target="cpu", gallery_sise=3)
