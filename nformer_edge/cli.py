"""The command line: each command parses, calls one public function and prints what it returned."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from typing import Any

from nformer_edge import __version__
from nformer_edge.core import spec
from nformer_edge.core.errors import Error, UsageError
from nformer_edge.core.terminal import inert
from nformer_edge.core.values import Result

Args = argparse.Namespace
Option = Callable[[argparse._ActionsContainer], object]

#: Which extra brings a package that a command needs.
_EXTRAS = {"torch": "train", "safetensors": "train", "onnx": "train", "onnxscript": "train", "onnxruntime": "cpu"}

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
    from nformer_edge.quantize.spec import parse_sizes

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
    print(json.dumps(plain, indent=2) if args.json else inert(str(result) if text is None else text))


MODEL = _option("model", help="checkpoint (.safetensors), bundle or engine")
DATA = _option("--data", required=True, metavar="DIR", help="dataset folder or CSV file (layout found by itself)")
LAYOUT = _option("--layout", default="auto", help="market1501 | dukemtmc | msmt17 | cuhk03-np | folders | csv")
OUT_JSON = _option("-o", "--output", dest="out_json", metavar="FILE", help="keep the result as JSON, for `report`")
SEED = _option("--seed", type=int, default=0, help="everything random follows from it (default 0)")
BATCH = _option("--batch", type=int, default=32, help="images in one forward pass (default 32)")
THREADS = _option("--threads", type=int, help="CPU threads of one forward pass (default: all)")
DECODERS = _option("--decoders", type=int, help="threads that decode images (default: one a core, at most 8)")
DEVICE = _option("--device", default="cpu", help="cpu, or a CUDA device such as cuda:0 (PyTorch checkpoints only)")
IMGSZ = _option("--imgsz", type=int, nargs=2, metavar=("H", "W"), help="image height and width (default 256 128)")
TOP = _option("--top", type=int, default=10, help="gallery images a query (default 10)")


def _out(what: str, **settings: Any) -> Option:
    return _option("-o", "--output", metavar=what, required=True, **settings)


@_command(
    "make-data",
    "draw a dataset of walking figures in Market-1501's layout",
    _out("DIR"),
    SEED,
    _option("--train-ids", type=int, help="identities to train on"),
    _option("--test-ids", type=int, help="identities to query"),
    _option("--force", action="store_true", help="replace a dataset that stands there"),
)
def _make_data(args: Args) -> None:
    from nformer_edge.data.generate import GenerateSpec, generate_dataset
    from nformer_edge.data.summary import format_summary, summarize

    sizes = {k: v for k in ("train_ids", "test_ids") if (v := getattr(args, k)) is not None}
    dataset = generate_dataset(args.output, GenerateSpec(seed=args.seed, **sizes), force=args.force)
    _show(args, {"kind": "dataset", "rows": summarize(dataset)}, format_summary(dataset))


@_command("summary", "identities, images and cameras of a dataset, as the papers print them", DATA, LAYOUT)
def _summary(args: Args) -> None:
    from nformer_edge.data.readers import read_dataset
    from nformer_edge.data.summary import format_summary, summarize

    dataset = read_dataset(args.data, args.layout)
    _show(args, {"kind": "dataset", "rows": summarize(dataset)}, format_summary(dataset))


@_command(
    "train",
    "both stages: backbone on images, then the NFormer head on its features; or the head alone on a store",
    _one_of(
        _option("--data", metavar="DIR", help="dataset folder or CSV file (layout found by itself)"),
        _option("--features", metavar="STORE.npz", help="train the head alone, on what `embed` wrote"),
    ),
    LAYOUT,
    _out("FILE.safetensors"),
    IMGSZ,
    DEVICE,
    _option("--seed", type=int, help="everything random follows from it (default 0)"),
    _option("--backbone", metavar="CHECKPOINT", help="with --features: what made them; goes into the checkpoint"),
    _option("--resume", action="store_true", help="go on from where an interrupted run of this training was"),
    _option("--preset", choices=("published", "demo"), default="published", help="where the configuration starts"),
    _option("--config", metavar="FILE.toml", help="configuration file; flags win over it"),
    _option("--arch", type=_choice(spec.TRUNKS), metavar="NAME", help="resnet50, osnet_x0_25 ..."),
    _option("--epochs", type=int, help="epochs of stage one"),
    _option("--head-epochs", type=int, help="epochs of stage two"),
    _option("--no-head", action="store_true", help="train the backbone alone"),
    _option("--initial", metavar="CHECKPOINT", help="start from this checkpoint's backbone, such as `import` wrote"),
    _option("--rule", type=_choice(spec.NeighborRule), metavar="RULE", help="neighbors by features | affinity"),
    _option("--k", type=int, help="neighbors an image"),
    _option("--landmarks", type=int, help="landmark images a layer"),
    _option("--layers", type=int, help="layers of the head"),
    _option("--heads", type=int, help="attention heads"),
    _option("--holdout", type=float, metavar="SHARE", help="share of the identities to watch by, not to train on"),
    _option("--precision", metavar="NAME", help="fp32 | bf16 | fp16 (GPU) | fp64 (default fp32)"),
    _option("--accumulate", type=int, metavar="N", help="batches whose gradients make one step"),
    _option("--deterministic", action="store_true", default=None, help="refuse operations that may differ by a bit"),
    _option("--tensorboard", metavar="DIR", help="event files for TensorBoard"),
)
def _train(args: Args) -> None:
    from nformer_edge.training.config import configure
    from nformer_edge.training.stored import train_from_features
    from nformer_edge.training.train import format_history, train

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
        _show(args, history, format_history(history))


@_command(
    "import",
    "published weights -> checkpoint, saying what matched",
    _option(
        "weights",
        metavar="FILE",
        help="OSNet (torchreid), ResNet (torchvision), reid-strong-baseline, NFormer or"
        " FastReID BoT; nothing in it is run",
    ),
    _out("FILE.safetensors"),
    IMGSZ,
    _option("--arch", type=_choice(spec.TRUNKS), metavar="NAME", help="what it must hold (default: whatever it does)"),
    _option("--features", type=int, help="put a projection to so many features in place of the file's neck"),
    _option("--stem", type=_choice(spec.Stem), metavar="NAME", help="standard | no_relu | ceil_pool, of a ResNet"),
    _option("--heads", type=int, help="attention heads, of an NFormer (default 2)"),
    _option("--k", type=int, help="neighbors, of an NFormer (default 20)"),
    _option("--landmarks", type=int, help="landmarks, of an NFormer (default 5)"),
    _option("--partial", "--allow-partial", action="store_true", help="accept missing or left-over tensors"),
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
    "mAP, mINP and CMC of a checkpoint, bundle or engine; of the head by both query protocols",
    MODEL,
    DATA,
    LAYOUT,
    BATCH,
    THREADS,
    OUT_JSON,
    _option("--seed", type=int, nargs="+", help="landmark seeds, each one pass (default: the model's own)"),
    _option("--rerank", action="store_true", help="k-reciprocal re-ranking (20/6/0.3) and other baselines beside it"),
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
    _option("--seed", type=int, default=0, help="landmark seed that stands in the manifest (default 0)"),
    _option("--opset", type=int, default=18, help="ONNX opset, 18 to 20 (default 18)"),
)
def _export(args: Args) -> None:
    from nformer_edge.exporting.export import export_bundle

    bundle = export_bundle(args.checkpoint, args.output, opset=args.opset, landmark_seed=args.seed)
    _show(args, {"kind": "export", "bundle": str(bundle)}, f"wrote {bundle}")


@_command(
    "modelopt",
    "bundle -> bundle whose backbone NVIDIA ModelOpt has quantized or halved, for TensorRT",
    _option("bundle"),
    _out("DIR"),
    _option("--fp16", action="store_const", const="fp16", dest="precision", default="int8", help="half precision"),
    _option("--int8", action="store_const", const="int8", dest="precision", help="8-bit integers (default)"),
    _option("--calib-data", required=True, metavar="DIR", help="dataset whose training images calibrate"),
    _option("--calib-num", type=int, default=256, help="calibration images (default 256)"),
    _option("--calib-method", choices=("minmax", "entropy"), default="entropy", help="for INT8 (default entropy)"),
    _option("--force-calib", action="store_true", help="accept query or gallery images for calibration"),
    _option("--own-choice", action="store_true", help="ModelOpt alone decides which nodes to leave out"),
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
    result = describe_bundle(bundle)
    _show(args, result, result["summary"])


@_command(
    "build-engine",
    "bundle -> engine for one backend and precision",
    _option("bundle"),
    _option("-o", "--output", metavar="DIR", help="default: named after model, size and precision"),
    _option("--target", metavar="NAME", help="build by a recipe, such as jetson-orin-jp62; flags win over it"),
    _option("--backend", type=_choice(spec.Backend), default="auto", metavar="NAME", help="onnxruntime | tensorrt ..."),
    _option("--fp16", action="store_const", const="fp16", dest="precision", default="fp32", help="half precision"),
    _option("--int8", action="store_const", const="int8", dest="precision", help="8-bit integers; needs --calib-data"),
    _option("--calib-data", metavar="DIR", help="dataset whose training images calibrate, or a calibration.json"),
    _option("--calib-num", type=int, default=256, help="calibration images (default 256)"),
    _option(
        "--calib-method",
        type=_choice(spec.CalibrationChoice),
        default="percentile",
        metavar="NAME",
        help="minmax | entropy | percentile | mse; auto keeps what ranks held-out training people best",
    ),
    _option("--force-calib", action="store_true", help="accept query or gallery images for calibration"),
    _option(
        "--max-map-drop",
        type=float,
        metavar="POINTS",
        help="with --int8: leave in float what costs most, until held-out people lose no more mAP than this",
    ),
    _option(
        "--min-overlap",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="likewise, until so many of each image's ten nearest are kept",
    ),
    _option("--budget-images", type=int, default=600, help="images of held-out people to measure by (default 600)"),
    _option(
        "--budget-stage",
        choices=("auto", "backbone", "end_to_end"),
        default="auto",
        help="whose mAP counts (default: with the head where there is one)",
    ),
    _option("--budget-data", metavar="DIR", help="dataset to hold people out of (default: --calib-data)"),
    _option(
        "--exclude-nodes",
        nargs="+",
        default=(),
        metavar="NAME",
        help="nodes to leave in float: names, a file of names, or the budget.json of another engine",
    ),
    _option(
        "--batch",
        type=_sizes,
        default=(1, 8, 32),
        metavar="A:B:C",
        help="images the backbone sees at once: fewest, tuned for, most (TensorRT; default 1:8:32)",
    ),
    _option(
        "--gallery-size",
        type=_sizes,
        default=(20, 2000, 50000),
        metavar="A:B:C",
        help="images the head sees together, likewise (TensorRT; default 20:2000:50000)",
    ),
    _option("--workspace", type=float, help="GiB the builder may use (TensorRT)"),
    _option("--timing-cache", default="", metavar="FILE", help="kernels measured before, kept for the next build"),
    _option(
        "--hardware-compat",
        choices=("none", "same_compute_capability", "ampere_plus"),
        default="none",
        help="the plan runs on more GPUs, and slower (TensorRT)",
    ),
    _option("--version-compat", action="store_true", help="the plan runs on later versions too (TensorRT)"),
    _option("--dla", type=int, metavar="CORE", help="run the backbone on a Jetson's DLA"),
    _option("--keep-graphs", action="store_true", help="leave the parsed ONNX files in the engine (TensorRT)"),
    _option("--capabilities", nargs="+", default=(), metavar="C", help="compute capabilities, such as 8.9 (RTX)"),
    SEED,
    _option("--device", help="the GPU to build on, such as cuda:1 (TensorRT; default: the first)"),
)
def _build_engine(args: Args) -> None:
    from nformer_edge.backends.build import BudgetSpec, EngineSpec, build_engine, describe_engine
    from nformer_edge.quantize.exclude import read_exclude
    from nformer_edge.targets.build import build_for_target

    chosen = EngineSpec(
        backend=args.backend,
        precision=args.precision,
        calib_method=args.calib_method,
        calib_num=args.calib_num,
        batch=args.batch,
        gallery_size=args.gallery_size,
        workspace=args.workspace,
        device=args.device,
        seed=args.seed,
        timing_cache=args.timing_cache,
        hardware_compat=args.hardware_compat,
        version_compat=args.version_compat,
        dla=args.dla,
        capabilities=tuple(args.capabilities),
        verbose=args.verbose,
        keep_graphs=args.keep_graphs,
        exclude_nodes=read_exclude(args.exclude_nodes),
    )
    budget = None
    if args.max_map_drop is not None or args.min_overlap:
        budget = BudgetSpec(args.max_map_drop, args.min_overlap, args.budget_images, args.budget_stage)
    images = {
        "calib_data": args.calib_data,
        "force_calibration": args.force_calib,
        "budget": budget,
        "budget_data": args.budget_data,
    }
    if args.target:
        engine = build_for_target(args.bundle, args.output, chosen, target=args.target, **images)
    else:
        engine = build_engine(args.bundle, args.output, chosen, **images)
    result = describe_engine(engine)
    _show(args, result, result["summary"])


@_command(
    "prepare",
    "bundle -> graphs and trtexec's commands, for a TensorRT 8 that our Python does not reach (JetPack 5.1)",
    _option("bundle"),
    _out("DIR"),
    _option("--target", metavar="NAME", default="jetson-xavier-jp51", help="recipe (default jetson-xavier-jp51)"),
    _option("--fp16", action="store_const", const="fp16", dest="precision", default="fp32", help="half precision"),
    _option("--calib-data", metavar="DIR", help="dataset whose training images calibrate, or a calibration.json"),
    _option("--calib-num", type=int, default=256, help="calibration images (default 256)"),
    _option("--force-calib", action="store_true", help="accept query or gallery images for calibration"),
    SEED,
)
def _prepare(args: Args) -> None:
    from nformer_edge.quantize.spec import EngineSpec
    from nformer_edge.targets.trtexec import prepare_for_target

    chosen = EngineSpec(precision=args.precision, calib_num=args.calib_num, seed=args.seed)
    images = {"calib_data": args.calib_data, "force_calibration": args.force_calib}
    graphs = prepare_for_target(args.bundle, args.output, args.target, chosen, **images)
    _show(args, {"kind": "graphs", "graphs": str(graphs)}, f"wrote {graphs}; on the device: {graphs}/build.sh")


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
    _option("-o", "--output", metavar="DIR", help="default: where engines look for it"),
    _option("--tensorrt-root", metavar="DIR", help="unpacked tarball (default: JetPack's or apt's headers)"),
    _option("--nvcc", metavar="FILE", help="CUDA compiler (default: the one on the PATH, or /usr/local/cuda's)"),
    _option("--arch", default="auto", help="auto: this machine's GPU | all | such as 87,89 (default auto)"),
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
    _option("--views", type=int, default=1, help="views of each training image: one plain, the others augmented"),
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
    "query images -> ranked gallery",
    MODEL,
    _option("--query", required=True, nargs="+", metavar="IMAGE", help="images of the people looked for"),
    _option("--gallery", required=True, metavar="DIR", help="folder of images, dataset, or feature store"),
    TOP,
    BATCH,
    DECODERS,
    THREADS,
    OUT_JSON,
    _option("--no-head", action="store_true", help="rank by the backbone alone"),
    _option("--together", action="store_true", help="one pass of the head for all queries: matches depend on them all"),
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
    "does an engine rank as its reference does? exit code 1 if a gate fails",
    _option("reference", help="as a rule the checkpoint"),
    _option("engine"),
    DATA,
    LAYOUT,
    BATCH,
    THREADS,
    OUT_JSON,
    _option("--limit", type=int, help="only so many query and gallery images"),
    _option(
        "--landmark-seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="seeds that the head is judged under, the worst decides (default: the engine's own and two more)",
    ),
    _option(
        "--layers",
        action="store_true",
        help="compare the ONNX graphs node by node and show the table (a stage that fails always is)",
    ),
)
def _parity(args: Args) -> None:
    from nformer_edge.report.parity import parity
    from nformer_edge.report.verdict import format_parity, require_passed

    result = parity(
        args.reference,
        args.engine,
        args.data,
        batch=args.batch,
        threads=args.threads,
        layout=args.layout,
        limit=args.limit,
        landmark_seeds=args.landmark_seeds,
        layers=args.layers,
    )
    _show(args, result, format_parity(result, args.layers))
    require_passed(result)


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
        help="pairs of different people that the threshold may accept (default 0.001)",
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
    "latency and throughput by MLPerf's conventions; several models are timed in turn",
    _option("models", nargs="+", metavar="model"),
    DATA,
    LAYOUT,
    BATCH,
    THREADS,
    OUT_JSON,
    _option("--single-stream", type=int, default=130, metavar="N", help="queries of one image (default 130)"),
    _option("--multi-stream", type=int, default=0, metavar="N", help="queries of eight images; 662 make a valid run"),
    _option("--offline", type=int, default=0, metavar="N", help="images of one big query"),
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
    "what this machine can do, and the next step for what is missing",
    _option("--target", metavar="NAME", help="what here does not match this target, such as jetson-orin-jp62"),
)
def _doctor(args: Args) -> None:
    from nformer_edge.targets.doctor import doctor

    _show(args, doctor(args.target))


@_command(
    "demo",
    "the main job: draw people, train, export, INT8, parity, benchmark, report",
    _option("-o", "--output", metavar="DIR", default="demo", help="folder for everything made (default demo)"),
    SEED,
    _option("--tiny", action="store_true", help="the same road in a minute, with an accuracy that means nothing"),
)
def _demo(args: Args) -> None:
    from nformer_edge.demo import format_demo, run_demo

    result = run_demo(args.output, seed=args.seed, tiny=args.tiny, say=(lambda _: None) if args.json else print)
    _show(args, result, format_demo(result))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nformer-edge",
        description="Person re-identification with NFormer: train, export, build, prove.",
        epilog="`nformer-edge COMMAND --help` tells each command's flags; `nformer-edge demo` shows the whole road.",
    )
    parser.add_argument("--version", action="version", version=f"nformer-edge {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, options, function) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        for option in options:
            option(command)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.add_argument("--verbose", action="store_true", help="on an error, show the whole trace")
        command.set_defaults(function=function)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0 done, 1 a gate failed, 2 bad input, 3 an error of this package's own, 130 interrupted.
    """
    args = parser().parse_args(argv)
    try:
        args.function(args)
    except Error as e:
        return _fail(args, str(e), e.exit_code)
    except ModuleNotFoundError as e:
        extra = _EXTRAS.get((e.name or "").partition(".")[0])
        if extra is None:
            return _internal(args, e)
        return _fail(args, f"{args.command}: got no {e.name}. Install it: pip install 'nformer-edge[{extra}]'", 2)
    except KeyboardInterrupt:
        again = "run the command again" + (", with --resume to go on" if hasattr(args, "resume") else "")
        return _fail(args, f"interrupted. Nothing half-written was left; {again}.", 130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:
        return _fail(args, f"{e.filename or args.command}: got {e.strerror or e}. Check the path and the disk.", 2)
    except MemoryError:
        return _fail(
            args, f"{args.command}: got no more memory. Use fewer images at once (--batch), or a machine with more.", 2
        )
    except Exception as e:
        return _internal(args, e)
    return 0


def _internal(args: Args, error: Exception) -> int:
    """An error that nobody foresaw: the fault of this package, or of one below it."""
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return _fail(args, f"internal error ({what}). Run it again with --verbose and report what it prints.", 3)


def _fail(args: Args, message: str, code: int) -> int:
    if args.verbose:
        traceback.print_exc()
    print(inert(f"nformer-edge {args.command}: error: {' '.join(message.split())}"), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
