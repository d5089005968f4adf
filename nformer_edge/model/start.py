"""Where the head's training starts: as the mean over reciprocal neighbours, which already ranks better than nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nformer_edge.model.nformer import NFormer


@torch.no_grad()
def start_as_reciprocal_mean(
    head: NFormer,
    features: Tensor,  # [M, D]
    strength: float = 1.0,
) -> None:
    """Sets the weights so that each layer adds to each image the plain mean of its reciprocal neighbours.

    Values and projections become the identity, the perceptrons' outputs zero. Under the features rule queries and
    keys start small, so that all neighbours weigh alike. Under the affinity rule they also choose the neighbours:
    they start as a whitening of what the layer sees, so that the landmark product approximates the cosine there.

    Args:
        head: changed in place.
        features: training features, as the head will get them.
        strength: weight of the neighbours' mean against the image's own feature.
    """
    spec = head.spec
    size = spec.features // spec.heads
    x = head.scaled(features)
    for block in head.h:
        w, b = block.attn.c_attn.w, block.attn.c_attn.b
        b.zero_()
        w[:, 2 * spec.features :] = math.sqrt(strength) * torch.eye(spec.features)
        block.attn.c_proj.w.copy_(math.sqrt(strength) * torch.eye(spec.features))
        block.attn.c_proj.b.zero_()
        block.mlp.c_proj.w.zero_()
        block.mlp.c_proj.b.zero_()
        if spec.rule == "affinity":
            whitening = _whitening(x, spec.landmarks, size)
            for part in (0, spec.features):
                for head_index in range(spec.heads):
                    start = part + head_index * size
                    w[:, start : start + size] = whitening[:, :size]
        x = block.ln_1(x)
    head.bottleneck.reset_running_stats()


def _whitening(
    x: Tensor,  # [M, D]
    landmarks: int,
    size: int,
) -> Tensor:  # [D, size]
    second_moment = (x.T @ x / len(x)).double()
    values, vectors = torch.linalg.eigh(second_moment)
    order = values.argsort(descending=True)[:size]
    kept = values[order].clamp_min(1e-3 * float(values.max()))
    return (vectors[:, order] * kept**-0.25 / landmarks**0.25).to(x.dtype)
