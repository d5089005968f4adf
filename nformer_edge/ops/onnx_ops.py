"""The native kernels inside onnxruntime, for the two nodes of ``nformer.onnx``. Loads neither torch nor onnx.

The route is a custom-operator library, and these are the reasons, measured or read:

- A session that registered it runs our nodes natively, although the file also holds their standard-operator bodies:
  onnxruntime asks for a kernel before it inlines a function. A session that did not runs the bodies. One file, as it
  is, serves both.
- It needs no package: `onnxruntime_abi.h` states the twenty places of onnxruntime's C interface that are used, all of
  them frozen since its version 1. onnxruntime-extensions would have been a dependency, knows Python operators in its
  own domain only, and calls them under the interpreter's lock.
- A graph split at our nodes would need a second file or a graph editor on the device, and cuts every buffer plan where
  onnxruntime could have kept one.
- The same library serves a C++ program, with one call of ``RegisterCustomOps``.
"""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from typing import Any

from nformer_edge.core.errors import BackendError
from nformer_edge.ops import native

_NAME = "libnformer_onnxruntime.so"
_lock = threading.Lock()


def library_path() -> str | None:
    """The custom-operator library, beside the compiled kernels; None where it was not built."""
    for folder in (native.folder(), Path(__file__).parent):
        if folder is not None and (folder / _NAME).is_file():
            return str(folder / _NAME)
    return None


def available() -> bool:
    """Whether `register` can work here."""
    return library_path() is not None


def register(
    options: Any,  # onnxruntime.SessionOptions
    threads: int | None = None,
) -> None:
    """Lets the sessions made with `options` run our nodes natively, on `threads` threads (one a usable CPU if None).

    The nodes take float32. Non-finite rows choose nobody and nobody chooses them; other rows never notice.

    Raises:
        BackendError: if the library was not built, or onnxruntime refuses it.
    """
    path = library_path()
    if path is None:
        hint = "Run pip install ., which compiles it."
        raise BackendError("native kernels for onnxruntime", f"no {_NAME}", "it next to ops._kernels", hint)
    with _lock:  # the number of threads is read while the library registers itself
        ctypes.CDLL(os.fspath(path)).NFormerSetThreads(native.default_threads() if threads is None else threads)
        try:
            options.register_custom_ops_library(path)
        except Exception as e:  # onnxruntime's exceptions share no base class of their own
            got, hint = str(e).splitlines()[0], "Install 1.18 or newer."
            raise BackendError("native kernels for onnxruntime", got, "onnxruntime to take them", hint) from e
