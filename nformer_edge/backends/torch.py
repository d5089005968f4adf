"""The PyTorch reference: a checkpoint, run as the model's own code says. Everything else is measured against it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nformer_edge.backends.base import PYTORCH
from nformer_edge.backends.runner import check_head_input, check_images, model_name, require_head
from nformer_edge.core.errors import ArtifactError, BackendError
from nformer_edge.core.spec import ModelSpec, check_size
from nformer_edge.metrics.composition import Composition
from nformer_edge.model.backbone import Backbone, for_inference
from nformer_edge.model.checkpoint import Checkpoint, load_checkpoint
from nformer_edge.model.gated import GatedHead, Head, head_numbers
from nformer_edge.ops import reference as ops
from nformer_edge.ops.operators import FastestOperators, Operators, using

T = TypeVar("T")


class TorchRunner:
    """See `backends.runner.Runner`.

    Args:
        path: a `.safetensors` checkpoint.
        device: ``cpu`` or a CUDA device; ``cpu`` if None.
        intra_op_threads: of PyTorch while this runner computes; as it is set, if None.
        reference: the backbone runs layer by layer, nothing folded, as a reference should.
        native: the head computes with the native kernels rather than the plain torch operators. Closer to exact, they
            now and then choose the other of two neighbors that a float32 product cannot tell apart, so a reference
            should choose as the engine does that it judges.

    Raises:
        ArtifactError: if the checkpoint cannot be read; later, if it is a head alone and is to embed images.
        BackendError: if the device is not there.
    """

    backend = PYTORCH

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: str | None = None,
        intra_op_threads: int | None = None,
        reference: bool = False,
        native: bool = True,
    ) -> None:
        if intra_op_threads is not None:
            check_size("intra_op_threads", intra_op_threads)
        checkpoint = load_checkpoint(path)
        self.spec: ModelSpec = checkpoint.spec
        self.name = model_name(checkpoint.spec)
        self.sha256 = self.checkpoint = checkpoint.sha256
        self.has_head = checkpoint.head is not None
        self.precision: Mapping[str, str] = {"backbone": "fp32"} | ({"head": "fp32"} if self.has_head else {})
        self.landmark_seed = 0
        self.accuracy = Composition.of(checkpoint.extra)
        self.images_per_person: float | None = None
        self.calibrated_on: tuple[str, ...] = ()
        self._threads = intra_op_threads
        self.native = native
        self._operators: Operators = FastestOperators() if native else ops
        self._device = _device(device or "cpu")
        self._fold = not reference and self._device.type == "cpu"
        self._dtype = torch.float32
        self._images_to_features: Backbone | None = None
        self._model: Checkpoint | None = checkpoint
        for module in (checkpoint.backbone, checkpoint.head):
            if module is not None:
                module.to(self._device)

    def __enter__(self) -> TorchRunner:
        return self

    def __exit__(self, *exception: object) -> None:
        self._model = self._images_to_features = None

    def golden(self) -> dict[str, np.ndarray]:
        """None: this is where golden vectors come from."""
        return {}

    def head_numbers(self) -> dict[str, np.ndarray]:
        """See `Runner.head_numbers`."""
        head = self._loaded().head
        return {} if head is None else head_numbers(head)

    def tell(self, images: float) -> None:
        """Sets the gates of a gated head as an export for so many images a person does."""
        head, self.images_per_person = self._loaded().head, images
        if isinstance(head, GatedHead):
            head.tell(images)

    def embed(self, images: np.ndarray) -> np.ndarray:
        """See `Runner.embed`."""
        images = check_images(images, self.spec)
        backbone = self._backbone()
        if len(images) == 0:
            return np.empty((0, self.spec.backbone.features), np.float32)
        with self._computing():
            x = torch.from_numpy(images).to(self._device, self._dtype)
            return backbone(x.contiguous(memory_format=torch.channels_last) if self._fold else x).cpu().numpy()

    def relate(self, features: np.ndarray, landmarks: np.ndarray | None = None) -> np.ndarray:
        """See `Runner.relate`."""
        return self._related(features, landmarks, self._operators)

    def _related(self, features: np.ndarray, landmarks: np.ndarray | None, operators: Operators) -> np.ndarray:
        features, landmarks = check_head_input(features, landmarks, self.spec, self.landmark_seed)
        head = self._loaded().head
        assert head is not None, "the spec has a head exactly where the checkpoint has"
        if len(features) == 0:
            return features
        with self._computing(), using(operators):
            x = torch.from_numpy(features).to(self._device, self._dtype)
            return head(x, torch.from_numpy(landmarks).to(self._device)).cpu().numpy()

    def float64(self) -> Float64Runner:
        """The same model in double precision."""
        return Float64Runner(self)

    def with_head(self, use: Callable[[Head], T]) -> T:
        """What `use` makes of the head, computed as `relate` computes; see `gallery.protocols`."""
        require_head(self.spec)
        head = self._loaded().head
        assert head is not None, "the spec has a head exactly where the checkpoint has"
        with self._computing(), using(self._operators):
            return use(head)

    def _backbone(self) -> Backbone:
        backbone = self._loaded().backbone
        if backbone is None:
            hint = "Pass a checkpoint of a whole model, or a feature store in place of images."
            raise ArtifactError(self.name, "a head alone", "a backbone, to embed images", hint)
        if not self._fold:
            return backbone
        if self._images_to_features is None:
            self._images_to_features = for_inference(backbone)
        return self._images_to_features

    def _loaded(self) -> Checkpoint:
        if self._model is None:
            raise BackendError(self.name, "a closed runner", "an open one", "Open the model again.")
        return self._model

    @contextmanager
    def _computing(self) -> Iterator[None]:
        before = torch.get_num_threads()
        try:
            if self._threads:
                torch.set_num_threads(self._threads)
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(before)


class Float64Runner(TorchRunner):
    """A checkpoint in double precision: what the rounding of float32 is measured against.

    Args:
        single: the same model, open.
    """

    def __init__(self, single: TorchRunner) -> None:
        self.__dict__.update(vars(single))
        model = single._loaded()
        backbone, head = copy.deepcopy(model.backbone), copy.deepcopy(model.head)
        self._model = replace(model, backbone=backbone and backbone.double(), head=head and head.double())
        self._single, self._dtype, self._fold = single, torch.float64, False

    def relate(
        self,
        features: np.ndarray,
        landmarks: np.ndarray | None = None,
        like: np.ndarray | None = None,
        swap: float = 0.0,
    ) -> np.ndarray:
        """See `Runner.relate`. Neighbors are those that float32 chooses on `like` [N, D], or on `features` if None.

        Float32 cannot tell neighbors apart whose scores are nearly equal, and either order is right; whose neighbors
        they are is no matter of rounding in what follows. With `swap`, two that follow each other and whose cosines
        differ by less change places: the other order.
        """
        noted = _Noted(self._single._operators)
        self._single._related(features if like is None else like, landmarks, noted)
        return self._related(features, landmarks, _Given(noted.lists, swap))


class _Noted:
    """Operators that note the neighbor lists they choose, and who comes next."""

    def __init__(self, inner: Operators) -> None:
        self.lists: list[Tensor] = []
        self._inner = inner
        self.reciprocal_neighbor_attention = inner.reciprocal_neighbor_attention
        self.pair_scores = inner.pair_scores

    def row_top_k(self, a: Tensor, b: Tensor, k: int) -> Tensor:
        self.lists.append(self._inner.row_top_k(a, b, k + 1))
        return self.lists[-1][:, :, :k]


class _Given:
    """Operators that give the neighbor lists they were given, call by call; see `Float64Runner.relate`."""

    def __init__(self, lists: list[Tensor], swap: float) -> None:
        self._lists, self._swap = iter(lists), swap
        self.reciprocal_neighbor_attention = ops.reciprocal_neighbor_attention
        self.pair_scores = ops.pair_scores

    def row_top_k(self, a: Tensor, b: Tensor, k: int) -> Tensor:
        lists = next(self._lists)
        return (_swapped(lists, a, b, self._swap) if self._swap else lists)[:, :, :k]


def _swapped(
    lists: Tensor,  # int32 [H, N, K]
    a: Tensor,  # [H, N, R]
    b: Tensor,  # [H, M, R]
    near: float,
) -> Tensor:  # int32 [H, N, K]
    """Lists in which two that follow each other change places where their cosines differ by less than `near`."""
    swapped = lists.clone()
    for rows, unit_a, unit_b in zip(
        swapped, functional.normalize(a, dim=2), functional.normalize(b, dim=2), strict=True
    ):
        scores = ops.pair_scores(unit_a, unit_b, rows.clamp_min(0))
        tied = ((scores[:, :-1] - scores[:, 1:]).abs() < near) & (rows[:, 1:] >= 0)
        for place in range(tied.shape[1]):
            row = tied[:, place].nonzero().flatten()
            rows[row, place], rows[row, place + 1] = rows[row, place + 1], rows[row, place]
            if place + 1 < tied.shape[1]:
                tied[row, place + 1] = False
    return swapped


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise BackendError("device", name, "cpu or cuda:0", "Choose one of these.") from e
    if device.type == "cuda" and not torch.cuda.is_available():
        hint = "Leave it out, or see `nformer-edge doctor`."
        raise BackendError("device", f"{name}, and PyTorch finds no GPU", "a GPU that PyTorch can use", hint)
    return device
