"""The gallery as a Triton model. Images are brought to size here and embedded by this server's model `backbone`.

A request is JSON, such as {"call": "search", "top": 5}: a method of `nformer_edge`'s Gallery (`CALLS`), its arguments.
Images are files (JPEG, PNG ...), a string each. The result is that of the method, as JSON (docs/schemas).
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image

import nformer_edge as ne
from nformer_edge.core.preprocess import FORMATS, MAX_PIXELS
from nformer_edge.gallery.model import Model

CALLS = ("add", "search", "remove", "compact", "stats")


class OfThisServer:
    """The runner of a model whose backbone runs in this server, which takes `batch` images at once."""

    def __init__(self, runner, batch):
        self._runner, self._batch = runner, batch

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def embed(self, images):
        rows = [np.empty((0, self.spec.backbone.features), np.float32)]
        for start in range(0, len(images), self._batch):
            request = pb_utils.InferenceRequest(
                model_name="backbone",
                requested_output_names=["features"],
                inputs=[pb_utils.Tensor("images", np.ascontiguousarray(images[start : start + self._batch]))],
                preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
            )
            response = request.exec()
            if response.has_error():
                raise RuntimeError(response.error().message())
            rows.append(pb_utils.get_output_tensor_by_name(response, "features").as_numpy())
        return np.concatenate(rows)


class TritonPythonModel:
    def initialize(self, args):
        here, parameters = Path(args["model_repository"]), json.loads(args["model_config"])["parameters"]
        given = {name: parameter["string_value"] for name, parameter in parameters.items()}
        runner = OfThisServer(ne.open((here / given["model"]).resolve()).runner, int(given["batch"]))
        self.gallery = Model(runner).gallery((here / given["gallery"]).resolve())

    def execute(self, requests):
        return [self._answered(request) for request in requests]

    def finalize(self):
        self.gallery.close()

    def _answered(self, request):
        try:
            result = json.dumps(self._call(request)).encode()
            return pb_utils.InferenceResponse([pb_utils.Tensor("result", np.array([result], object))])
        except Exception as e:  # whatever one request asks for, the next one is answered
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{type(e).__name__}: {e}"))

    def _call(self, request):
        asked = json.loads(pb_utils.get_input_tensor_by_name(request, "request").as_numpy()[0])
        call = asked.pop("call", None)
        if call not in CALLS:
            raise ValueError(f"call: got {call!r}, expected {' | '.join(CALLS)}")
        files = pb_utils.get_input_tensor_by_name(request, "images")
        images = [] if files is None else [[_decoded(file) for file in files.as_numpy()]]
        return getattr(self.gallery, call)(*images, **asked).to_json()


def _decoded(file):
    image = Image.open(io.BytesIO(file), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"images: got {image.width} x {image.height} pixels, expected at most {MAX_PIXELS}")
    return image
