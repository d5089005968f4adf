"""A GPU, pycuda and TensorRT that the CPU plays, for tests of what a runner does with them.

Memory is an array behind an address, a stream does its work at once unless it is capturing, and a "plan" is a header
with the stage's ONNX file, which onnxruntime runs on what lies at the addresses that were set. Every failure that the
real ones have can be injected. Names and meanings are those of pycuda 2024.1 and of TensorRT 8.5 to 11.4.
"""

from __future__ import annotations

import ctypes
import enum
import json
import threading
import types

import numpy as np

MAGIC = b"FAKEPLAN"


class FakeGpu:
    """One machine: what is on it, what fails on it, what was asked of it."""

    def __init__(self) -> None:
        self.name, self.capability, self.multiprocessors = "Fake Orin", (8, 7), 16
        self.count, self.total = 1, 1 << 28
        self.memory: dict[int, np.ndarray] = {}
        self.next = 0x1000
        self.stack = threading.local()
        self.streams: dict[int, list] = {}  # of a stream that captures: what it was given
        self.graphs: dict[int, list] = {}
        self.calls: list[str] = []
        self.failing: dict[str, object] = {}  # call -> how it fails
        self.contexts = 0  # of TensorRT, alive
        self.meeting: threading.Barrier | None = None  # where runs wait for one another

    def fails(self, call: str) -> object:
        self.calls.append(call)
        return self.failing.get(call)

    @property
    def used(self) -> int:
        return sum(m.nbytes for m in self.memory.values())

    def allocate(self, size: int) -> int:
        address, self.next = self.next, self.next + size + 256
        self.memory[address] = np.zeros(size, np.uint8)
        return address

    def view(self, address: int, shape: tuple[int, ...], kind: np.dtype) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        return self.memory[address][:size].view(kind).reshape(shape)


# ---- pycuda ----


def fake_pycuda(gpu: FakeGpu) -> dict[str, types.ModuleType]:
    """Modules ``pycuda`` and ``pycuda.driver``."""
    driver = types.ModuleType("pycuda.driver")

    class Error(Exception):
        pass

    class MemoryError(Error):
        pass

    class LogicError(Error):
        pass

    def check(call: str) -> None:
        failure = gpu.fails(call)
        if failure:
            raise {"memory": MemoryError}.get(str(failure), LogicError)(f"{call} failed: {failure}")

    def current() -> None:
        if not getattr(gpu.stack, "depth", 0):
            raise LogicError("explicit_context_dependent failed: invalid device context - no currently active context?")

    class Context:
        def push(self) -> None:
            check("cuCtxPushCurrent")
            gpu.stack.depth = getattr(gpu.stack, "depth", 0) + 1

        @staticmethod
        def pop() -> None:
            current()
            gpu.stack.depth -= 1

        def detach(self) -> None:
            pass

    class Device:
        def __init__(self, ordinal: int) -> None:
            assert 0 <= ordinal < gpu.count

        @staticmethod
        def count() -> int:
            return gpu.count

        def name(self) -> str:
            return gpu.name

        def compute_capability(self) -> tuple[int, int]:
            return gpu.capability

        def get_attribute(self, attribute: object) -> int:
            assert attribute == driver.device_attribute.MULTIPROCESSOR_COUNT
            return gpu.multiprocessors

        def retain_primary_context(self) -> Context:
            check("cuDevicePrimaryCtxRetain")
            return Context()

    class Stream:
        def __init__(self, flags: int = 0) -> None:
            current()
            gpu.next += 16
            self.handle = gpu.next

        def synchronize(self) -> None:
            check("cuStreamSynchronize")
            assert self.handle not in gpu.streams, "nothing may wait for a stream that captures"

    class Event:
        def __init__(self, flags: int = 0) -> None:
            current()
            self.time = None

        def record(self, stream: Stream) -> Event:
            gpu.next += 1
            self.time = float(gpu.next)
            return self

        def time_since(self, other: Event) -> float:
            return self.time - other.time

    class DeviceAllocation:
        def __init__(self, size: int) -> None:
            self.address = gpu.allocate(size)

        def __int__(self) -> int:
            return self.address

        def free(self) -> None:
            current()
            del gpu.memory[self.address]

    def mem_alloc(size: int) -> DeviceAllocation:
        current()
        check("cuMemAlloc")
        if gpu.used + size > gpu.total:
            raise MemoryError("cuMemAlloc failed: out of memory")
        return DeviceAllocation(size)

    def pagelocked_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        current()
        check("cuMemHostAlloc")
        return np.empty(shape, dtype)

    def memcpy_htod_async(dest: DeviceAllocation, src: np.ndarray, stream: Stream) -> None:
        current()
        check("cuMemcpyHtoDAsync")
        assert src.flags.c_contiguous
        gpu.memory[int(dest)][: src.nbytes] = src.reshape(-1).view(np.uint8)

    def memcpy_dtoh_async(dest: np.ndarray, src: DeviceAllocation, stream: Stream) -> None:
        current()
        check("cuMemcpyDtoHAsync")
        dest.reshape(-1).view(np.uint8)[:] = gpu.memory[int(src)][: dest.nbytes]

    def init() -> None:
        check("cuInit")

    def mem_get_info() -> tuple[int, int]:
        current()
        return gpu.total - gpu.used, gpu.total

    driver.device_attribute = types.SimpleNamespace(MULTIPROCESSOR_COUNT=16)
    for thing in (Error, MemoryError, LogicError, Context, Device, Stream, Event, DeviceAllocation, mem_alloc,
                  pagelocked_empty, memcpy_htod_async, memcpy_dtoh_async, init, mem_get_info):  # fmt: skip
        setattr(driver, thing.__name__, thing)
    package = types.ModuleType("pycuda")
    package.driver = driver
    return {"pycuda": package, "pycuda.driver": driver}


class FakeDriverLibrary:
    """The graph calls of libcuda.so.1 as ctypes makes them."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu

    def cuStreamBeginCapture_v2(self, stream, mode) -> int:
        assert mode.value == 1
        code = int(self._gpu.fails("cuStreamBeginCapture_v2") or 0)
        if not code:
            self._gpu.streams[stream.value] = []
        return code

    def cuStreamEndCapture(self, stream, graph) -> int:
        work = self._gpu.streams.pop(stream.value)
        code = int(self._gpu.fails("cuStreamEndCapture") or 0)
        if not code:
            self._gpu.next += 16
            graph._obj.value = self._gpu.next
            self._gpu.graphs[self._gpu.next] = work
        return code

    def cuGraphInstantiateWithFlags(self, executable, graph, flags) -> int:
        assert isinstance(flags, ctypes.c_ulonglong)
        code = int(self._gpu.fails("cuGraphInstantiateWithFlags") or 0)
        if not code:
            self._gpu.next += 16
            executable._obj.value = self._gpu.next
            self._gpu.graphs[self._gpu.next] = self._gpu.graphs[graph.value]
        return code

    def cuGraphLaunch(self, executable, stream) -> int:
        code = int(self._gpu.fails("cuGraphLaunch") or 0)
        if not code:
            for work in self._gpu.graphs[executable.value]:
                work()
        return code

    def cuGraphDestroy(self, graph) -> int:
        del self._gpu.graphs[graph.value]
        return 0

    def cuGraphExecDestroy(self, executable) -> int:
        del self._gpu.graphs[executable.value]
        return 0

    def cuGetErrorName(self, code, word) -> int:
        word._obj.value = {900: b"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}.get(code.value, b"CUDA_ERROR_UNKNOWN")
        return 0


# ---- TensorRT ----


def fake_plan(
    onnx: bytes, tensors: dict[str, tuple[str, str, list[int]]], profile: dict[str, list[list[int]]]
) -> bytes:
    """A plan: ``tensors`` name -> (mode, type, shape with -1), ``profile`` name -> [min, opt, max]."""
    header = json.dumps({"tensors": tensors, "profile": profile, "bytes": len(onnx)}).encode()
    return MAGIC + len(header).to_bytes(8, "little") + header + onnx


def fake_tensorrt(gpu: FakeGpu, version: str = "10.3.0", name: str = "tensorrt") -> types.ModuleType:
    """A module with the names of TensorRT that a runner may use, those of this version."""
    trt = types.ModuleType(name)
    trt.__version__ = version
    major = int(version.partition(".")[0]) if name == "tensorrt" else 10
    registry = FakeRegistry(gpu, major)

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class DataType(enum.Enum):
        FLOAT, HALF, INT8, INT32 = "float32", "float16", "int8", "int32"

    class TensorIOMode(enum.Enum):
        NONE, INPUT, OUTPUT = range(3)

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            self.logger = logger
            self.engine_host_code_allowed = False

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> FakeEngine | None:
            failure = gpu.fails("deserialize_cuda_engine")
            if failure:
                self.logger.log(ILogger.ERROR, str(failure))
                return None
            if not registry.creators and b"RowTopK" in serialized_engine:
                self.logger.log(ILogger.ERROR, "getPluginCreator could not find plugin RowTopK version 1")
                return None
            size = int.from_bytes(serialized_engine[8:16], "little")
            header = serialized_engine[16 : 16 + size]
            onnx = serialized_engine[16 + size :]
            if serialized_engine[:8] != MAGIC or len(header) < size or len(onnx) != json.loads(header)["bytes"]:
                self.logger.log(ILogger.ERROR, "Serialization assertion plan->header.size == blobSize failed")
                return None
            return FakeEngine(gpu, trt, self.logger, json.loads(header), onnx)

    trt.ILogger, trt.DataType, trt.TensorIOMode, trt.Runtime = ILogger, DataType, TensorIOMode, Runtime
    trt.get_plugin_registry = lambda: registry
    if major >= 10:
        trt.IPluginV3 = type("IPluginV3", (), {})
    return trt


class FakeRegistry:
    """TensorRT's plugin registry; ``load_library`` is there from 8.6 on, ``get_creator`` from 10."""

    def __init__(self, gpu: FakeGpu, major: int) -> None:
        self._gpu, self.creators = gpu, set()
        find = lambda name, version, plugin_namespace="": name if name in self.creators else None  # noqa: E731
        if major >= 10:
            self.get_creator = find
        if major < 11:
            self.get_plugin_creator = find

    def load_library(self, plugin_path: str) -> object:
        if self._gpu.fails("load_library"):
            return None
        self.creators |= {"RowTopK", "ReciprocalNeighborAttention"}
        return object()


class FakeEngine:
    def __init__(self, gpu, trt, logger, header, onnx) -> None:
        self._gpu, self._trt, self._logger, self._header, self._onnx = gpu, trt, logger, header, onnx
        self._names = list(header["tensors"])
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str):
        return self._trt.TensorIOMode[self._header["tensors"][name][0]]

    def get_tensor_dtype(self, name: str):
        return self._trt.DataType(self._header["tensors"][name][1])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header["tensors"][name][2])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert profile_index == 0
        return [tuple(dims) for dims in self._header["profile"][name]]

    def create_execution_context(self):
        failure = self._gpu.fails("create_execution_context")
        if failure:
            self._logger.log(1, str(failure))
            return None
        return FakeContext(self)


class FakeContext:
    """Runs the ONNX file on what lies at the addresses."""

    def __init__(self, engine: FakeEngine) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._engine, self._gpu = engine, engine._gpu
        self._session = onnxruntime.InferenceSession(engine._onnx, options, providers=["CPUExecutionProvider"])
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._busy = threading.Lock()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._gpu.fails("set_input_shape"):
            return False
        fixed = self._engine.get_tensor_shape(name)
        least, _, most = self._engine._header["profile"].get(name, (fixed, fixed, fixed))
        if any(not low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            self._engine._logger.log(1, f"setInputShape: {name} not within the profile")
            return False
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        rows = next(iter(self._shapes.values()))[0]
        return tuple(rows if size < 0 else size for size in self._engine.get_tensor_shape(name))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self._gpu.fails("set_tensor_address"):
            return False
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._gpu.fails("execute_async_v3"):
            self._engine._logger.log(1, str(self._gpu.failing["execute_async_v3"]))
            return False
        if set(self._addresses) != set(self._engine._names):
            return False
        if self._gpu.meeting is not None:
            self._gpu.meeting.wait(timeout=20)
        if stream_handle in self._gpu.streams:
            if self._gpu.fails("capturing"):
                return False
            self._gpu.streams[stream_handle].append(self._compute)
            return True
        self._compute()
        return True

    def _compute(self) -> None:
        assert self._busy.acquire(blocking=False), "one thread at a time in a context"
        try:
            tensors = self._engine._header["tensors"]
            feeds = {
                i.name: self._gpu.view(self._addresses[i.name], self._shapes[i.name], np.dtype(tensors[i.name][1]))
                for i in self._session.get_inputs()
            }
            (output,) = self._session.get_outputs()
            (result,) = self._session.run(
                None, {n: x.astype(np.float32) if x.dtype == np.float16 else x for n, x in feeds.items()}
            )
            kind = np.dtype(tensors[output.name][1])
            self._gpu.view(self._addresses[output.name], result.shape, kind)[...] = result
        finally:
            self._busy.release()
