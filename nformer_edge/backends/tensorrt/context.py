"""One TensorRT execution context with a stream, events and memory of its own: one thread at a time runs on it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from nformer_edge.backends.engine import Shape
from nformer_edge.backends.tensorrt.cuda import CaptureError, Device, Graph, driver_library
from nformer_edge.core.errors import BackendError


@dataclass(frozen=True)
class PlanInfo:
    """What every execution context of a plan shares."""

    part: str  # for messages
    output: str
    types: Mapping[str, np.dtype]  # of every tensor
    lines: deque[str]  # TensorRT's last warnings and errors


@dataclass(frozen=True)
class Buffer:
    """One tensor's memory, page-locked on the host and as large on the GPU."""

    pinned: np.ndarray
    memory: Any


class ExecutionContext:
    """See the module.

    `context` is TensorRT's, with its first profile. The device is current in the calling thread now and at every later
    call. With `graphs`, a shape that comes again is kept as a CUDA graph.
    """

    def __init__(self, context: Any, device: Device, plan: PlanInfo, *, graphs: bool) -> None:
        self._context, self._device, self._plan, self._graphs = context, device, plan, graphs
        self._stream = device.stream()
        self._marks = [device.event() for _ in range(4)]
        self._buffers: dict[str, Buffer] = {}
        self._host: dict[str, np.ndarray] = {}  # views of the buffers' pinned side, in the current shapes
        self._shapes: dict[str, Shape] = {}
        self._graph: Graph | None = None
        self._runs = 0  # at these shapes
        #: Of the last run: ``copy_in``, ``compute``, ``copy_out`` in ms, by the GPU's own events.
        self.device_ms: dict[str, float] = {}

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The output for `inputs`, whose shapes are inside the plan's limits; float32, an array of the caller's own.

        Raises:
            BackendError: if TensorRT or CUDA fails, memory that ran out among it.
        """
        shapes = {name: array.shape for name, array in inputs.items()}
        if shapes != self._shapes:
            self._reshape(shapes)
        stream, output = self._stream, self._plan.output
        for name, array in inputs.items():
            self._host[name][...] = array
        self._marks[0].record(stream)
        for name in inputs:
            self._device.copy_in(self._buffers[name].memory, self._host[name], stream)
        self._marks[1].record(stream)
        self._compute()
        self._marks[2].record(stream)
        self._device.copy_out(self._host[output], self._buffers[output].memory, stream)
        self._marks[3].record(stream)
        stream.synchronize()
        parts = zip(("copy_in", "compute", "copy_out"), self._marks, self._marks[1:], strict=False)
        self.device_ms = {part: float(end.time_since(start)) for part, start, end in parts}
        return self._host[output].astype(np.float32)  # a copy: the next run writes where this one wrote

    def close(self) -> None:
        """Gives everything back."""
        self._drop_graph()
        self._context = None
        self._host.clear()
        for buffer in self._buffers.values():
            buffer.memory.free()
        self._buffers.clear()
        self._marks.clear()
        self._stream = None

    def _compute(self) -> None:
        """The first run at a shape goes call by call, as TensorRT asks; the second is kept as a graph for the rest."""
        self._runs += 1
        if self._graph is None and self._runs == 2 and self._graphs:
            try:
                self._graph = Graph(driver_library(), self._stream, self._enqueue)
            except (CaptureError, BackendError, OSError):
                self._graphs = False  # what cannot be captured, and trouble of another kind shows below
        if self._graph is not None:
            self._graph.launch(self._stream)
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            self._fail("execute_async_v3 returned False")

    def _reshape(self, shapes: dict[str, Shape]) -> None:
        self._drop_graph()
        self._shapes, self._runs = {}, 0  # if anything below fails, the next run starts over
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                self._fail(f"set_input_shape({name}, {list(shape)}) returned False")
        output = self._plan.output
        result = tuple(int(n) for n in self._context.get_tensor_shape(output))
        if min(result) < 0:
            self._fail(f"shape {list(result)} for {output}")
        for name, shape in {**shapes, output: result}.items():
            self._reserve(name, shape)
        self._shapes = dict(shapes)

    def _reserve(self, name: str, shape: Shape) -> None:
        """Memory for one tensor on both sides. It only grows: pinning takes longer than a small network runs."""
        kind = self._plan.types[name]
        size = max(int(np.prod(shape, dtype=np.int64)) * kind.itemsize, 1)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.pinned.nbytes < size:
            if buffer is not None:
                del self._buffers[name], self._host[name]
                buffer.memory.free()
            pinned = self._device.pinned((size,), np.dtype(np.uint8))
            buffer = self._buffers[name] = Buffer(pinned, self._device.allocate(size))
        self._host[name] = buffer.pinned[: int(np.prod(shape)) * kind.itemsize].view(kind).reshape(shape)
        if not self._context.set_tensor_address(name, int(buffer.memory)):
            self._fail(f"set_tensor_address({name}) returned False")

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def _fail(self, got: str) -> NoReturn:
        doing, words = f"running the {self._plan.part}", tensorrt_words(self._plan.lines)
        if ran_out_of_memory(self._plan.lines):
            raise self._device.out_of_memory(doing)
        hint = "Build the engine again on this machine; see `nformer-edge doctor`."
        raise BackendError(doing, got + words, "success from TensorRT", hint)


def ran_out_of_memory(lines: deque[str]) -> bool:
    """Whether TensorRT said so: it returns nothing but None or False, and logs why."""
    return any("outofmemory" in line.lower().replace(" ", "").replace("_", "") for line in lines)


def tensorrt_words(lines: deque[str]) -> str:
    """The last that TensorRT logged, to stand behind what it returned."""
    return "".join(f" ({line.strip()})" for line in list(lines)[-2:])
