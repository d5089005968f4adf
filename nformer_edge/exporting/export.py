"""A checkpoint leaves PyTorch: two ONNX files that stock onnxruntime runs, and all that a device must know of them."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch

from nformer_edge import __version__
from nformer_edge.core.artifact import atomic_folder, atomic_write, require_new, write_manifest
from nformer_edge.core.errors import ArtifactError, UsageError
from nformer_edge.core.machine import versions
from nformer_edge.core.preprocess import normalize
from nformer_edge.core.signature import check_private_key, sign_folder
from nformer_edge.core.spec import ModelSpec, PixelSpec, PreprocessSpec, check_choice, from_dict
from nformer_edge.core.values import to_table
from nformer_edge.exporting.bundle import BACKBONE, GOLDEN, HEAD, KIND, LIVE, PORTABLE, BundleManifest, Normalization
from nformer_edge.exporting.session import ONNXRUNTIME, open_session
from nformer_edge.exporting.trace import bring_to_unit_length, portable_head, take_pixels, trace_backbone, trace_head
from nformer_edge.metrics.agreement import OWN_ERRORS, ROUNDING, row_errors, tensor_error
from nformer_edge.metrics.composition import Composition
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.checkpoint import Checkpoint, load_checkpoint
from nformer_edge.model.gated import GatedHead, head_numbers
from nformer_edge.ops.bodies import DEFAULT_OPSET, IR_VERSION, check_opset
from nformer_edge.ops.contract import LANDMARK_RULE, draw_landmarks

#: Of the self-test's images, how many black and white blocks there are down and across; and of its vectors, how many
#: people with how many shots each.
_GOLDEN_BLOCKS = (4, 2)
_GOLDEN_PEOPLE, _GOLDEN_SHOTS = 12, 12

#: Share of its norm that a row of a bright golden image may be off: their sums are large, and onnxruntime's fused
#: convolutions round them otherwise (3.2e-5 for white, OSNet x0.25 with published weights).
BRIGHT = 1e-4

#: Of each file, its inputs by the golden arrays that feed them, and its output.
_HEAD_ARRAYS = ({"features": "head_input", "landmarks": "landmarks"}, "embeddings")
_GRAPHS = {BACKBONE: ({"images": "images"}, "features"), HEAD: _HEAD_ARRAYS, PORTABLE: _HEAD_ARRAYS}


def export_bundle(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    opset: int = DEFAULT_OPSET,
    landmark_seed: int = 0,
    input: Literal["float32", "uint8"] = "float32",
    input_layout: Literal["NCHW", "NHWC"] | None = None,
    input_channels: Literal["RGB", "BGR"] | None = None,
    unit_features: bool = False,
    accuracy: Composition | None = None,
    images_per_person: float | None = None,
    portable: bool = False,
    sign: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Path:
    """Exports `checkpoint` to the bundle folder `out`, then runs its files in stock onnxruntime against PyTorch.

    Args:
        checkpoint: a `.safetensors` checkpoint with a backbone; without a head the bundle has no `nformer.onnx`.
        out: the folder, written whole or not at all.
        opset: of the standard ONNX domain, 18 to 20.
        landmark_seed: recorded in the manifest; runners draw landmarks from it.
        input: what `backbone.onnx` takes: ``float32``, normalized outside, or ``uint8``: it then normalizes pixels
            itself, with the model's three means and deviations. Images are resized outside in either case.
        input_layout: of pixels; NCHW by default.
        input_channels: order of the pixels' colors; RGB by default. The graph brings them to the model's order.
        unit_features: `backbone.onnx` brings features to length 1.
        accuracy: what an evaluation of the checkpoint gave by images a person, such as ``evaluate(...).composition``;
            if None what its training measured on held-out people, where it did. `search` decides by it.
        images_per_person: gates of a gated head are set for galleries with so many; for any if None.
        portable: also write `nformer.portable.onnx`, the head of standard operators alone (`exporting.trace`).
        sign: PEM file of an Ed25519 private key: the bundle carries its signature (`core.signature`).
        force: replace an earlier bundle.

    Raises:
        UsageError: for an opset without bodies, a negative seed, `portable` without a head, `images_per_person` without
            a gated one or below 1, a layout or an order of colors without ``uint8``, or features of length 1 for a head
            that takes them as they are.
        ArtifactError: if there is something at `out`, the checkpoint cannot be read, or onnxruntime computes something
            else than PyTorch.
        BackendError: if onnxruntime, which the check needs, is not installed.
    """
    check_opset(opset)
    check_private_key(sign)
    require_new(out, KIND, force)
    if landmark_seed < 0:
        raise UsageError("landmark_seed", landmark_seed, "0 or more", "Choose another seed.")
    loaded = load_checkpoint(checkpoint)
    if loaded.backbone is None:
        hint = "Save the backbone in the same checkpoint."
        raise ArtifactError(str(checkpoint), "a head alone", "a backbone with or without a head", hint)
    if portable and loaded.head is None:
        hint = "Leave --portable out: backbone.onnx has standard operators alone."
        raise UsageError("portable", "a checkpoint without a head", "a head to write", hint)
    if images_per_person is not None:
        if not isinstance(loaded.head, GatedHead):
            got, hint = f"{images_per_person:g} without a gated head", "Leave --images-per-person out."
            raise UsageError("images_per_person", got, "a gated head", hint)
        loaded.head.tell(images_per_person)
    backbone = loaded.backbone
    loaded = replace(loaded, spec=_exported(loaded.spec, input, input_layout, input_channels, unit_features))
    golden = _golden(loaded, landmark_seed)
    with atomic_folder(out, KIND) as folder:
        size = (loaded.spec.preprocess.height, loaded.spec.preprocess.width)
        graph = trace_backbone(backbone, size, opset)
        if loaded.spec.preprocess.pixels is not None:
            take_pixels(graph, loaded.spec.preprocess)
        if unit_features:
            bring_to_unit_length(graph)
        _save(graph, folder / BACKBONE, "One feature an image.")
        if loaded.head is not None:
            head, doc = trace_head(loaded.head, opset), "Features of N images that know their neighbors."
            _save(head, folder / HEAD, doc)
            if portable:
                _save(portable_head(head), folder / PORTABLE, doc)
            with atomic_write(folder / LIVE) as file:
                np.savez(file, **head_numbers(loaded.head))  # type: ignore[arg-type]
        with atomic_write(folder / GOLDEN) as file:
            np.savez(file, **golden)  # type: ignore[arg-type]
        worst = check_against(folder, golden, _exact(loaded, golden))
        manifest = _manifest(loaded, opset, landmark_seed, worst, accuracy, images_per_person)
        write_manifest(folder, KIND, to_table(manifest))
        sign_folder(folder, KIND, sign)
    return Path(out)


def _exported(spec: ModelSpec, kind: str, layout: str | None, channels: str | None, unit_features: bool) -> ModelSpec:
    """What the bundle's manifest says of the model."""
    check_choice("input", kind, ("float32", "uint8"))
    given = {"layout": layout, "channels": channels}
    pixels = {name: value for name, value in given.items() if value is not None}
    if pixels and kind != "uint8":
        name, value = next(iter(pixels.items()))
        raise UsageError(f"input_{name}", f"{value} for {kind}", "uint8", "Add --input uint8, or leave it out.")
    if unit_features and spec.head is not None and spec.head.input_scale == "none":
        hint = "Leave --unit-features out: this head tells features by their length, too."
        raise UsageError("unit_features", "features of length 1", "features as they are, for this head", hint)
    taken = from_dict(PixelSpec, pixels) if kind == "uint8" else None
    return replace(spec, preprocess=replace(spec.preprocess, pixels=taken), unit_features=unit_features)


def _features(backbone: Backbone, images: np.ndarray, spec: ModelSpec, kind: torch.dtype) -> np.ndarray:
    """PyTorch's features of golden images, by the Python path: pixels are normalized outside."""
    if spec.preprocess.pixels is not None:
        rgb = images if spec.preprocess.pixels.layout == "NHWC" else np.moveaxis(images, -3, -1)
        rgb = rgb[..., ::-1] if spec.preprocess.pixels.channels == "BGR" else rgb
        images = normalize(rgb, replace(spec.preprocess, pixels=None))
    features = backbone(torch.from_numpy(images).to(kind))
    return (torch.nn.functional.normalize(features) if spec.unit_features else features).numpy()


def _save(model: onnx.ModelProto, path: Path, doc: str) -> None:
    model.doc_string = doc
    onnx.helper.set_model_props(model, {"made_by": f"nformer-edge {__version__}"})
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        got = f"a graph that ONNX's checker refuses ({e})"
        raise ArtifactError(path.name, got, "a valid one", "Report this.") from e
    with atomic_write(path) as file:
        file.write(model.SerializeToString())


def _golden(loaded: Checkpoint, seed: int) -> dict[str, np.ndarray]:
    """Seeded inputs and PyTorch's outputs, for both files."""
    assert loaded.backbone is not None
    rng = np.random.default_rng(0)
    spec = loaded.spec
    images = _golden_images(spec.preprocess, rng)
    arrays = {"images": images}
    with torch.no_grad():
        arrays["features"] = _features(loaded.backbone, images, spec, torch.float32)
        if loaded.head is not None and spec.head is not None:
            # People with several shots each, so that there are neighbors, and who is one is not a matter of rounding.
            people = np.repeat(rng.standard_normal((_GOLDEN_PEOPLE, spec.head.features)), _GOLDEN_SHOTS, axis=0)
            rows = (people + 0.5 * rng.standard_normal(people.shape)).astype(np.float32)
            landmarks = draw_landmarks(len(rows), spec.head.layers, spec.head.landmarks, seed)
            embeddings = loaded.head(torch.from_numpy(rows), torch.from_numpy(landmarks)).numpy()
            arrays |= {"head_input": rows, "landmarks": landmarks, "embeddings": embeddings}
    return arrays


def _golden_images(spec: PreprocessSpec, rng: np.random.Generator) -> np.ndarray:
    """Noise, white, and two of black and white blocks: [4, 3, H, W] as a rule, as the graph takes them.

    Large bright areas make the largest sums: where INT8 saturates, features of white were 0.33 of their norm off, of
    such blocks up to 0.27, of generated people 0.05 to 0.09 (the demo's model, Haswell).
    """
    down, across = _GOLDEN_BLOCKS
    rows, columns = np.arange(spec.height) * down // spec.height, np.arange(spec.width) * across // spec.width
    blocks = rng.choice(np.array([0, 255], np.uint8), (2, down, across))[:, rows][:, :, columns]
    bright = np.concatenate([np.full((1, spec.height, spec.width), 255, np.uint8), blocks])
    if spec.pixels is not None:
        noise = rng.integers(0, 256, (1, *spec.shape), np.uint8)
    else:
        noise = rng.standard_normal((1, *spec.shape), np.float32)
    return np.concatenate([noise, normalize(np.repeat(bright[..., None], 3, axis=-1), spec)])


def _exact(loaded: Checkpoint, golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """PyTorch's outputs for the golden inputs, computed in float64."""
    found = {}
    with torch.no_grad():
        if loaded.backbone is not None:
            double = copy.deepcopy(loaded.backbone).double()
            found["features"] = _features(double, golden["images"], loaded.spec, torch.float64)
        if loaded.head is not None and "embeddings" in golden:
            rows, landmarks = (torch.from_numpy(golden[array]) for array in ("head_input", "landmarks"))
            found["embeddings"] = copy.deepcopy(loaded.head).double()(rows.double(), landmarks).numpy()
    return found


def check_against(folder: Path, golden: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> dict[str, float]:
    """Runs the files in stock onnxruntime on the golden inputs, by the FP32 gate on tensors (`metrics.agreement`).

    Args:
        folder: of the files.
        golden: inputs, and PyTorch's outputs in float32.
        exact: PyTorch's outputs in float64.

    Returns:
        For each file, the error of the worst row in units of what that row is allowed.

    Raises:
        ArtifactError: if an error is above 1, naming the file.
        BackendError: if onnxruntime is not installed.
    """
    worst = {}
    for name, (feed, output) in _GRAPHS.items():
        if output not in golden or not (folder / name).exists():
            continue
        session = open_session((folder / name).read_bytes(), name)
        (found,) = session.run([output], {key: golden[array] for key, array in feed.items()})
        rows = slice(1) if name == BACKBONE else slice(None)
        own = row_errors(golden[output][rows], exact[output][rows])
        bright = row_errors(found, exact[output])[1:] if name == BACKBONE else np.zeros(1)
        worst[name] = max(tensor_error(found[rows], exact[output][rows], own).worst, float(bright.max()) / BRIGHT)
        if not worst[name] <= 1:
            got = f"a row {worst[name]:.3g} times as far off float64 as it may be, in onnxruntime"
            expected = (
                f"{OWN_ERRORS:g} times PyTorch's own error, {ROUNDING:g} of its norm, or {BRIGHT:g} if it is bright"
            )
            raise ArtifactError(name, got, expected, "Nothing was written; report this with the checkpoint's spec.")
    return worst


def _manifest(
    loaded: Checkpoint,
    opset: int,
    seed: int,
    worst: dict[str, float],
    accuracy: Composition | None,
    images_per_person: float | None,
) -> BundleManifest:
    head = loaded.spec.head
    where = "inside nformer.onnx: features go in as the backbone gave them"
    if loaded.spec.unit_features:
        where = f"inside backbone.onnx, and {where}"
    return BundleManifest(
        model=loaded.spec,
        preprocess=loaded.spec.preprocess,
        normalization=Normalization(head.input_scale if head else None, where),
        landmark_rule=LANDMARK_RULE,
        landmark_seed=seed,
        opset=opset,
        ir_version=IR_VERSION,
        versions=versions("torch", "onnx", ONNXRUNTIME, "numpy"),
        checkpoint_sha256=loaded.sha256,
        self_check={"worst_error_in_fp32_tolerances": worst},
        accuracy=accuracy or Composition.of(loaded.extra),
        images_per_person=images_per_person,
    )
