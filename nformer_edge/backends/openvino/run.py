"""Engines for OpenVINO, run by OpenVINO. Needs neither torch nor onnx.

OpenVINO is 1.3 to 1.4 times as fast with batches of a fixed size as with any size (OSNet x0.25, one image and eight, on
two cores), and an NPU takes nothing else. So the backbone is compiled for one image and for the engine's usual batch.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from nformer_edge.backends.engine import Engine
from nformer_edge.backends.onnxruntime.run import OnnxRuntimeRunner
from nformer_edge.backends.openvino.build import EXTRA, INLINED, NAME
from nformer_edge.backends.runner import check_images
from nformer_edge.backends.spec import BuildSpec
from nformer_edge.core.errors import ArtifactError, BackendError
from nformer_edge.core.machine import user_cache
from nformer_edge.core.spec import Precision
from nformer_edge.exporting.bundle import BACKBONE, HEAD, ModelFiles

#: A precision in OpenVINO's words: what a device must be capable of, and what is not INT8 computes in.
_CAPABILITY = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16", "int8": "INT8"}
_HINT = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "bf16"}

#: Of a layer as compiled, its type in our words; and the layers that are counted.
_TYPES = {"i8": "int8", "u8": "int8", "bf16": "bf16", "f16": "fp16", "f32": "fp32"}
_MULTIPLICATIONS = ("Convolution", "FullyConnected", "MatMul")


class OpenVinoRunner(OnnxRuntimeRunner):
    """See `backends.runner.Runner`. Any number of images is cut into batches of the two sizes; the last may be padded.

    Args:
        model: an engine built for OpenVINO.
        device: such as ``cpu``, ``gpu`` or ``npu``; the one that it was built for if None.
        intra_op_threads: of the CPU; OpenVINO's choice (one a core) if None.
        native: run the head's operators in the native kernels, where the engine's head is run by onnxruntime.

    Raises:
        ArtifactError: if a graph is missing, or is not what its spec says.
        BackendError: if OpenVINO is not installed, has no such device, or would saturate on this CPU.
    """

    backend = NAME

    def __init__(
        self, model: ModelFiles, *, device: str | None = None, intra_op_threads: int | None = None, native: bool = True
    ) -> None:
        built = model.manifest if isinstance(model, Engine) else None
        spec = built.spec if isinstance(model, Engine) and built is not None else BuildSpec()
        self._inlined = built is not None and built.operators == INLINED
        super().__init__(model, intra_op_threads=intra_op_threads, native=native and not self._inlined)
        self._precision = spec.built_precision
        self._device = on_device(device or spec.device, self._precision)
        self._batch = spec.batch[1]
        self._lock = threading.Lock()  # a request serves one caller at a time

    def __enter__(self) -> OpenVinoRunner:
        for size in {1, self._batch}:
            self._request(BACKBONE, size)
        if self.has_head and self._inlined:
            self._request(HEAD)
        elif self.has_head:
            self._session(HEAD)
        return self

    def embed(self, images: np.ndarray) -> np.ndarray:
        """See `Runner.embed`."""
        images = check_images(images, self.spec)
        features = np.empty((len(images), self.spec.backbone.features), np.float32)
        at = 0
        while at < len(images):
            size = self._batch if 2 * (len(images) - at) > self._batch else 1
            block = images[at : at + size]
            padding = np.zeros((size - len(block), *images.shape[1:]), images.dtype)
            batch = np.concatenate([block, padding]) if len(padding) else block
            features[at : at + len(block)] = self._infer(BACKBONE, "features", size, images=batch)[: len(block)]
            at += len(block)
        return features

    def _run(self, name: str, output: str, **feed: np.ndarray) -> np.ndarray:
        if self._inlined:
            return self._infer(name, output, None, **feed)
        return super()._run(name, output, **feed)

    def _infer(self, name: str, output: str, size: int | None, **feed: np.ndarray) -> np.ndarray:
        request = self._request(name, size)
        try:
            with self._lock:
                return np.array(request.infer(feed, share_inputs=True)[output])
        except RuntimeError as e:
            hint = "Use fewer images at once if memory is short; otherwise build the engine again here."
            raise BackendError(f"{self.name}: {name}", f"an error of {NAME} ({_reason(e)})", "a result", hint) from e

    def _request(self, name: str, size: int | None = None) -> Any:
        key = f"{name} {size}"
        if key not in self._sessions:
            device, precision = (self._device, self._precision) if name == BACKBONE else ("CPU", "fp32")
            graph = self._model.files.files[name]
            compiled = compile_graph(graph, name, device, precision, size, self._threads, self._check_inputs)
            self._sessions[key] = compiled.create_infer_request()
        return self._sessions[key]


def on_device(asked: str | None, precision: Precision) -> str:
    """OpenVINO's name of a device; the CPU if None.

    Raises:
        BackendError: if it is not there, or does not compute in `precision`.
    """
    core, device = _openvino().Core(), (asked or "cpu").upper()
    known = core.available_devices
    if device not in known:
        expected = f"one that {NAME} finds here: {', '.join(name.lower() for name in known) or 'none'}"
        raise BackendError("device", asked, expected, "Install the device's driver, or leave --device out.")
    able = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    if _CAPABILITY[precision] not in able:
        expected = " | ".join(p for p, word in _CAPABILITY.items() if word in able)
        raise BackendError("precision", f"{precision} on this {device}", expected, "Choose one of these.")
    return device


def compile_graph(
    graph: bytes,
    name: str,
    device: str,
    precision: Precision,
    size: int | None = None,
    threads: int | None = None,
    check: Any = None,
    profile: bool = False,
) -> Any:
    """An ``openvino.CompiledModel``.

    Args:
        graph: an ONNX file.
        name: what errors call it.
        device: OpenVINO's name.
        precision: of what the graph leaves open.
        size: the batch, if it is fixed.
        threads: of the CPU.
        check: is called with the file's name and its inputs' shapes.
        profile: each layer is timed.

    Raises:
        BackendError: if OpenVINO is not installed.
        ArtifactError: if it refuses the graph.
    """
    openvino = _openvino()
    core = openvino.Core()
    able = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": _HINT[precision]}
    if "FP32" not in able:
        config["INFERENCE_PRECISION_HINT"] = "f16"  # an NPU
    elif precision == "int8" and "BF16" not in able:
        config["INFERENCE_PRECISION_HINT"] = "f32"
    if profile:
        config["PERF_COUNT"] = True
    if device == "CPU":
        config |= {"NUM_STREAMS": 1} | ({} if threads is None else {"INFERENCE_NUM_THREADS": threads})
    with suppress(OSError):  # what is compiled is kept, as far as it can be
        cache = user_cache() / NAME
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        config["CACHE_DIR"] = str(cache)
    try:
        model = core.read_model(graph)
        shapes = {i.get_any_name(): [_length(d) for d in i.partial_shape] for i in model.inputs}
        if check is not None:
            check(name, {key: tuple(shape) for key, shape in shapes.items()})
        if size is not None:
            model.reshape({key: [size, *shape[1:]] for key, shape in shapes.items()})
        return core.compile_model(model, device, config)
    except RuntimeError as e:
        got = f"a graph that {NAME} {openvino.__version__.partition('-')[0]} refuses ({_reason(e)})"
        raise ArtifactError(name, got, "one it compiles", f"Update {NAME}, or use another backend.") from e


def layer_ms(graph: bytes, precision: Precision, images: np.ndarray, runs: int) -> dict[str, float]:
    """Of each layer as compiled for the CPU its name and the shortest time in so many runs, in milliseconds."""
    compiled = compile_graph(graph, BACKBONE, "CPU", precision, len(images), profile=True)
    request = compiled.create_infer_request()
    found: dict[str, float] = {}
    for _ in range(runs):
        request.infer({"images": images})
        for layer in request.get_profiling_info():
            ms = 1000 * layer.real_time.total_seconds()
            found[layer.node_name] = min(ms, found.get(layer.node_name, ms))
    return found


def multiplications(compiled: Any) -> Counter[str]:
    """Convolutions and matrix multiplications of a compiled model, by the type that they compute in."""
    facts: list[Mapping[str, Any]] = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    kinds = [(f["layerType"].astype(str), f["runtimePrecision"].astype(str)) for f in facts if "layerType" in f]
    return Counter(_TYPES.get(kind, kind) for layer, kind in kinds if layer in _MULTIPLICATIONS)


def _length(dimension: Any) -> int | str:
    return int(dimension.get_length()) if dimension.is_static else "any"


def _reason(error: Exception) -> str:
    """The last line of OpenVINO's words: the ones before name its source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as e:
        hint = f"pip install 'nformer-edge[{EXTRA}]'"
        raise BackendError(NAME, f"no package {e.name}", "it, to run its engines", hint) from e
    return openvino
