"""Where the head's training starts: as the mean over reciprocal neighbors, which already ranks better than nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nformer_edge.model.nformer import Block, NFormer

#: Directions with hardly any variance are raised to this share of the largest before they are divided by.
FLOOR = 1e-3


@torch.no_grad()
def start_as_reciprocal_mean(
    head: NFormer,
    features: Tensor,  # [M, D]
    strength: float = 1.0,
    sharpness: float | None = None,
) -> None:
    """Sets the weights so that each layer adds to each image the plain mean of its reciprocal neighbors.

    Values and projections become the identity, the perceptrons' outputs zero. Under the features rule queries and
    keys start small, so that all neighbors weigh alike. Under the affinity rule they also choose the neighbors:
    they start as a whitening of what the layer sees, so that the landmark product approximates the cosine there.
    With `sharpness` they start so under both rules, and near neighbors weigh more (`relate_by_cosine`).

    Args:
        head: changed in place.
        features: training features, as the head will get them.
        strength: weight of the neighbors' mean against the image's own feature.
        sharpness: softmax logit of a neighbor with cosine 1 against one with cosine 0.
    """
    spec = head.spec
    size = spec.features // spec.heads
    x = head.scaled(features)
    for block in head.h:
        if sharpness is not None:
            relate_by_cosine(block, x, strength, sharpness, spec.landmarks)
            block.mlp.c_proj.w.zero_()
            block.mlp.c_proj.b.zero_()
            x = block.ln_1(x)
            continue
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


def relate_by_cosine(
    block: Block,
    x: Tensor,  # [M, D], what the layer sees
    strength: float,
    sharpness: float,
    landmarks: int,
) -> None:
    """Makes the attention add `strength` times the neighbors' mean, weighted by ``softmax(sharpness * cosine)``.

    The cosine is that of rows less their mean, as the landmark product approximates it: its error falls with the
    square root of the number of landmarks.
    """
    attn, features = block.attn, x.shape[1]
    size = features // attn.heads
    attn.c_attn.b.zero_()
    attn.c_attn.w[:, 2 * features :] = torch.eye(features)
    attn.c_proj.w.copy_(strength * torch.eye(features))
    attn.c_proj.b.zero_()
    mean = x.mean(dim=0)
    centerd = (x - mean).double()
    variance, directions = torch.linalg.eigh(centerd.T @ centerd / len(x))
    variance, directions = variance.flip(0)[:size], directions.flip(1)[:, :size]
    # landmarks stand between queries and keys with their own covariance: each side undoes half of it
    half = directions * variance.clamp_min(FLOOR * float(variance.max())) ** -0.25
    logit = max(sharpness, FLOOR) * math.sqrt(size) / float(variance.sum())
    half = (half * (logit / landmarks) ** 0.25).to(x.dtype)
    for start in range(0, 2 * features, size):
        attn.c_attn.w[:, start : start + size] = half
        attn.c_attn.b[start : start + size] = -(mean @ half)
