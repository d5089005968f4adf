"""The command line: each command parses, calls one public function and prints what it returned."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nformer_edge import __version__
from nformer_edge.backends.base import get, names
from nformer_edge.core import spec
from nformer_edge.core.errors import Error, UsageError
from nformer_edge.core.values import Result

if TYPE_CHECKING:
    from nformer_edge.backends.spec import EngineSpec
    from nformer_edge.quantize.prepare import CalibrationData

Args = argparse.Namespace
Option = Callable[[argparse._ActionsContainer], object]

#: Which extra brings a package that a command needs.
_EXTRAS = {"torch": "train", "safetensors": "train", "onnx": "train", "onnxscript": "train"}

_COMMANDS: dict[str, tuple[str, tuple[Option, ...], Callable[[Args], None]]] = {}


def _option(*names: str, **settings: Any) -> Option:
    return lambda parser: parser.add_argument(*names, **settings)


def _one_of(*options: Option) -> Option:
    def add(parser: argparse._ActionsContainer) -> None:
        group = parser.add_mutually_exclusive_group(required=True)
        for option in options:
            option(group)

    return add


def _choice(known: Any) -> Callable[[str], str]:
    """An argparse type that refuses a misspelt choice with the nearest spelling."""

    def parse(text: str) -> str:
        try:
            spec.check_choice("choice", text, typing.get_args(known) or tuple(known))
        except UsageError as e:
            raise argparse.ArgumentTypeError(str(e)) from None
        return text

    return parse


def _sizes(text: str) -> tuple[int, ...]:
    """``1:8:32`` for argparse."""
    from nformer_edge.backends.spec import parse_sizes

    try:
        return parse_sizes(text)
    except UsageError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _command(name: str, summary: str, *options: Option) -> Callable[[Callable[[Args], None]], Callable[[Args], None]]:
    def register(function: Callable[[Args], None]) -> Callable[[Args], None]:
        _COMMANDS[name] = (summary, options, function)
        return function

    return register


def _show(args: Args, result: Result | dict[str, Any], text: str | None = None) -> None:
    """The result, as JSON on standard output under --json, as text otherwise; -o keeps the JSON in a file."""
    plain = result.to_json() if isinstance(result, Result) else result
    if getattr(args, "out_json", None):
        from nformer_edge.core.artifact import atomic_write_json

        atomic_write_json(args.out_json, plain)
    print(json.dumps(plain, indent=2) if args.json else str(result) if text is None else text)


MODEL = _option("model", help="checkpoint (.safetensors), bundle or engine")
DATA = _option("--data", required=True, metavar="DIR", help="dataset folder or CSV file (the layout is detected)")
LAYOUT = _option("--layout", default="auto", help="market1501 | dukemtmc | msmt17 | cuhk03-np | folders | csv")
OUT_JSON = _option("-o", "--output", dest="out_json", metavar="FILE", help="write the result as JSON, for `report`")
SEED = _option("--seed", type=int, default=0, help="random seed (default 0)")
BATCH = _option("--batch", type=int, default=32, help="images in one forward pass (default 32)")
THREADS = _option("--threads", type=int, help="CPU threads of one forward pass (default: all)")
DECODERS = _option("--decoders", type=int, help="threads that decode images (default: one per core, at most 8)")
DEVICE = _option("--device", default="cpu", help="cpu, or a CUDA device such as cuda:0 (PyTorch checkpoints only)")
IMGSZ = _option("--imgsz", type=int, nargs=2, metavar=("H", "W"), help="image height and width (default 256 128)")
TOP = _option("--top", type=int, default=10, help="gallery images per query (default 10)")


def _out(what: str, **settings: Any) -> Option:
    return _option("-o", "--output", metavar=what, required=True, **settings)


@_command(
    "make-data",
    "generate a dataset of walking figures in Market-1501's layout",
    _out("DIR"),
    SEED,
    _option("--train-ids", type=int, help="identities to train on"),
    _option("--test-ids", type=int, help="identities to query"),
    _option("--force", action="store_true", help="replace an existing dataset"),
)
def _make_data(args: Args) -> None:
    from nformer_edge.data.generate import GenerateSpec, generate_dataset
    from nformer_edge.data.summary import format_summary, summarize

    sizes = {k: v for k in ("train_ids", "test_ids") if (v := getattr(args, k)) is not None}
    dataset = generate_dataset(args.output, GenerateSpec(seed=args.seed, **sizes), force=args.force)
    _show(args, {"kind": "dataset", "rows": summarize(dataset)}, format_summary(dataset))


@_command("summary", "identities, images and cameras of a dataset, as papers print them", DATA, LAYOUT)
def _summary(args: Args) -> None:
    from nformer_edge.data.readers import read_dataset
    from nformer_edge.data.summary import format_summary, summarize

    dataset = read_dataset(args.data, args.layout)
    _show(args, {"kind": "dataset", "rows": summarize(dataset)}, format_summary(dataset))


@_command(
    "train",
    "train the backbone on images, then the NFormer head on its features; or the head alone on a feature store",
    _one_of(
        _option("--data", metavar="DIR", help="dataset folder or CSV file (the layout is detected)"),
        _option("--features", metavar="STORE.npz", help="train the head alone, on features that `embed` wrote"),
    ),
    LAYOUT,
    _out("FILE.safetensors"),
    IMGSZ,
    DEVICE,
    _option("--seed", type=int, help="random seed (default 0)"),
    _option("--backbone", metavar="CHECKPOINT", help="with --features: their backbone, to put into the checkpoint"),
    _option("--resume", action="store_true", help="continue an interrupted run of this training"),
    _option("--preset", choices=("published", "demo"), default="published", help="configuration to start from"),
    _option("--config", metavar="FILE.toml", help="configuration file; flags override it"),
    _option("--arch", type=_choice(spec.TRUNKS), metavar="NAME", help="resnet50, osnet_x0_25 ..."),
    _option("--epochs", type=int, help="epochs of stage one"),
    _option("--head-epochs", type=int, help="epochs of stage two"),
    _option("--no-head", action="store_true", help="train the backbone alone"),
    _option("--initial", metavar="CHECKPOINT", help="start from the backbone of this checkpoint"),
    _option("--rule", type=_choice(spec.NeighborRule), metavar="RULE", help="neighbor rule: features | affinity"),
    _option("--k", type=int, help="neighbors per image"),
    _option("--landmarks", type=int, help="landmark images per layer"),
    _option("--layers", type=int, help="layers of the head"),
    _option("--heads", type=int, help="attention heads"),
    _option("--holdout", type=float, metavar="SHARE", help="share of the training identities held out for validation"),
    _option("--precision", metavar="NAME", help="fp32 | bf16 | fp16 (GPU) | fp64 (default fp32)"),
    _option("--accumulate", type=int, metavar="N", help="accumulate the gradients of N batches for one step"),
    _option("--deterministic", action="store_true", default=None, help="allow only deterministic operations"),
    _option("--tensorboard", metavar="DIR", help="write event files for TensorBoard"),
)
def _train(args: Args) -> None:
    from nformer_edge.training.config import configure
    from nformer_edge.training.stored import train_from_features
    from nformer_edge.training.train import train

    config = configure(
        args.config or args.preset,
        initial=args.initial,
        seed=args.seed,
        arch=args.arch,
        imgsz=args.imgsz,
        epochs=args.epochs,
        head_epochs=args.head_epochs,
        with_head=not args.no_head,
        rule=args.rule,
        k=args.k,
        landmarks=args.landmarks,
        layers=args.layers,
        heads=args.heads,
        holdout=args.holdout,
        precision=args.precision,
        accumulate=args.accumulate,
        deterministic=args.deterministic,
    )
    how = {"device": args.device, "resume": args.resume, "tensorboard": args.tensorboard}
    if args.features:
        history = train_from_features(args.features, args.output, config, backbone=args.backbone, **how)
    else:
        history = train(args.data, args.output, config, layout=args.layout, initial=args.initial, **how)
    if os.environ.get("RANK", "0") == "0":  # torchrun starts this command once a rank
        _show(args, history)


@_command(
    "import",
    "published weights -> checkpoint, with a report of what matched",
    _option(
        "weights",
        metavar="FILE",
        help="OSNet (torchreid), ResNet (torchvision), reid-strong-baseline, NFormer or"
        " FastReID BoT; no code in it is run",
    ),
    _out("FILE.safetensors"),
    IMGSZ,
    _option("--arch", type=_choice(spec.TRUNKS), metavar="NAME", help="expected architecture (default: any known one)"),
    _option("--features", type=int, help="replace the file's neck by an untrained projection to this many features"),
    _option("--stem", type=_choice(spec.Stem), metavar="NAME", help="stem of a ResNet: standard | no_relu | ceil_pool"),
    _option("--heads", type=int, help="attention heads of an NFormer (default 2)"),
    _option("--k", type=int, help="neighbors of an NFormer (default 20)"),
    _option("--landmarks", type=int, help="landmarks of an NFormer (default 5)"),
    _option("--partial", "--allow-partial", action="store_true", help="accept missing or unused tensors"),
)
def _import(args: Args) -> None:
    from nformer_edge.model.weights import format_import, import_checkpoint

    result = import_checkpoint(
        args.weights,
        args.output,
        arch=args.arch,
        imgsz=args.imgsz,
        partial=args.partial,
        stem=args.stem,
        features=args.features,
        head={name: v for name in ("heads", "k", "landmarks") if (v := getattr(args, name)) is not None},
    )
    _show(args, result, format_import(result))


@_command(
    "evaluate",
    "mAP, mINP and CMC of a checkpoint, bundle or engine; the head under both query protocols",
    MODEL,
    DATA,
    LAYOUT,
    BATCH,
    THREADS,
    OUT_JSON,
    _option("--seed", type=int, nargs="+", help="landmark seeds, one evaluation each (default: the model's own)"),
    _option("--rerank", action="store_true", help="add k-reciprocal re-ranking (20/6/0.3) and other baselines"),
)
def _evaluate(args: Args) -> None:
    from nformer_edge.report.accuracy import evaluate

    result = evaluate(
        args.model,
        args.data,
        batch=args.batch,
        rerank=args.rerank,
        seeds=args.seed,
        intra_op_threads=args.threads,
        layout=args.layout,
    )
    _show(args, result)


@_command(
    "export",
    "checkpoint -> bundle: backbone.onnx, nformer.onnx and a manifest",
    _option("checkpoint"),
    _out("DIR"),
    _option("--seed", type=int, default=0, help="landmark seed written into the manifest (default 0)"),
    _option("--opset", type=int, default=18, help="ONNX opset, 18 to 20 (default 18)"),
)
def _export(args: Args) -> None:
    from nformer_edge.exporting.export import export_bundle

    bundle = export_bundle(args.checkpoint, args.output, opset=args.opset, landmark_seed=args.seed)
    _show(args, {"kind": "export", "bundle": str(bundle)}, f"wrote {bundle}")


@_command(
    "modelopt",
    "bundle -> bundle with a backbone quantized by NVIDIA ModelOpt to INT8 or FP16, for TensorRT",
    _option("bundle"),
    _out("DIR"),
    _option("--fp16", action="store_const", const="fp16", dest="precision", default="int8", help="half precision"),
    _option("--int8", action="store_const", const="int8", dest="precision", help="8-bit integers (default)"),
    _option("--calib-data", required=True, metavar="DIR", help="dataset with training images for calibration"),
    _option("--calib-num", type=int, default=256, help="calibration images (default 256)"),
    _option("--calib-method", choices=("minmax", "entropy"), default="entropy", help="for INT8 (default entropy)"),
    _option("--force-calib", action="store_true", help="accept query or gallery images for calibration"),
    _option("--own-choice", action="store_true", help="let ModelOpt alone choose the nodes that stay in float"),
    SEED,
)
def _modelopt(args: Args) -> None:
    from nformer_edge.quantize.modelopt import bundle_by_modelopt, describe_bundle

    bundle = bundle_by_modelopt(
        args.bundle,
        args.output,
        args.calib_data,
        precision=args.precision,
        calib_num=args.calib_num,
        calib_method=args.calib_method,
        seed=args.seed,
        own_choice=args.own_choice,
        force_calibration=args.force_calib,
    )
    _show(args, describe_bundle(bundle))


PRECISION = (
    _option("--precision", type=_choice(spec.Precision), metavar="P", help="of the backbone: fp32 | fp16 | int8"),
    _option("--fp16", action="store_const", const="fp16", dest="precision", help="short for --precision fp16"),
    _option(
        "--int8",
        action="store_const",
        const="int8",
        dest="precision",
        help="short for --precision int8; needs --calib-data",
    ),
)

CALIBRATION = (
    _option("--calib-data", metavar="DIR", help="dataset with training images for calibration, or calibration.json"),
    _option("--calib-num", type=int, help="calibration images (default 256)"),
    _option(
        "--calib-method",
        type=_choice(spec.CalibrationChoice),
        metavar="NAME",
        help="minmax | entropy | percentile (default) | mse | auto: the one that ranks held-out people best",
    ),
    _option("--force-calib", action="store_true", help="accept query or gallery images for calibration"),
    _option(
        "--max-map-drop",
        type=float,
        metavar="POINTS",
        help="with --int8: keep the most sensitive nodes in float until held-out people lose at most this much mAP",
    ),
    _option(
        "--min-overlap",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="the same until overlap@10 (ten nearest images, INT8 and FP32) is at least this",
    ),
    _option("--budget-images", type=int, default=600, help="images of held-out people to measure with (default 600)"),
    _option(
        "--budget-scope",
        choices=("auto", "backbone", "end_to_end"),
        default="auto",
        help="part that the budget is for (default: end_to_end where there is a head)",
    ),
    _option("--budget-data", metavar="DIR", help="dataset to take held-out people from (default: --calib-data)"),
    _option(
        "--exclude-nodes",
        nargs="+",
        metavar="NAME",
        help="nodes that stay in float: names, a file of names, or the budget.json of another engine",
    ),
    _option("--seed", type=int, help="random seed (default 0)"),
)


def _engine_spec(args: Args) -> EngineSpec:
    """What was asked for; what was not is None."""
    from nformer_edge.backends.spec import EngineSpec
    from nformer_edge.quantize.spec import read_exclude

    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(EngineSpec)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if given["exclude_nodes"] is not None:
        given["exclude_nodes"] = read_exclude(given["exclude_nodes"])
    return EngineSpec(**given)


def _calibration_data(args: Args) -> CalibrationData:
    from nformer_edge.quantize.prepare import CalibrationData
    from nformer_edge.quantize.spec import BudgetSpec

    budget = None
    if args.max_map_drop is not None or args.min_overlap:
        budget = BudgetSpec(args.max_map_drop, args.min_overlap, args.budget_images, args.budget_scope)
    return CalibrationData(args.calib_data, args.force_calib, budget, args.budget_data)


@_command(
    "build-engine",
    "bundle -> engine for one backend and precision",
    _option("bundle"),
    _option("-o", "--output", metavar="DIR", help="default: a name made of model, size and precision"),
    _option("--target", metavar="NAME", help="build by a recipe, such as jetson-orin-jp62; flags override it"),
    _option("--backend", metavar="NAME", help="onnxruntime | tensorrt | tensorrt-rtx (default: the best here)"),
    *PRECISION,
    *CALIBRATION,
    _option("--batch", type=_sizes, metavar="MIN:OPT:MAX", help="batch of the backbone (TensorRT; default 1:8:32)"),
    _option(
        "--gallery-size",
        type=_sizes,
        metavar="MIN:OPT:MAX",
        help="images in one pass of the head (TensorRT; default 20:2000:50000)",
    ),
    _option("--workspace", type=float, help="memory for the builder, in GiB (TensorRT)"),
    _option("--timing-cache", metavar="FILE", help="kernel timings, read and updated (TensorRT)"),
    _option(
        "--hardware-compat",
        choices=("none", "same_compute_capability", "ampere_plus"),
        help="build a plan that runs on more GPUs, but slower (TensorRT)",
    ),
    _option(
        "--version-compat", action="store_true", default=None, help="the plan also runs on later versions (TensorRT)"
    ),
    _option("--dla", type=int, metavar="CORE", help="run the backbone on a Jetson's DLA"),
    _option(
        "--keep-graphs", action="store_true", default=None, help="keep the parsed ONNX files in the engine (TensorRT)"
    ),
    _option("--capabilities", nargs="+", metavar="C", help="compute capabilities, such as 8.9 (RTX)"),
    _option("--device", help="the GPU to build on, such as cuda:0 (TensorRT)"),
)
def _build_engine(args: Args) -> None:
    from nformer_edge.backends.build import describe_engine
    from nformer_edge.targets.build import build_for_target

    asked, data = _engine_spec(args), _calibration_data(args)
    _show(args, describe_engine(build_for_target(args.bundle, args.output, asked, data, target=args.target)))


@_command(
    "prepare",
    "bundle -> graphs and trtexec commands, for devices with TensorRT 8 and Python below 3.10 (JetPack 5.1)",
    _option("bundle"),
    _out("DIR"),
    _option("--target", metavar="NAME", default="jetson-xavier-jp51", help="recipe (default jetson-xavier-jp51)"),
    *PRECISION,
    *CALIBRATION,
)
def _prepare(args: Args) -> None:
    from nformer_edge.targets.trtexec import prepare_for_target

    graphs = prepare_for_target(args.bundle, args.output, args.target, _engine_spec(args), _calibration_data(args))
    _show(args, graphs)


def _assignments(pairs: Sequence[str] | None) -> dict[str, float]:
    """``name=number`` as it stands on the command line, to a table."""
    table = {}
    for pair in pairs or ():
        name, _, value = pair.partition("=")
        try:
            table[name] = float(value) if "." in value else int(value)
        except ValueError:
            raise UsageError("augment", pair, "name=number", "Such as pad=10 erase=0.5.") from None
    return table


@_command(
    "build-plugin",
    "compile the two operators as a plugin library for TensorRT, on the machine that will run it",
    _option("-o", "--output", metavar="DIR", help="default: the folder where engines look for it"),
    _option("--tensorrt-root", metavar="DIR", help="unpacked tarball (default: headers of JetPack or apt)"),
    _option("--nvcc", metavar="FILE", help="CUDA compiler (default: from PATH, or /usr/local/cuda)"),
    _option("--arch", default="auto", help="auto (this machine's GPU) | all | a list such as 87,89 (default auto)"),
)
def _build_plugin(args: Args) -> None:
    from nformer_edge.backends.tensorrt.plugin.build import build_plugin

    built = build_plugin(args.output, tensorrt_root=args.tensorrt_root, nvcc=args.nvcc, architectures=args.arch)
    _show(args, built)


@_command(
    "embed",
    "images -> feature store (.npz)",
    MODEL,
    _option("--data", required=True, metavar="DIR", help="dataset, or a folder of images"),
    LAYOUT,
    _out("FILE.npz"),
    BATCH,
    DECODERS,
    THREADS,
    SEED,
    _option("--splits", nargs="+", metavar="SPLIT", help="train query gallery junk (default: the first three)"),
    _option("--views", type=int, default=1, help="views of each training image: one plain, the rest augmented"),
    _option("--augment", nargs="+", metavar="NAME=X", help="flip, pad, erase (default flip=0.5 pad=10 erase=0.5)"),
)
def _embed(args: Args) -> None:
    from nformer_edge.gallery.embed import embed_files

    result = embed_files(
        args.model,
        args.data,
        args.output,
        batch=args.batch,
        decoders=args.decoders,
        intra_op_threads=args.threads,
        layout=args.layout,
        splits=args.splits,
        views=args.views,
        augment=_assignments(args.augment),
        seed=args.seed,
    )
    _show(args, result)


@_command(
    "search",
    "query images -> ranked gallery images",
    MODEL,
    _option("--query", required=True, nargs="+", metavar="IMAGE", help="images of the people to find"),
    _option("--gallery", required=True, metavar="DIR", help="folder of images, dataset, or feature store"),
    TOP,
    BATCH,
    DECODERS,
    THREADS,
    OUT_JSON,
    _option("--no-head", action="store_true", help="rank by the backbone alone"),
    _option("--together", action="store_true", help="all queries in one pass of the head; they then affect each other"),
)
def _search(args: Args) -> None:
    from nformer_edge.gallery.model import search

    result = search(
        args.model,
        args.query,
        args.gallery,
        top=args.top,
        batch=args.batch,
        decoders=args.decoders,
        intra_op_threads=args.threads,
        head=not args.no_head,
        together=args.together,
    )
    _show(args, result)


@_command(
    "parity",
    "compare the ranking of an engine with its reference; exit code 1 if a gate fails",
    _option("reference", help="usually the checkpoint"),
    _option("engine"),
    DATA,
    LAYOUT,
    BATCH,
    THREADS,
    OUT_JSON,
    _option("--limit", type=int, help="use at most this many query and gallery images"),
    _option(
        "--landmark-seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="landmark seeds to test the head with; the worst result counts (default: the engine's own and two more)",
    ),
    _option(
        "--layers",
        action="store_true",
        help="compare the ONNX graphs node by node and print the table (a part that fails is always compared)",
    ),
)
def _parity(args: Args) -> None:
    from nformer_edge.report.parity import parity

    result = parity(
        args.reference,
        args.engine,
        args.data,
        batch=args.batch,
        intra_op_threads=args.threads,
        layout=args.layout,
        limit=args.limit,
        landmark_seeds=args.landmark_seeds,
        layers=args.layers,
    )
    tables = [str(found) for found in result.layers if found.nodes] if args.layers else []
    _show(args, result, "\n".join([str(result), *tables]))
    result.require_passed()


@_command(
    "fleet",
    "queries of one model against a gallery of another: accuracy and threshold of every pairing",
    _option("models", nargs="+", metavar="model", help="models or feature stores; the first is the reference"),
    _option("--data", metavar="DIR", help="dataset folder or CSV file; not needed for feature stores alone"),
    LAYOUT,
    BATCH,
    THREADS,
    OUT_JSON,
    _option(
        "--false-match-rate",
        type=float,
        default=0.001,
        metavar="SHARE",
        help="share of pairs of different people that the threshold may accept (default 0.001)",
    ),
)
def _fleet(args: Args) -> None:
    from nformer_edge.report.cross_model import cross_model

    result = cross_model(
        args.models,
        args.data,
        false_match_rate=args.false_match_rate,
        batch=args.batch,
        intra_op_threads=args.threads,
        layout=args.layout,
    )
    _show(args, result)


@_command(
    "benchmark",
    "latency and throughput by MLPerf's rules; several models are timed alternately",
    _option("models", nargs="+", metavar="model"),
    DATA,
    LAYOUT,
    BATCH,
    THREADS,
    OUT_JSON,
    _option("--single-stream", type=int, default=130, metavar="N", help="queries of one image (default 130)"),
    _option("--multi-stream", type=int, default=0, metavar="N", help="queries of eight images; valid from 662 on"),
    _option("--offline", type=int, default=0, metavar="N", help="images of one large query"),
    _option("--gallery", type=int, default=500, help="gallery images searched (default 500)"),
)
def _benchmark(args: Args) -> None:
    from nformer_edge.report.benchmark import benchmark, compare

    shared = {"gallery": args.gallery, "intra_op_threads": args.threads, "layout": args.layout}
    if len(args.models) > 1:
        return _show(args, compare(args.models, args.data, rounds=args.single_stream, **shared))
    counts = {"single_stream": args.single_stream, "multi_stream": args.multi_stream, "offline": args.offline}
    return _show(args, benchmark(args.models[0], args.data, batch=args.batch, **counts, **shared))


@_command(
    "report",
    "results in JSON -> one self-contained HTML page",
    _option("results", nargs="+", metavar="FILE.json"),
    _out("FILE.html"),
)
def _report(args: Args) -> None:
    from nformer_edge.report.html.page import write_report

    page = write_report(args.results, args.output)
    _show(args, {"kind": "report", "page": str(page)}, f"wrote {page}")


@_command(
    "doctor",
    "what this machine can do, and how to install what is missing",
    _option("--target", metavar="NAME", help="list what does not match this target, such as jetson-orin-jp62"),
)
def _doctor(args: Args) -> None:
    from nformer_edge.targets.doctor import doctor

    _show(args, doctor(args.target))


@_command(
    "demo",
    "the whole workflow: generate images, train, export, INT8, parity, benchmark, report",
    _option("-o", "--output", metavar="DIR", default="demo", help="output folder (default demo)"),
    SEED,
    _option("--tiny", action="store_true", help="the same workflow in a minute; its accuracy means nothing"),
)
def _demo(args: Args) -> None:
    from nformer_edge.demo import run_demo

    result = run_demo(args.output, seed=args.seed, tiny=args.tiny, say=(lambda _: None) if args.json else print)
    _show(args, result)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nformer-edge",
        description="Person re-identification with NFormer: train, export, build an engine, check it.",
        epilog="`nformer-edge COMMAND --help` shows a command's flags; `nformer-edge demo` runs the whole workflow.",
    )
    parser.add_argument("--version", action="version", version=f"nformer-edge {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, options, function) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        for option in options:
            option(command)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.add_argument("--verbose", action="store_true", help="on an error, print the traceback")
        command.set_defaults(function=function)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0 done, 1 a gate failed, 2 bad input, 130 interrupted.
    """
    args = parser().parse_args(argv)
    try:
        args.function(args)
    except Error as e:
        return _fail(args, str(e), e.exit_code)
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        extra = get(package).EXTRA if package in names() else _EXTRAS.get(package)
        if extra is None:
            raise
        return _fail(args, f"{args.command}: got no {e.name}. Install it: pip install 'nformer-edge[{extra}]'", 2)
    except KeyboardInterrupt:
        again = "run the command again" + (", with --resume to continue" if hasattr(args, "resume") else "")
        return _fail(args, f"interrupted. No half-written file was left; {again}.", 130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:
        return _fail(args, f"{e.filename or args.command}: got {e.strerror or e}. Check the path and the disk.", 2)
    return 0


def _fail(args: Args, message: str, code: int) -> int:
    if args.verbose:
        traceback.print_exc()
    print(f"nformer-edge {args.command}: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
