"""The real TensorRT-RTX, which builds and reads plans without a GPU: its refusals come out as ours, in its words."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

# In a process of its own: the library can abort.
PROGRAM = """
import tensorrt_rtx as trt
from nformer_edge.core.errors import ArtifactError
from nformer_edge.backends.tensorrt.cuda import Gpu
from nformer_edge.backends.tensorrt.plan import BACKBONE, Plan, make_logger

class Device:
    gpu = Gpu("a machine without a GPU", "8.9", 0)

logger = make_logger(trt)
builder = trt.Builder(logger)
network, config = builder.create_network(0), builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
images = network.add_input("images", trt.DataType.FLOAT, (4, 8))
output = network.add_activation(images, trt.ActivationType.RELU).get_output(0)
output.name = "features"
network.mark_output(output)
plan = bytes(builder.build_serialized_network(network, config))
runtime = trt.Runtime(logger)
for name, data in (("other", b"no plan" * 100), ("truncated", plan[:-100]), ("whole", plan)):
    try:
        Plan(trt, runtime, logger, Device(), BACKBONE, data)
        print(name, "opened")
    except ArtifactError as e:
        print(name, e)
"""


def test_plans_that_the_real_library_refuses_are_refused_in_its_words():
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("no tensorrt_rtx: pip install 'nformer-edge[tensorrt-rtx]' to try its refusals")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False)
    said = {line.partition(" ")[0]: line for line in done.stdout.splitlines()}
    assert set(said) == {"other", "truncated", "whole"}, done.stderr
    assert "backbone.engine: deserializing it: got nothing from TensorRT" in said["truncated"]
    assert "plan.header.size == blobSize failed" in said["truncated"]
    assert "Serialization assertion header.magicTag" in said["other"]
    assert "Build the engine again on this machine" in said["truncated"]
    # Where there is no driver a whole plan is not opened either, and CUDA's own words say why.
    assert "opened" in said["whole"] or "CUDA driver version is insufficient" in said["whole"]
