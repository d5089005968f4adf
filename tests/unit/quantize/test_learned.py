"""A backbone that learns with fake quantization is its own INT8 export, before and after it has learned."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from nformer_edge.core.preprocess import preprocess_files
from nformer_edge.core.spec import PreprocessSpec
from nformer_edge.exporting.session import open_session
from nformer_edge.exporting.trace import trace_backbone
from nformer_edge.model.checkpoint import load_checkpoint
from nformer_edge.ops.contract import OPSETS
from nformer_edge.quantize.calibrate import measure_ranges
from nformer_edge.quantize.learned import LearnedRange, QuantizedBackbone
from nformer_edge.quantize.placement_cpu import place_for_cpu
from nformer_edge.quantize.placement_tensorrt import place_for_tensorrt
from nformer_edge.quantize.values import Ranges

SIZE = (64, 32)

#: Of INT8's own error: a number between two levels may go to the other one, and what follows with it.
LIMIT = 0.4


@pytest.fixture(scope="module")
def people(tiny_market):
    files = [str(p) for p in sorted((tiny_market / "bounding_box_train").iterdir())[:4]]
    return files, preprocess_files(files, PreprocessSpec(*SIZE))


@pytest.fixture(scope="module")
def ranges(tiny_bundle, people):
    graph = (tiny_bundle / "backbone.onnx").read_bytes()
    return measure_ranges(graph, people[0], PreprocessSpec(*SIZE), ["minmax"])["minmax"]


def exported(backbone, ranges, where, images):
    """The features of the INT8 export, and of the float one."""
    model = trace_backbone(backbone, SIZE, OPSETS[0])
    if where == "cpu":
        placed = place_for_cpu(model.SerializeToString(), ranges, reduce_range=True).without()
    else:
        placed = place_for_tensorrt(model, ranges)
    onnx.checker.check_model(placed)
    graphs = (placed.SerializeToString(), model.SerializeToString())
    found = (open_session(graph, "graph", 1, optimize=False) for graph in graphs)
    return [session.run(None, {"images": images})[0] for session in found]


def rounding(module, ranges, where, images, backbone):
    """How far the module is from its export, in units of what INT8 costs."""
    with torch.no_grad():
        found = module(torch.from_numpy(images)).numpy()
    int8, plain = exported(backbone, ranges, where, images)
    return np.linalg.norm(found - int8) / np.linalg.norm(plain - int8)


@pytest.mark.parametrize("where", ["cpu", "tensorrt"])
def test_what_was_trained_is_what_is_exported(where, tiny_checkpoint, ranges, people):
    backbone, images = load_checkpoint(tiny_checkpoint).backbone, people[1]
    module = QuantizedBackbone(backbone, SIZE, OPSETS[0], ranges, where, reduce_range=True)
    assert rounding(module.eval(), ranges, where, images, backbone) <= LIMIT
    optimizer = torch.optim.Adam(module.train().parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        features = torch.nn.functional.normalize(module(torch.from_numpy(images)), dim=1)
        (features @ features.T).sum().backward()
        optimizer.step()
    learned, table = module.eval().learned()
    assert rounding(module, table, where, images, learned) <= LIMIT
    moved = [name for name in table.table if table.table[name] != ranges.table[name]]
    assert len(moved) > 50
    other = Ranges("minmax", {name: (0.7 * low, 0.7 * high) for name, (low, high) in table.table.items()})
    assert rounding(module, other, where, images, learned) > LIMIT
    assert all(table.table[name][0] == 0 for name in moved if ranges.table[name][0] >= 0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_range_learns_to_hold_what_the_loss_asks_for(symmetric):
    torch.manual_seed(0)
    values = torch.cat([torch.randn(4000), torch.tensor([40.0, -40.0])])
    learned = LearnedRange(-40.0, 40.0, symmetric=symmetric)
    optimizer = torch.optim.Adam(learned.parameters(), 0.02)
    weights = torch.cat([torch.ones(4000), torch.zeros(2)])  # nobody asks for the two outliers
    before = float((weights * (learned(values)[0] - values) ** 2).mean().detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss = (weights * (learned(values)[0] - values) ** 2).mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.2 * before
    low, high = learned.ends()
    assert 2 < high < 20
    assert -20 < low < -2


def test_an_end_at_zero_stays_there():
    learned = LearnedRange(0.5, 3.0, symmetric=False)
    learned.moved.data.fill_(0.1)
    assert learned.ends()[0] == 0.0
    found, step = learned(torch.tensor([-1.0, 0.0, 100.0]))
    assert found.tolist() == pytest.approx([0.0, 0.0, 255 * float(step.detach())])
    assert isinstance(Ranges("minmax", {"x": learned.ends()}), Ranges)
