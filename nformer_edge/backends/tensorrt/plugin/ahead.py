"""Our two operators through TensorRT's Python plugin interface, ahead of time: the plan carries their kernels.

From TensorRT 10.9 on (`tensorrt.plugin`). Python describes each node while a plan is built; the finished plan holds PTX
and expressions for its launch, and needs neither this package nor a plugin library to run.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nformer_edge.backends.engine import KernelInPlan
from nformer_edge.backends.tensorrt.cuda import driver_cuda, gpu_facts
from nformer_edge.backends.tensorrt.plugin.kernels import (
    MAX_NEIGHBORS,
    OLDEST_NVRTC,
    Kernel,
    PtxCompiler,
    compile_attention,
    compile_row_top_k,
    find_compilers,
    float_halves,
    newest_for,
)
from nformer_edge.backends.tensorrt.plugin.library import ATTENTIONS
from nformer_edge.core.errors import BackendError
from nformer_edge.ops.contract import DOMAIN, ROW_TOP_K

#: The first TensorRT that puts a kernel into the plan. 10.8 calls back into Python, earlier ones know no such plugin.
SINCE = (10, 9)

#: What gives a machine without a CUDA toolkit a compiler.
_COMPILER = (
    "pip install 'nvidia-cuda-nvrtc-cu12==12.4.*' 'nvidia-cuda-runtime-cu12==12.4.*', 12.4 being what nvidia-smi calls "
    "CUDA Version or less (13: nvidia-cuda-nvrtc, nvidia-cuda-runtime, without -cu12)."
)

_Types = Mapping[str, object]

#: TensorRT reserves the empty namespace, which the library's plugins have.
NAMESPACE = DOMAIN


def missing_ahead_of_time(tensorrt: tuple[int, ...]) -> str:
    """Why kernels cannot go into a plan here, in words that follow "got"; "" where they can."""
    if not tensorrt:
        return "no TensorRT that puts kernels into plans"
    if tensorrt < SINCE:
        return f"TensorRT {_text(tensorrt[:2])}, which cannot put kernels into plans"
    return "" if find_compilers() else "no CUDA compiler for kernels in the plan"


def hint_for_operators(tensorrt: tuple[int, ...], below: tuple[int, ...] = ()) -> str:
    """How to get the head's operators: the library, or what makes `missing_ahead_of_time` empty.

    Args:
        tensorrt: the version that is here; empty for none.
        below: the version that a target's stays under, where it has one.
    """
    if () < below <= SINCE:
        return "nformer-edge build-plugin, with the headers of this TensorRT"
    other = _COMPILER if tensorrt >= SINCE else "pip install 'tensorrt>=10.9'"
    return f"nformer-edge build-plugin; without TensorRT's headers: {other}"


def network_flag(trt: Any) -> int:
    """The bit of ``create_network`` by which kernels go into the plan."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)


def register_operators(trt: Any, hardware_compat: str, errors: list[str]) -> AheadOfTime:
    """Registers both operators, compiled by the newest compiler that this machine's driver can follow.

    `trt` is the module, of `SINCE` or later; `errors` gets what goes wrong in a callback.

    Raises:
        BackendError: if there is no compiler, no driver, or no such interface.
    """
    driver, found = driver_cuda(), find_compilers()
    compiler = newest_for(found, driver)
    if compiler is None:
        got, versions = ", ".join(map(str, found)) or "none", f"{_text(driver)}, the driver's, or down to"
        raise BackendError("CUDA compiler", got, f"NVRTC or nvcc of CUDA {versions} {_text(OLDEST_NVRTC)}", _COMPILER)
    capability = "8.0" if hardware_compat == "ampere_plus" else gpu_facts(0).compute_capability
    return AheadOfTime(trt, compiler, int(capability.replace(".", "")), errors)


class AheadOfTime:
    """Registers both operators in this process, and keeps what was compiled: see `register_operators`.

    TensorRT prints an error out of a callback and then refuses the network; `errors` has it for whoever asks why.
    `architecture` is the lowest compute capability that the plan is to run on, times ten.

    Raises:
        BackendError: if this TensorRT has no such interface, or has these operators from elsewhere.
    """

    def __init__(self, trt: Any, compiler: PtxCompiler, architecture: int, errors: list[str]) -> None:
        self._trt, self._compiler, self._architecture = trt, compiler, architecture
        self._errors = errors
        self.kernels: dict[str, Kernel] = {}  # by the sha256 of their PTX
        try:
            self._plugin = importlib.import_module(f"{trt.__name__}.plugin")
        except ImportError as e:
            hint = "nformer-edge build-plugin builds a library instead."
            raise BackendError(f"{trt.__name__}.plugin", f"none ({e})", "TensorRT's Python plugins", hint) from e
        try:
            self._register_row_top_k()
            self._register_attention()
        except ValueError as e:
            hint = "Start a new process: they are registered once in each."
            got = f"a refusal of TensorRT {trt.__version__}: {e}"
            raise BackendError(NAMESPACE, got, "two new operators", hint) from e

    def facts(self) -> tuple[KernelInPlan, ...]:
        """Of each kernel that was handed over for the plan."""
        cuda = _text(self._compiler.version)
        return tuple(KernelInPlan(k.operator, k.entry, sha256, cuda, k.target) for sha256, k in self.kernels.items())

    def _register_row_top_k(self) -> None:
        trtp, tensor = self._plugin, self._plugin.TensorDesc

        def shape(a: Any, b: Any, k: Any) -> Any:
            # While types are asked for there are no shapes: a constant would then reach for another node's builder.
            last = trtp.ShapeExpr() if a.shape_expr[0].is_fake else int(k[0])
            return trtp.from_shape_expr((a.shape_expr[0], a.shape_expr[1], last), self._trt.int32)

        def types(a: Any, b: Any, k: Any, outputs: Any) -> Any:
            return [trtp.AutoTuneCombination(f"{kind}, {kind}, INT32") for kind in ("FP32", "FP16")]

        def kernel(a: Any, b: Any, k: Any, outputs: Any, tactic: int) -> Any:
            heads, rows, factors = a.shape_expr
            compiled = compile_row_top_k(self._compiler, self._architecture, self._kind(a), _known(factors), int(k[0]))
            return self._launch(compiled, heads, rows, [heads, rows, b.shape_expr[1], factors, int(k[0])])

        self._register(ROW_TOP_K, shape, types, kernel, {"a": tensor, "b": tensor, "k": _array_of(np.int32)})

    def _register_attention(self) -> None:
        """Each number of inputs is a plugin of its own: TensorRT reads the inputs from a function's parameters."""
        floats, tensor = _array_of(np.float32), self._plugin.TensorDesc
        plain = dict.fromkeys(("a", "b", "v", "neighbors"), tensor)

        def types(inputs: int) -> Any:
            more = ("INT32", "FP32", "INT32")[: inputs - 3]
            return [
                self._plugin.AutoTuneCombination(", ".join((kind, kind, kind, *more, kind)))
                for kind in ("FP32", "FP16")
            ]

        def launch(a: Any, v: Any, neighbors: Any, scale: Any, t: Any = None, factor: Any = None) -> Any:
            (heads, rows, factors), (lists, _, count) = a.shape_expr, neighbors.shape_expr
            inputs, longest = 4 + (t is not None) + (factor is not None), _known(count) or MAX_NEIGHBORS
            compiled = compile_attention(self._compiler, self._architecture, self._kind(a), longest, inputs)
            numbers = [heads, rows, factors, v.shape_expr[2], lists, count, *float_halves(scale[0])]
            numbers += [] if t is None else [t.shape_expr[0]]
            numbers += [] if factor is None else float_halves(factor[0])
            return self._launch(compiled, heads, rows, numbers)

        self._register(
            ATTENTIONS[4],
            lambda a, b, v, neighbors, scale: v.like(),
            lambda a, b, v, neighbors, scale, outputs: types(4),
            lambda a, b, v, neighbors, scale, outputs, tactic: launch(a, v, neighbors, scale),
            {**plain, "scale": floats},
        )
        self._register(
            ATTENTIONS[5],
            lambda a, b, v, neighbors, t, scale: v.like(),
            lambda a, b, v, neighbors, t, scale, outputs: types(5),
            lambda a, b, v, neighbors, t, scale, outputs, tactic: launch(a, v, neighbors, scale, t),
            {**plain, "t": tensor, "scale": floats},
        )
        self._register(
            ATTENTIONS[6],
            lambda a, b, v, neighbors, t, cameras, scale, camera_factor: v.like(),
            lambda a, b, v, neighbors, t, cameras, scale, camera_factor, outputs: types(6),
            lambda a, b, v, neighbors, t, cameras, scale, camera_factor, outputs, tactic: launch(
                a, v, neighbors, scale, t, camera_factor
            ),
            {**plain, "t": tensor, "cameras": tensor, "scale": floats, "camera_factor": floats},
        )

    def _register(self, name: str, shape: Callable, types: Callable, kernel: Callable, parameters: _Types) -> None:
        """TensorRT reads a function's parameters and annotations, which here follow the version that is installed."""
        trtp = self._plugin
        returned: Any = tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]  # type: ignore[name-defined]
        shape.__annotations__ = {**parameters, "return": trtp.TensorDesc}
        types.__annotations__ = {}
        kernel.__annotations__ = {"return": returned}
        trtp.register(f"{NAMESPACE}::{name}")(shape)
        trtp.autotune(f"{NAMESPACE}::{name}")(types)
        trtp.aot_impl(f"{NAMESPACE}::{name}")(self._noting(kernel))

    def _noting(self, kernel: Callable) -> Callable:
        @functools.wraps(kernel)
        def noted(*given: Any) -> Any:
            try:
                return kernel(*given)
            except Exception as e:
                self._errors.append(str(e))
                raise

        return noted

    def _kind(self, tensor: Any) -> str:
        return "fp32" if tensor.dtype == self._trt.float32 else "fp16"

    def _launch(self, kernel: Kernel, heads: Any, rows: Any, numbers: list[Any]) -> tuple[str, str, Any, Any]:
        """What `aot_impl` returns: entry, PTX, launch parameters, and the integers between inputs and output."""
        trtp = self._plugin
        assert kernel.parameters.count(32) == len(numbers), "ahead_of_time.cu has these parameters"
        self.kernels[kernel.sha256] = kernel
        launch = trtp.KernelLaunchParams()
        launch.grid_x = trtp.max(heads * trtp.cdiv(rows, kernel.rows_per_block), 1)  # CUDA knows no launch of 0 blocks
        launch.block_x = kernel.threads
        return kernel.entry, kernel.ptx, launch, trtp.SymIntExprs.from_tuple([trtp.SymInt32(n) for n in numbers])


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _known(size: Any) -> int:
    """A size that the graph knows, or 0."""
    return int(size.constant_value()) if size.is_constant else 0


def _array_of(kind: type) -> Any:
    """The annotation of an attribute of one number: an array, which NumPy turns into a scalar in no version by itself.

    Spelled out, because ``numpy.typing.NDArray`` is an alias that TensorRT 10 cannot read in every NumPy.
    """
    return np.ndarray[Any, np.dtype[kind]]  # type: ignore[valid-type]
