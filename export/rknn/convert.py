"""A bundle's backbone for Rockchip's NPU (RK3588): FP16, or INT8 by RKNN's own calibration on our calibration images.

In an environment of its own, which rknn-toolkit2 needs on a PC (`pip install nformer-edge 'rknn-toolkit2==2.5.0'`):

    python convert.py BUNDLE --calib-data DIR -o backbone.rknn [--fp16] [--compare 32]

`--compare N` runs the first N query images through RKNN's simulator and through the bundle's own file in onnxruntime.
The .rknn file takes pixels, uint8 [1, height, width, 3] in RGB, resized as the manifest says; it normalizes itself.
The head stays on the CPU: `nformer.onnx` in onnxruntime. RKNN's INT8 is made from the float file, not from our Q/DQ.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from nformer_edge.core.preprocess import load_resized, normalize
from nformer_edge.core.spec import PreprocessSpec
from nformer_edge.data.calibration import calibration_images
from nformer_edge.data.summary import dataset_of
from nformer_edge.exporting.bundle import open_bundle

if TYPE_CHECKING:
    import onnxruntime
    from rknn.api import RKNN


def check(code: int, step: str) -> None:
    """Every call of RKNN gives 0 or an error code."""
    if code != 0:
        sys.exit(f"rknn-toolkit2: {step} gave {code}; its log says why")


def cosine(rknn: RKNN, graph: bytes, spec: PreprocessSpec, path: str) -> float:
    """Of one image's features in RKNN's simulator and in onnxruntime."""
    pixels = load_resized(path, spec)[None]
    (theirs,) = rknn.inference(inputs=[pixels], data_format=["nhwc"])
    (ours,) = session_of(graph).run(None, {"images": normalize(pixels, spec)})
    a, b = theirs.ravel().astype(np.float64), ours.ravel().astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@functools.cache
def session_of(graph: bytes) -> onnxruntime.InferenceSession:
    """The bundle's own file."""
    import onnxruntime

    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--calib-data", required=True, metavar="DIR")
    parser.add_argument("--calib-num", type=int, default=64)
    parser.add_argument("-o", "--output", default="backbone.rknn")
    parser.add_argument("--target", default="rk3588")
    parser.add_argument("--fp16", action="store_true", help="no quantization")
    parser.add_argument("--compare", type=int, default=0, metavar="N")
    args = parser.parse_args()

    from rknn.api import RKNN

    bundle = open_bundle(args.bundle)
    spec = bundle.spec.preprocess
    if spec.pixels is not None:
        sys.exit("the bundle normalizes by itself: export without --input uint8")
    dataset, rknn = dataset_of(args.calib_data), RKNN(verbose=False)
    means, deviations = ([[255 * x for x in values]] for values in (spec.mean, spec.std))
    check(rknn.config(mean_values=means, std_values=deviations, target_platform=args.target), "config")
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "backbone.onnx"
        graph.write_bytes(bundle.backbone)  # verified
        size = [[1, 3, spec.height, spec.width]]
        check(rknn.load_onnx(model=str(graph), inputs=["images"], input_size_list=size), "load_onnx")
        listed = Path(folder) / "images.txt"
        names = [f"{folder}/{i}.png" for i in range(args.calib_num)]
        for name, path in zip(names, calibration_images(dataset, args.calib_num, seed=0), strict=False):
            Image.fromarray(load_resized(path, spec)).save(name)
        listed.write_text("".join(f"{name}\n" for name in names if Path(name).exists()))
        quantized = {} if args.fp16 else {"dataset": str(listed)}
        check(rknn.build(do_quantization=not args.fp16, **quantized), "build")
    check(rknn.export_rknn(args.output), "export_rknn")
    if args.compare:
        check(rknn.init_runtime(), "init_runtime")
        cosines = [cosine(rknn, bundle.backbone, spec, r.path) for r in dataset.query[: args.compare]]
        print(f"cosine of {len(cosines)} images: min {min(cosines):.4f}, mean {np.mean(cosines):.4f}")
    rknn.release()
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
