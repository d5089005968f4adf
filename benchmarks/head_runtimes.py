"""Which runtime takes which file: heads of every rule with functions and portable, and a backbone, against onnxruntime.

    pip install openvino mnn && npm install onnxruntime-web      # what is not there is left out
    NODE_PATH=$PWD/node_modules python benchmarks/head_runtimes.py

Largest difference, as a share of the largest output, or why not. MNN's converter is run with a `pip` that does nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from nformer_edge.core.spec import BackboneSpec, HeadSpec
from nformer_edge.exporting.trace import portable_head, trace_backbone, trace_head
from nformer_edge.model.backbone import Backbone
from nformer_edge.model.gated import GatedHead, start_as_gates
from nformer_edge.model.nformer import NFormer
from nformer_edge.ops.contract import draw_landmarks
from nformer_edge.report.table import format_table

IMAGES, LANDMARKS = 280, 40
WEB = """
const ort = require("onnxruntime-web"), fs = require("fs");
const [file, given] = process.argv.slice(1), inputs = JSON.parse(fs.readFileSync(given));
const feed = Object.fromEntries(inputs.map(([name, type, values, shape]) =>
  [name, new ort.Tensor(type, type === "int32" ? Int32Array.from(values) : Float32Array.from(values), shape)]));
ort.InferenceSession.create(new Uint8Array(fs.readFileSync(file))).then(session => session.run(feed))
  .then(found => console.log(JSON.stringify(Array.from(Object.values(found)[0].data))));
"""
MNN = """
import sys, numpy, MNN
file, given, output, out = sys.argv[1:]
feed = dict(numpy.load(given))
module = MNN.nn.load_module_from_file(file, list(feed), [output])
found = module.forward([MNN.expr.const(x, list(x.shape), MNN.expr.NCHW) for x in feed.values()])[0]
numpy.save(out, MNN.expr.convert(found, MNN.expr.NCHW).read())
"""
OPENVINO = """
import sys, numpy, openvino
file, given, out = sys.argv[1:]
core = openvino.Core()
model = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
numpy.save(out, model(dict(numpy.load(given)))[0])
"""
Feed = dict[str, np.ndarray]


def files() -> Iterator[tuple[str, onnx.ModelProto, Feed]]:
    """Name, model and inputs."""
    rng = np.random.default_rng(0)
    people = np.repeat(rng.standard_normal((IMAGES // 4, 16)), 4, axis=0)
    rows = (people + 0.3 * rng.standard_normal(people.shape)).astype(np.float32)
    torch.manual_seed(0)
    for rule in ("gated", "features", "affinity"):
        spec = HeadSpec(16, layers=2, heads=1, k=4, landmarks=LANDMARKS, rule=rule)
        head = (GatedHead(spec) if rule == "gated" else NFormer(spec)).eval()
        if isinstance(head, GatedHead):
            start_as_gates(head, torch.from_numpy(rows), torch.arange(IMAGES) // 4)
        feed = {"features": rows, "landmarks": draw_landmarks(IMAGES, 2, LANDMARKS, 0)}
        traced = trace_head(head, 18)
        yield f"{rule}, functions", traced, feed
        yield f"{rule}, portable", portable_head(traced), feed
    backbone = trace_backbone(Backbone(BackboneSpec("osnet_x0_25", 8)).eval(), (64, 32), 18)
    yield "OSNet x0.25", backbone, {"images": rng.standard_normal((2, 3, 64, 32)).astype(np.float32)}


def run(program: str, *args: str, out: Path) -> np.ndarray:
    """What a program in a process of its own writes to `out`: some runtimes end with their process."""
    ran = subprocess.run([sys.executable, "-c", program, *args, str(out)], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"exit code {ran.returncode}")
    return np.asarray(np.load(out))


def by_onnxruntime(path: Path, feed: Feed) -> np.ndarray:
    found = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feed)[0]
    return np.asarray(found)


def by_openvino(path: Path, feed: Feed) -> np.ndarray:
    given = path.with_suffix(".npz")
    np.savez(given, **feed)
    return run(OPENVINO, str(path), str(given), out=given.with_suffix(".npy"))


def by_web(path: Path, feed: Feed) -> np.ndarray:
    inputs = [[name, str(x.dtype), x.ravel().tolist(), x.shape] for name, x in feed.items()]
    given = path.with_suffix(".json")
    given.write_text(json.dumps(inputs))
    ran = subprocess.run(["node", "-e", WEB, str(path), str(given)], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(ran.stderr.strip().rpartition("Error: ")[2].partition("\n")[0])
    return np.array(json.loads(ran.stdout), np.float32)


def by_mnn(path: Path, feed: Feed) -> np.ndarray:
    """Converts, and runs what was written."""
    stub, out = path.parent / "stub", path.with_suffix(".mnn")
    stub.mkdir(exist_ok=True)
    (stub / "pip").write_text("#!/bin/sh\nexit 1\n")
    (stub / "pip").chmod(0o755)
    convert = "import sys; from MNN.tools import mnnconvert; mnnconvert.main()"
    flags = ["-f", "ONNX", "--modelFile", str(path), "--MNNModel", str(out), "--bizCode", "x"]
    env = os.environ | {"PATH": f"{stub}:{os.environ['PATH']}"}
    ran = subprocess.run([sys.executable, "-c", convert, *flags], capture_output=True, text=True, env=env)
    if not out.exists():
        raise RuntimeError(f"nothing written, exit code {ran.returncode}")
    given = path.with_suffix(".npz")
    np.savez(given, **feed)
    return run(MNN, str(out), str(given), onnx.load(path).graph.output[0].name, out=given.with_suffix(".npy"))


RUNTIMES = {"openvino": by_openvino, "onnxruntime-web": by_web, "MNN": by_mnn}


def there(runtime: str) -> bool:
    if runtime == "onnxruntime-web":
        return shutil.which("node") is not None and Path(os.environ.get("NODE_PATH", ""), runtime).is_dir()
    return importlib.util.find_spec(runtime) is not None


def main() -> None:
    used, rows = [name for name in RUNTIMES if there(name)], []
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, model, feed) in enumerate(files()):
            path = Path(folder, f"{i}.onnx")
            onnx.save(model, path)
            expected, row = by_onnxruntime(path, feed), [name]
            for runtime in used:
                try:
                    off = np.abs(RUNTIMES[runtime](path, feed).reshape(expected.shape) - expected).max()
                    row.append(f"{off / np.abs(expected).max():.0e}")
                except Exception as error:
                    row.append("no: " + " ".join(str(error).split())[:60])
            rows.append(row)
    print(format_table([f"onnxruntime {onnxruntime.__version__} to", *used], rows))


if __name__ == "__main__":
    main()
