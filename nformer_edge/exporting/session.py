"""The one way in which graphs are opened in onnxruntime, by a runner or by a build. Needs neither torch nor onnx."""

from __future__ import annotations

from typing import Any, Final

from nformer_edge.core.errors import ArtifactError, BackendError
from nformer_edge.ops import onnx_ops

#: The package, and the backend of the same name.
ONNXRUNTIME: Final = "onnxruntime"


def open_session(
    graph: bytes, name: str, threads: int | None = None, native: bool = False, optimize: bool = True, profile: str = ""
) -> Any:
    """An onnxruntime CPU session for the bytes of a graph, with our kernels registered if `native`.

    Without `optimize` each node is computed for itself, as it stands. `profile` is where a file of each node's times
    will begin its name.

    Raises:
        BackendError: if onnxruntime is not installed, or refuses the kernels' library.
        ArtifactError: if it refuses the graph.
    """
    try:
        import onnxruntime
    except ImportError as e:
        hint = "pip install 'nformer-edge[cpu]'"
        raise BackendError("ONNX graphs", f"no package {e.name}", "onnxruntime 1.18 or newer", hint) from e
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings name graph internals that a user can do nothing about
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    if native:
        onnx_ops.register(options, threads)
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # its exceptions share no base class of their own
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        got = f"a graph that onnxruntime {onnxruntime.__version__} refuses ({reason})"
        hint = "Update onnxruntime, or export the bundle again with this version."
        raise ArtifactError(name, got, "one it reads", hint) from e
