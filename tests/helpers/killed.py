"""A training in a process of its own, to be killed: says when it begins and when it has finished."""

from __future__ import annotations

import sys

import torch

from nformer_edge.core.spec import from_dict
from nformer_edge.training.config import TrainConfig
from nformer_edge.training.train import train

if __name__ == "__main__":
    import json

    data, out, config = sys.argv[1:4]
    torch.set_num_threads(1)
    print("begin", flush=True)
    train(data, out, from_dict(TrainConfig, json.loads(config)), resume=True)
    print("end", flush=True)
