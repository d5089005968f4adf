"""One TensorRT plan, deserialized: its tensors, their limits, and the execution contexts that threads take in turn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nformer_edge.backends.engine import Shape
from nformer_edge.backends.tensorrt.context import ExecutionContext, PlanInfo, ran_out_of_memory, tensorrt_words
from nformer_edge.backends.tensorrt.cuda import Device
from nformer_edge.core.errors import ArtifactError, BackendError, UsageError


@dataclass(frozen=True)
class PlanSpec:
    """What the plan of a part must be."""

    part: str
    file: str
    inputs: tuple[str, ...]
    output: str
    flag: str  # of build-engine, that sets its limits


BACKBONE = PlanSpec("backbone", "backbone.engine", ("images",), "features", "--batch")
HEAD = PlanSpec("head", "nformer.engine", ("features", "landmarks"), "embeddings", "--gallery-size")


@dataclass(frozen=True)
class Limits:
    """Min, opt and max shape of one input."""

    min: Shape
    opt: Shape
    max: Shape

    def hold(self, shape: Shape) -> bool:
        """Whether the plan runs this shape."""
        sizes = zip(self.min, shape, self.max, strict=False)
        return len(shape) == len(self.min) and all(low <= size <= high for low, size, high in sizes)

    def __str__(self) -> str:
        sizes = (str(a) if a == b else f"{a}..{b}" for a, b in zip(self.min, self.max, strict=True))
        return f"[{', '.join(sizes)}]"


def make_logger(trt: Any) -> Any:
    """A TensorRT logger that prints nothing and keeps the last warnings and errors in ``lines``."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: deque[str] = deque(maxlen=40)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                self.lines.append(msg)

    return Logger()


class Plan:
    """See the module.

    Raises:
        ArtifactError: if TensorRT refuses the plan, or it is another network.
        BackendError: if the GPU's memory is not enough.
    """

    def __init__(
        self,
        trt: Any,  # the module of TensorRT or TensorRT-RTX
        runtime: Any,  # its `Runtime`, made with the logger
        logger: Any,  # by `make_logger`
        device: Device,  # current in the calling thread
        spec: PlanSpec,
        data: bytes,  # verified
        *,
        contexts: int = 1,  # at most so many, each with memory of its own; threads beyond that wait their turn
        graphs: bool = True,  # whether a shape that comes again is kept as a CUDA graph
    ) -> None:
        self._trt, self._device, self._graphs, self.spec = trt, device, graphs, spec
        self._lines: deque[str] = logger.lines
        self._lines.clear()
        self._engine = self._given("deserializing it", runtime.deserialize_cuda_engine(data))
        self._check_tensors()
        types = {name: self._numpy_type(name) for name in (*spec.inputs, spec.output)}
        self._info = PlanInfo(spec.part, spec.output, types, self._lines)
        self.limits = {name: self._limits(name) for name in spec.inputs}
        self._contexts = [self._new_context()]
        self._free = list(self._contexts)
        # Before TensorRT 10 two contexts may not share a profile, and a plan of ours has one.
        shares = hasattr(trt, "IPluginV3") or hasattr(trt, "ComputeCapability")  # the second is TensorRT-RTX's
        self._max_contexts = contexts if shares else 1
        self._turn = threading.Condition()

    def run(self, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, float]]:
        """The output of one run, float32, and what it took on the GPU: ``copy_in``, ``compute``, ``copy_out`` in ms.

        Raises:
            UsageError: if a shape is outside the plan's limits.
            BackendError: if TensorRT or CUDA fails, or memory runs out.
        """
        for name, array in inputs.items():
            if not self.limits[name].hold(array.shape):
                expected = f"{self.limits[name]}, the profile that the {self.spec.part} was built for"
                hint = f"Send another number of images, or build the engine again with another {self.spec.flag}."
                raise UsageError(name, f"shape {list(array.shape)}", expected, hint)
        with self._device.current():
            taken = self._take()
            try:
                with self._device.named(f"running the {self.spec.part}"):
                    return taken.run(inputs), taken.device_ms
            finally:
                with self._turn:
                    self._free.append(taken)
                    self._turn.notify_all()

    def close(self) -> None:
        """Waits for the threads that run, then gives contexts and memory back; the device is current in this thread."""
        with self._turn:
            while len(self._free) < len(self._contexts):
                self._turn.wait()
            for each in self._contexts:
                each.close()
            self._contexts.clear()
            self._free.clear()
            self._engine = None
            self._turn.notify_all()

    def _take(self) -> ExecutionContext:
        with self._turn:
            while self._engine is not None and not self._free and len(self._contexts) >= self._max_contexts:
                self._turn.wait()
            if self._engine is None:
                raise BackendError(self.spec.part, "a closed runner", "an open one", "Open the model again.")
            if not self._free:
                self._free.append(self._new_context())
                self._contexts.append(self._free[-1])
            return self._free.pop()

    def _new_context(self) -> ExecutionContext:
        made = self._given("making an execution context", self._engine.create_execution_context())
        return ExecutionContext(made, self._device, self._info, graphs=self._graphs)

    def _given(self, doing: str, found: Any) -> Any:
        """What TensorRT returned, unless that is None: then its own words."""
        if found is not None:
            return found
        where = f"{self.spec.file}: {doing}"
        if ran_out_of_memory(self._lines):
            raise self._device.out_of_memory(where)
        expected = f"a plan that {self._trt.__name__} {self._trt.__version__} runs on {self._device.gpu.name}"
        got = f"nothing from TensorRT{tensorrt_words(self._lines)}"
        raise ArtifactError(where, got, expected, "Build the engine again on this machine.")

    def _check_tensors(self) -> None:
        engine, spec = self._engine, self.spec
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = {name for name in names if engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT}
        if inputs != set(spec.inputs) or set(names) - inputs != {spec.output}:
            expected = f"{', '.join(spec.inputs)} -> {spec.output}"
            hint = "This is another network: build the engine again."
            raise ArtifactError(spec.file, f"tensors {', '.join(names)}", expected, hint)

    def _numpy_type(self, name: str) -> np.dtype:
        kinds = self._trt.DataType  # TensorRT's own `nptype` fails in 8.5 and 8.6 beside numpy 1.24 and later
        known = {kinds.FLOAT: np.float32, kinds.HALF: np.float16, kinds.INT32: np.int32}
        found = self._engine.get_tensor_dtype(name)
        if found not in known:
            where, expected = f"{self.spec.file}: {name}", "float32, float16 or int32"
            raise ArtifactError(where, str(found), expected, "Build the engine again.")
        return np.dtype(known[found])

    def _limits(self, name: str) -> Limits:
        shape = tuple(int(n) for n in self._engine.get_tensor_shape(name))
        if min(shape) >= 0:
            return Limits(shape, shape, shape)
        return Limits(*(tuple(int(n) for n in dims) for dims in self._engine.get_tensor_profile_shape(name, 0)))
