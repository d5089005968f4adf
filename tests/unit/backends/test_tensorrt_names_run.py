"""What the runner takes from TensorRT is in the bindings: the machine that the tests play has no other names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

LISTS = Path(__file__).parents[2] / "helpers" / "tensorrt_names"

#: Ours -> TensorRT's.
CLASSES = {"FakeEngine": "ICudaEngine", "FakeContext": "IExecutionContext", "FakeRegistry": "IPluginRegistry"}


@pytest.mark.parametrize("version", ["8.6", "10.3", "10.13", "10.16", "11.4"])
def test_the_played_tensorrt_has_no_name_that_the_real_one_lacks(fakes, version):
    listed = json.loads((LISTS / f"{version}.json").read_text())["classes"]
    gpu = fakes.FakeGpu()
    trt = fakes.fake_tensorrt(gpu, version)
    played = {real: set(_public(getattr(fakes, ours))) for ours, real in CLASSES.items()}
    played["ICudaEngine"].add("num_io_tensors")  # set for each engine
    played["IPluginRegistry"] |= {n for n in vars(trt.get_plugin_registry()) if n.startswith("get_")}
    for name in ("Runtime", "ILogger"):
        played[name] = set(_public(getattr(trt, name)))
    played["Runtime"] |= {"engine_host_code_allowed"}
    for name in ("DataType", "TensorIOMode"):
        played[name] = set(getattr(trt, name).__members__)
    for name, members in played.items():
        assert members <= set(listed[name]), name
    assert hasattr(trt, "IPluginV3") == ("IPluginV3" in listed)


def _public(thing):
    return [name for name in vars(thing) if not name.startswith("_")]
