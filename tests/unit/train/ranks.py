"""What one rank does in the tests of several ranks: trains, and leaves what it got. Started by `torchrun`, or alone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nformer_edge.core.features import FeatureSet
from nformer_edge.core.spec import from_dict
from nformer_edge.data.loaders import TrainImages
from nformer_edge.data.readers import read_dataset
from nformer_edge.model.tensorfile import TensorFile
from nformer_edge.train.backbone import train_backbone
from nformer_edge.train.compute import Compute, open_compute
from nformer_edge.train.config import TrainConfig
from nformer_edge.train.head import train_head
from nformer_edge.train.stages import start_backbone

RESULT = TensorFile("test-result", "a test's result", "Mend the test.")


def people(ids: int = 12, each: int = 6, size: int = 16) -> FeatureSet:
    rng = np.random.default_rng(0)
    pids = np.repeat(np.arange(1, ids + 1), each)
    features = rng.normal(size=(ids, size))[pids - 1] + rng.normal(size=(ids * each, size))
    return FeatureSet(features.astype(np.float32), pids, pids % 2, ("",) * len(pids))


def both_stages(data: str, config: TrainConfig, compute: Compute) -> tuple[dict[str, Any], list[Any]]:
    """Parameters and rows of both stages."""
    assert config.model.head is not None
    images = TrainImages(read_dataset(data).train, config.model.preprocess)
    backbone = start_backbone(config, None)
    rows = train_backbone(images, backbone, config.backbone, compute=compute)
    head, more = train_head([people()], config.model.head, config.head, compute=compute)
    tensors = {f"{part}.{k}": v for part, m in (("b", backbone), ("h", head)) for k, v in m.state_dict().items()}
    return tensors, [{k: v for k, v in row.items() if k != "seconds"} for row in (*rows, *more)]


if __name__ == "__main__":
    data, out, text = sys.argv[1:4]
    torch.set_num_threads(1)
    config = from_dict(TrainConfig, json.loads(text))
    rank = os.environ.get("RANK", "0")
    tensors, rows = both_stages(data, config, open_compute("cpu", config.precision))
    RESULT.write(Path(out) / f"{rank}.safetensors", tensors, {"rows": json.dumps(rows)})
