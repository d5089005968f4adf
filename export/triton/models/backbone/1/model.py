"""The backbone in Triton's python backend, for a server without the one that config.pbtxt names, or for OpenVINO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

import nformer_edge as ne


class TritonPythonModel:
    def initialize(self, args):
        self.runner = ne.open(Path(args["model_repository"]).resolve().parents[1] / "model").runner
        self.runner.__enter__()

    def execute(self, requests):
        """All requests at once: Triton hands over what its dynamic batching put together."""
        images = [pb_utils.get_input_tensor_by_name(request, "images").as_numpy() for request in requests]
        features = self.runner.embed(np.concatenate(images))
        rows = np.split(features, np.cumsum([len(part) for part in images])[:-1])
        return [pb_utils.InferenceResponse([pb_utils.Tensor("features", part)]) for part in rows]

    def finalize(self):
        self.runner.__exit__(None, None, None)
