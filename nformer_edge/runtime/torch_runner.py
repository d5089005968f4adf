"""Checkpoints in PyTorch: the reference that engines are judged against."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.model.checkpoint import load_checkpoint
from nformer_edge.runtime.runner import Runner


class TorchRunner(Runner):
    """A `.safetensors` checkpoint, in float32.

    Args:
        path: the checkpoint.
        threads: of PyTorch's operators while the runner is open; PyTorch's own choice if None.
        device: ``cpu`` or a CUDA device.
    """

    backend = "torch"

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None, device: str = "cpu") -> None:
        self.name = Path(path).stem
        self._threads, self._threads_before = threads, torch.get_num_threads()
        checkpoint = load_checkpoint(path)
        if checkpoint.backbone is None:
            raise ArtifactError(
                str(path), got="a head alone", expected="a model with a backbone", mend="Pass the whole model."
            )
        self.spec = checkpoint.spec
        self.precision = {"backbone": "fp32"} | ({"head": "fp32"} if self.has_head else {})
        self._backbone, self._head = checkpoint.backbone, checkpoint.head
        try:
            self._device = torch.device(device)
        except RuntimeError as e:
            raise UsageError("device", got=device, expected="cpu, cuda or cuda:N", mend="Mend --device.") from e
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError("device", got=device, expected="a CUDA GPU in this machine", mend="Use --device cpu.")

    def open(self) -> None:
        self._backbone.to(self._device)
        if self._head is not None:
            self._head.to(self._device)
        if self._threads is not None:
            self._threads_before = torch.get_num_threads()
            torch.set_num_threads(self._threads)

    def close(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads_before)

    @torch.inference_mode()
    def _embed(self, images: np.ndarray) -> np.ndarray:
        return self._backbone(torch.from_numpy(images).to(self._device)).cpu().numpy()

    @torch.inference_mode()
    def _relate(self, features: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        assert self._head is not None
        x, drawn = torch.from_numpy(features).to(self._device), torch.from_numpy(landmarks).to(self._device)
        return self._head(x, drawn).cpu().numpy()
