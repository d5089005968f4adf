"""A backbone's graph as its arithmetic stands, computed node by node."""

from __future__ import annotations

import os

import numpy as np

from nformer_edge.core.errors import BackendError
from nformer_edge.exporting.session import open_session


def plain_features(graph: str | os.PathLike[str] | bytes, images: np.ndarray) -> np.ndarray:
    """What a quantized backbone's arithmetic gives, each node for itself on the CPU.

    With onnxruntime's optimizations its INT8 kernels would take over, whose 16-bit sums saturate on CPUs without VNNI.
    What the graph holds in FP16 is rounded to it, and overflows as it does there: see `half.for_cpu`.

    Args:
        graph: an ONNX file, or its bytes.
        images: float32 [B, 3, H, W].

    Returns:
        float32 [B, D].

    Raises:
        BackendError: if a number is not finite: a device would give the same, and the self-test could pass nowhere.
    """
    import onnx

    from nformer_edge.quantize.fp16 import for_cpu

    model = for_cpu(onnx.load_from_string(graph) if isinstance(graph, bytes) else onnx.load(graph))
    session = open_session(model.SerializeToString(), "backbone", optimize=False)
    features = np.asarray(session.run(["features"], {"images": images})[0])
    lost = int((~np.isfinite(features)).any(axis=1).sum())
    if lost:
        raise BackendError(
            "backbone",
            f"{lost} of {len(features)} golden images whose features overflow FP16",
            "none",
            "Build it in FP32, or in INT8 without FP16.",
        )
    return features
