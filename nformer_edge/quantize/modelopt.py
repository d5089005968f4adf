"""A bundle whose backbone NVIDIA ModelOpt has quantized or halved: another way to the graphs that TensorRT parses.

ModelOpt pins its own onnx and onnxruntime, so it lives in an environment of its own: the extra ``modelopt``, without
``cpu``, ``quant`` or ``train``. What leaves that environment is a bundle like any other: Q/DQ nodes or FP16 types stand
in `backbone.onnx`, onnxruntime runs it, and `build-engine` for TensorRT 10 or later takes its types as they are. The
head stays as it was: its operators are nodes that ModelOpt does not know.
"""

from __future__ import annotations

import io
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from nformer_edge.core.artifact import atomic_folder, require_new, write_manifest
from nformer_edge.core.errors import ArtifactError, BackendError, UsageError
from nformer_edge.core.signature import check_private_key, sign_folder
from nformer_edge.core.spec import Precision, check_choice
from nformer_edge.core.values import Result, Table, from_json, to_table
from nformer_edge.data.batches import iter_batches
from nformer_edge.data.calibration import calibration_images, calibration_sha256
from nformer_edge.data.records import Dataset
from nformer_edge.exporting.bundle import BACKBONE, GOLDEN, HEAD, KIND, LIVE, open_bundle
from nformer_edge.quantize.fp16 import backbone_float32, multiplication_types, plain_features
from nformer_edge.quantize.placement_cpu import float_nodes
from nformer_edge.quantize.values import CalibrationFacts

Method = Literal["minmax", "entropy"]

#: Our names of its methods.
METHODS = {"minmax": "max", "entropy": "entropy"}

#: Images that it runs at once.
_BATCH = 4


@dataclass(frozen=True)
class ModelOptBundle(Result):
    """A bundle whose backbone ModelOpt has changed.

    Args:
        bundle: its folder.
        precision: of each part.
        size_mb: of the backbone's file.
        multiplications: convolutions and matrix multiplications of the backbone, by type.
        calibration: the images that it calibrated with, or looked at.
        made_by: version of ModelOpt, and who chose the nodes that it leaves out.
    """

    kind = "modelopt"
    version = 2

    bundle: str
    precision: Mapping[str, Precision]
    size_mb: float
    multiplications: Mapping[str, int]
    calibration: CalibrationFacts
    made_by: Mapping[str, str]

    def __str__(self) -> str:
        counts = ", ".join(f"{number} in {kind.upper()}" for kind, number in self.multiplications.items())
        used = self.calibration
        return (
            f"wrote {self.bundle}: backbone {self.precision['backbone']}, {self.size_mb:.1f} MB; convolutions and "
            f"matrix multiplications: {counts}\n"
            f"  by ModelOpt {self.made_by['nvidia-modelopt']}, {used.num} images, sha256 {used.sha256[:12]}"
        )


def bundle_by_modelopt(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    calib_data: Dataset | str | os.PathLike[str],
    *,
    precision: Literal["fp16", "int8"] = "int8",
    calib_num: int = 256,
    calib_method: Method = "entropy",
    seed: int = 0,
    own_choice: bool = False,
    force_calibration: bool = False,
    sign: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Path:
    """Writes a bundle like `bundle` in which the backbone is INT8 (Q/DQ nodes) beside FP16, or FP16.

    Args:
        bundle: folder that `export_bundle` wrote.
        out: folder, written whole or not at all.
        calib_data: dataset whose training images calibrate, or a folder of images. FP16 looks at what they activate.
        precision: ``int8`` or ``fp16``.
        calib_num: calibration images at most.
        calib_method: for INT8.
        seed: of the choice of images.
        own_choice: ModelOpt alone decides which nodes it leaves out; otherwise those that our INT8 and FP16 leave out.
        force_calibration: accept query or gallery images.
        sign: PEM file of an Ed25519 private key: the bundle carries its signature (`core.signature`).
        force: replace an earlier bundle.

    Raises:
        ArtifactError: if there is something at `out`, or the bundle does not verify.
        BackendError: without ModelOpt.
        DataError: for calibration images that cannot be used.
        UsageError: for a backbone that is not FP32.
    """
    check_private_key(sign)
    check_choice("precision", precision, ("fp16", "int8"))
    check_choice("calib_method", calib_method, tuple(METHODS))
    require_modelopt()
    require_new(out, KIND, force)
    source = open_bundle(bundle)
    plain = onnx.load_from_string(source.backbone)
    _require_float32(str(bundle), plain)
    paths = calibration_images(calib_data, calib_num, seed, force=force_calibration)
    images = np.concatenate(list(iter_batches(paths, source.spec.preprocess)))
    settings: Table = {"method": calib_method, "seed": seed, "forced": force_calibration, "num": len(paths)}
    sha256 = calibration_sha256(paths, settings)
    if precision == "int8":
        made = quantize(plain, images, calib_method, () if own_choice else float_nodes(plain))
    else:
        made = halve(plain, images, () if own_choice else backbone_float32(plain))
    manifest = replace(
        source.manifest,
        self_check={},
        precision={**source.precision, "backbone": precision},
        calibration=to_table(CalibrationFacts(calib_method, seed, force_calibration, len(paths), sha256)),
        made_by={"nvidia-modelopt": version("nvidia-modelopt"), "choice": "its own" if own_choice else "ours"},
        made_from=source.backbone_sha256,
    )
    features = plain_features(made.SerializeToString(), source.golden["images"])
    with atomic_folder(out, KIND) as folder:
        onnx.save(made, folder / BACKBONE)
        np.savez(folder / GOLDEN, **{**source.golden, "features": features})  # type: ignore[arg-type]
        for name in {HEAD, LIVE} & set(source.files.files):
            source.files.copy(name, folder)
        write_manifest(folder, KIND, to_table(manifest))
        sign_folder(folder, KIND, sign)
    return Path(out)


def require_modelopt() -> None:
    """Raises BackendError unless ModelOpt's ONNX part can be imported, and asks it for less talk."""
    try:
        import modelopt.onnx.autocast
        import modelopt.onnx.quantization  # noqa: F401
    except ImportError as e:
        hint = "In an environment of its own: pip install 'nformer-edge[modelopt]'"
        raise BackendError("modelopt", f"no package {e.name}", "nvidia-modelopt with its extra onnx", hint) from e
    for name in ("modelopt.onnx", "modelopt.onnx.autocast"):
        logging.getLogger(name).setLevel(logging.WARNING)


def quantize(model: onnx.ModelProto, images: np.ndarray, method: Method, kept: Collection[str]) -> onnx.ModelProto:
    """ModelOpt's Q/DQ nodes in a float backbone, and FP16 around them; inputs and outputs stay FP32.

    Args:
        model: as `export` wrote it.
        images: float32 [N, 3, H, W] to calibrate with.
        method: how ranges follow from activations.
        kept: names of nodes that are not quantized.
    """
    from modelopt.onnx.quantization import quantize as by_modelopt

    shape = "x".join(map(str, (min(_BATCH, len(images)), *images.shape[1:])))
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):  # it writes beside what it reads
        source, out = Path(folder) / "plain.onnx", Path(folder) / "quantized.onnx"
        onnx.save(model, source)
        by_modelopt(
            str(source),
            "int8",
            {"images": images},
            METHODS[method],
            calibration_eps=["cpu"],
            calibration_shapes=f"images:{shape}",
            nodes_to_exclude=_patterns(kept) or None,
            high_precision_dtype="fp16",
            output_path=str(out),
            log_level="WARNING",
        )
        return onnx.load(out)


def halve(model: onnx.ModelProto, images: np.ndarray, kept: Collection[str]) -> onnx.ModelProto:
    """ModelOpt's FP16 types in a float backbone, whose inputs and outputs stay FP32. Arguments as for `quantize`."""
    from modelopt.onnx.autocast import convert_to_mixed_precision

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):  # it changes what it reads
        source, data = Path(folder) / "plain.onnx", Path(folder) / "images.npz"
        onnx.save(model, source)
        np.savez(data, images=images)
        return convert_to_mixed_precision(
            str(source),
            "fp16",
            keep_io_types=True,
            calibration_data=str(data),
            nodes_to_exclude=_patterns(kept) or None,
        )


def _patterns(names: Collection[str]) -> list[str]:
    """Regular expressions, which it takes, that match these names alone."""
    return [f"^{re.escape(name)}$" for name in sorted(names)]


def _require_float32(where: str, model: onnx.ModelProto) -> None:
    other = sorted(set(multiplication_types(model).values()) - {"fp32"})
    if other:
        hint = "Pass the bundle that this one was made from."
        raise UsageError(where, f"a backbone in {' and '.join(other)}", "the FP32 one that `export` wrote", hint)


def describe_bundle(path: str | os.PathLike[str]) -> ModelOptBundle:
    """What such a bundle holds, verified.

    Raises:
        ArtifactError: for a bundle that ModelOpt did not make.
    """
    bundle = open_bundle(path)
    manifest = bundle.manifest
    counts = Counter(multiplication_types(onnx.load_from_string(bundle.backbone)).values())
    return ModelOptBundle(
        bundle=str(path),
        precision=manifest.precision,
        size_mb=len(bundle.backbone) / 1e6,
        multiplications={kind: counts[kind] for kind in ("int8", "fp16", "fp32") if counts[kind]},
        calibration=from_json(CalibrationFacts, manifest.calibration, f"{path}: calibration", error=ArtifactError),
        made_by=manifest.made_by,
    )
