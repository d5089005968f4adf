"""What only TensorRT 8 has and needs: flags that allow a precision, and layers that are told to keep theirs.

TensorRT 10 deprecated all of it and 11 removed it; nothing else of ours takes these names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nformer_edge.backends.tensorrt.job import PlanJob

Checked = Callable[[str, Any], Any]


def network_flags(trt: Any) -> int:
    """For `Builder.create_network`: the batch stands in the shapes, as it always does from 10 on."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)


def apply(trt: Any, network: Any, config: Any, job: PlanJob, checked: Checked) -> None:
    """Allows the job's precisions and holds the layers of `job.float32` to FP32.

    INT8 is explicit here too: with Q/DQ in the graph no calibrator is needed, only the flag.
    """
    for name in job.flags:
        flag = checked(f"allowing {name}", getattr(trt.BuilderFlag, name, None))
        config.set_flag(flag)
    if not job.float32:
        return
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    kept = set(job.float32)
    for i in range(network.num_layers):
        layer = checked(f"taking layer {i}", network.get_layer(i))
        outputs = [layer.get_output(j) for j in range(layer.num_outputs)]
        floats = [j for j, tensor in enumerate(outputs) if tensor.dtype == trt.DataType.FLOAT]
        # A layer that writes integers has no say, but for a plugin: RowTopK must not be given its factors in FP16.
        if layer.name in kept and (len(floats) == len(outputs) or layer.type == trt.LayerType.PLUGIN_V2):
            layer.precision = trt.DataType.FLOAT
            for j in floats:
                layer.set_output_type(j, trt.DataType.FLOAT)
