"""A recipe says what is built, flags win over it, and a machine that is not the target's builds nothing."""

from __future__ import annotations

import importlib.util
import json

import pytest

from nformer_edge.backends.open import open_model
from nformer_edge.backends.spec import BuildSpec, EngineSpec, resolve
from nformer_edge.cli import main
from nformer_edge.core.errors import BackendError, UsageError
from nformer_edge.core.machine import nvidia_driver
from nformer_edge.targets.build import build_for_target
from nformer_edge.targets.recipe import read_target, target_names


def test_a_recipe_fills_what_was_not_asked_for():
    spec = resolve(EngineSpec(), read_target("jetson-orin-jp62").engine)
    assert (spec.backend, spec.precision, spec.workspace) == ("tensorrt", "int8", 2.0)
    assert (spec.batch, spec.gallery_size) == ((1, 8, 32), (20, 2000, 50000))


def test_every_recipe_makes_a_spec():
    for name in target_names():
        assert resolve(EngineSpec(), read_target(name).engine).backend == read_target(name).engine.backend


def test_what_was_asked_for_wins_over_the_recipe():
    spec = resolve(EngineSpec(precision="fp16", workspace=1.0), read_target("jetson-orin-jp62").engine)
    assert (spec.backend, spec.precision, spec.workspace) == ("tensorrt", "fp16", 1.0)


def test_fp32_that_was_asked_for_stays_fp32_under_a_recipe_of_int8(tiny_bundle, tmp_path, capsys):
    assert resolve(EngineSpec(precision="fp32"), read_target("cpu").engine).precision == "fp32"
    words = ["build-engine", str(tiny_bundle), "--target", "cpu", "--precision", "fp32"]
    assert main([*words, "-o", str(tmp_path / "engine"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["precision"] == {"backbone": "fp32", "head": "fp32"}


def test_a_default_that_was_asked_for_wins_over_a_recipe_too():
    recipe = EngineSpec(batch=(1, 16, 64), hardware_compat="ampere_plus", version_compat=True, calib_num=8)
    asked = EngineSpec(batch=(1, 8, 32), hardware_compat="none", version_compat=False, calib_num=256)
    assert resolve(asked, recipe) == resolve(asked) == BuildSpec()


def test_an_engine_is_built_for_the_cpu_by_its_recipe(tiny_bundle, tiny_market, tmp_path, capsys):
    words = ["build-engine", str(tiny_bundle), "--target", "cpu", "--calib-data", str(tiny_market)]
    assert main([*words, "--calib-method", "minmax", "-o", str(tmp_path / "engine"), "--json"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert (built["backend"], built["precision"]) == ("onnxruntime", {"backbone": "int8", "head": "fp32"})


def test_an_engine_is_built_for_rtx_by_its_recipe_and_refused_where_there_is_no_gpu(tiny_bundle, tmp_path, capsys):
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("no tensorrt_rtx: pip install 'nformer-edge[tensorrt-rtx]' to build by its recipe")
    if nvidia_driver():
        pytest.skip("a driver: this refusal needs a machine without one")
    folder = tmp_path / "engine"
    assert main(["build-engine", str(tiny_bundle), "--target", "rtx", "-o", str(folder), "--json"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert (built["backend"], built["precision"]) == ("tensorrt-rtx", {"backbone": "fp16", "head": "fp16"})
    with pytest.raises(BackendError, match=r"NVIDIA driver: got |pycuda: got not installed"), open_model(folder):
        pass


def test_a_machine_that_is_not_the_targets_builds_nothing(tiny_bundle, tmp_path):
    with pytest.raises(
        BackendError, match=r"target jetson-thor-jp72: \d things on this machine do not match: \(1\) l4t"
    ):
        build_for_target(tiny_bundle, tmp_path / "engine", EngineSpec(), target="jetson-thor-jp72")
    assert not (tmp_path / "engine").exists()


def test_a_misspelt_target_is_refused_on_the_command_line(tiny_bundle, capsys):
    assert main(["build-engine", str(tiny_bundle), "--target", "cpus"]) == 2
    assert "Did you mean 'cpu'?" in capsys.readouterr().err
    with pytest.raises(UsageError):
        build_for_target(tiny_bundle, None, EngineSpec(), target="cpus")
