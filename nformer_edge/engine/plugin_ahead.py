"""Our two operators through TensorRT's Python plugin interface, ahead of time: the plan carries their kernels.

From TensorRT 10.9 on (`tensorrt.plugin`). Python describes each node while a plan is built; the finished plan holds PTX
and expressions for its launch, and needs neither this package nor a plugin library to run.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from nformer_edge.core.errors import BackendError
from nformer_edge.core.ops import DOMAIN, RECIPROCAL_NEIGHBOR_ATTENTION, ROW_TOP_K
from nformer_edge.engine.plugin_kernels import (
    MOST_NEIGHBORS,
    Kernel,
    compile_attention,
    compile_row_top_k,
    float_halves,
)
from nformer_edge.engine.ptx import PtxCompiler

#: The first TensorRT that puts a kernel into the plan. 10.8 calls back into Python, earlier ones know no such plugin.
SINCE = (10, 9)

#: TensorRT reserves the empty namespace, which the library's plugins have.
NAMESPACE = DOMAIN


class AheadOfTime:
    """Registers both operators in this process, and keeps what was compiled and what went wrong.

    TensorRT prints an error out of a callback and then refuses the network; ``errors`` has it for whoever asks why.

    Args:
        trt: the module tensorrt, of `SINCE` or later.
        compiler: of CUDA.
        architecture: the least compute capability that the plan is to run on, times ten.

    Raises:
        BackendError: if this TensorRT has no such interface, or has these operators from elsewhere.
    """

    def __init__(self, trt: Any, compiler: PtxCompiler, architecture: int) -> None:
        self._trt, self._compiler, self._architecture = trt, compiler, architecture
        self.kernels: dict[str, Kernel] = {}  # by the sha256 of their PTX
        self.errors: list[str] = []
        try:
            self._plugin = importlib.import_module(f"{trt.__name__}.plugin")
        except ImportError as e:
            raise BackendError(
                f"{trt.__name__}.plugin", got=f"none ({e})", expected="TensorRT's Python plugins",
                mend="nformer-edge build-plugin builds a library instead.",
            ) from e  # fmt: skip
        try:
            self._register_row_top_k()
            self._register_attention()
        except ValueError as e:
            raise BackendError(
                NAMESPACE, got=f"a refusal of TensorRT {trt.__version__}: {e}", expected="two new operators",
                mend="Start a new process: they are registered once in each.",
            ) from e  # fmt: skip

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
        trtp, tensor = self._plugin, self._plugin.TensorDesc

        def shape(a: Any, b: Any, v: Any, neighbors: Any, scale: Any) -> Any:
            return v.like()

        def types(a: Any, b: Any, v: Any, neighbors: Any, scale: Any, outputs: Any) -> Any:
            return [trtp.AutoTuneCombination(f"{kind}, {kind}, {kind}, INT32, {kind}") for kind in ("FP32", "FP16")]

        def kernel(a: Any, b: Any, v: Any, neighbors: Any, scale: Any, outputs: Any, tactic: int) -> Any:
            (heads, rows, factors), (lists, _, count) = a.shape_expr, neighbors.shape_expr
            longest = _known(count) or MOST_NEIGHBORS
            compiled = compile_attention(self._compiler, self._architecture, self._kind(a), longest)
            numbers = [heads, rows, factors, v.shape_expr[2], lists, count, *float_halves(scale[0])]
            return self._launch(compiled, heads, rows, numbers)

        inputs = {"a": tensor, "b": tensor, "v": tensor, "neighbors": tensor, "scale": _array_of(np.float32)}
        self._register(RECIPROCAL_NEIGHBOR_ATTENTION, shape, types, kernel, inputs)

    def _register(
        self, name: str, shape: Callable, types: Callable, kernel: Callable, parameters: dict[str, Any]
    ) -> None:
        """TensorRT reads a function's parameters and annotations, which here follow the version that is installed."""
        trtp = self._plugin
        types_of_kernel: Any = tuple[str, str, trtp.KernelLaunchParams, trtp.SymExprs]  # type: ignore[name-defined]
        shape.__annotations__ = {**parameters, "return": trtp.TensorDesc}
        types.__annotations__ = {}
        kernel.__annotations__ = {"return": types_of_kernel}
        trtp.register(f"{NAMESPACE}::{name}")(shape)
        trtp.autotune(f"{NAMESPACE}::{name}")(types)
        trtp.aot_impl(f"{NAMESPACE}::{name}")(self._noting(kernel))

    def _noting(self, kernel: Callable) -> Callable:
        @functools.wraps(kernel)
        def noted(*given: Any) -> Any:
            try:
                return kernel(*given)
            except Exception as e:
                self.errors.append(str(e))
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


def _known(size: Any) -> int:
    """A size that the graph tells, or 0."""
    return int(size.constant_value()) if size.is_constant else 0


def _array_of(kind: type) -> Any:
    """The annotation of an attribute of one number: an array, which NumPy turns into a scalar in no version by itself.

    Spelled out, because ``numpy.typing.NDArray`` is an alias that TensorRT 10 cannot read in every NumPy.
    """
    return np.ndarray[Any, np.dtype[kind]]  # type: ignore[valid-type]
