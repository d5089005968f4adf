"""The command line. A command calls one public function with the flags that were given, and prints what it returned.

A flag has the name of a parameter (``dest`` where the two differ). A flag that was not given is not passed on: the
function's own default holds, and nothing here repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import json
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nformer_edge import __version__
from nformer_edge.backends.base import get, names
from nformer_edge.core import spec
from nformer_edge.core.errors import Error, UsageError
from nformer_edge.core.signature import required
from nformer_edge.core.terminal import inert
from nformer_edge.core.values import Result, Written

Args = argparse.Namespace
Option = Callable[[argparse._ActionsContainer], object]

#: Which extra brings a package that a command needs.
_EXTRAS = {"torch": "train", "safetensors": "train", "onnx": "train", "onnxscript": "train"}
_EXTRAS |= {"fastapi": "serve", "starlette": "serve", "pydantic": "serve", "uvicorn": "serve", "h11": "serve"}
_EXTRAS |= {"uvloop": "serve", "prometheus_client": "serve", "mlperf_loadgen": "loadgen"}


#: How torch, onnxruntime and the system say that there is no memory for a tensor, a kernel or a thread.
_NO_MEMORY = re.compile(
    "bad_alloc|allocate memory|enough memory|create a primitive|start new thread|temporarily unavail"
)


def _option(*names: str, **settings: Any) -> Option:
    return lambda parser: parser.add_argument(*names, **settings)


def _flag(name: str, help: str, **settings: Any) -> Option:
    return _option(name, action="store_true", help=help, **settings)


def _all(*options: Option) -> Option:
    return lambda parser: [option(parser) for option in options]


def _one_of(*options: Option, required: bool = True) -> Option:
    def add(parser: argparse._ActionsContainer) -> None:
        group = parser.add_mutually_exclusive_group(required=required)
        for option in options:
            option(group)

    return add


def _checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type that reports our errors as argparse does its own."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except UsageError as e:
            raise argparse.ArgumentTypeError(str(e)) from None

    return parsed


def _choice(known: Any) -> Callable[[str], str]:
    """An argparse type that refuses a misspelt choice with the nearest spelling."""

    def parse(text: str) -> str:
        spec.check_choice("choice", text, typing.get_args(known) or tuple(known))
        return text

    return _checked(parse)


@_checked
def _sizes(text: str) -> tuple[int, ...]:
    """``1:8:32``."""
    from nformer_edge.backends.spec import parse_sizes

    return parse_sizes(text)


@_checked
def _head_use(text: str) -> bool | str:
    """``yes``, ``no`` or ``auto``."""
    uses: dict[str, bool | str] = {"yes": True, "no": False, "auto": "auto"}
    spec.check_choice("choice", text, tuple(uses))
    return uses[text]


@_checked
def _assignment(text: str) -> tuple[str, float]:
    """``name=number``."""
    name, _, value = text.partition("=")
    try:
        return name, float(value) if "." in value else int(value)
    except ValueError:
        raise UsageError("augment", text, "name=number", "Such as pad=10 erase=0.5.") from None


#: Flags that say how a dataset is read, with what holds where they are not given.
_READING: tuple[tuple[str, Any], ...] = (("layout", "auto"), ("pattern", None), ("root", None))

#: Flags that name a dataset, and whether all its images count where it has no splits: to search and to calibrate.
_DATASETS = {"data": False, "calib_data": True, "budget_data": True, "gallery": True}


#: Commands that compare models, for which images without labels will do.
_UNLABELED = ("parity", "benchmark", "threshold")

#: Where something else than a dataset may stand: a feature store, or another engine's calibration.
_NO_DATASETS = {
    **dict.fromkeys((("evaluate", "data"), ("export", "data"), ("search", "gallery")), (".npz",)),
    **dict.fromkeys(((command, "calib_data") for command in ("build-engine", "prepare")), (".json",)),
}


def _read_datasets(args: Args) -> None:
    """Puts datasets in the place of their paths, read as the flags say; what a user should know goes to standard error.

    What is no dataset (a feature store, a calibration table) stays a path.
    """
    paths = {name: source for name in _DATASETS if isinstance(source := getattr(args, name, None), str)}
    other = {name: _NO_DATASETS.get((args.command, name), ()) for name in paths}
    sources = {name: path for name, path in paths.items() if not path.endswith(other[name])}
    flags = [name for name in ("layout", "pattern", "root", "same_camera") if hasattr(args, name)]
    if flags and len(sources) < len(paths):
        told, hint = f"--{flags[0].replace('_', '-')}", "It is about images: give it to `embed`, which makes the store."
        raise UsageError(told, "a feature store", "images", hint)
    if not sources:
        return  # and nothing is loaded for it
    from nformer_edge.data.readers import read_dataset
    from nformer_edge.data.summary import describe_images, remarks

    layout, pattern, root = (getattr(args, name, default) for name, default in _READING)
    labels = args.command not in _UNLABELED
    for name, source in sources.items():
        whole = _DATASETS[name] or args.command in ("embed", "gallery add")
        dataset = read_dataset(source, layout, pattern=pattern, images=root, whole=whole, labels=labels)
        dataset = dataset.same_camera() if hasattr(args, "same_camera") else dataset
        setattr(args, name, dataset)
        if os.environ.get("RANK", "0") == "0" and args.command != "summary":
            counts = (describe_images(dataset),) if whole or dataset.unlabeled else ()
            for note in (*remarks(dataset, whole), *counts):
                print(inert(f"nformer-edge {args.command}: note: {note}"), file=sys.stderr)


def _call(args: Args, where: str | Callable[..., Any], **more: Any) -> Any:
    """Calls a public function, ``module:name`` or itself, with the flags that were given and with `more`."""
    function = where if callable(where) else _find(where)
    known = inspect.signature(function).parameters
    return function(**{key: value for key, value in vars(args).items() if key in known} | more)


def _find(where: str) -> Callable[..., Any]:
    module, _, name = where.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(f"nformer_edge.{module}"), name)
    return found


def _show(args: Args, result: Result, text: str | None = None) -> None:
    """The result, as JSON on standard output under --json, as text otherwise; -o writes the JSON to a file."""
    if hasattr(args, "out_json"):
        result.save(args.out_json)
    print(json.dumps(result.to_json(), indent=2) if args.json else inert(str(result) if text is None else text))


@dataclasses.dataclass(frozen=True)
class Command:
    """What `--help` says of a command, its flags, and what it runs: one function, if that is all (`calls`)."""

    summary: str
    options: tuple[Option, ...]
    run: Callable[[Args], None]
    calls: str = ""


COMMANDS: dict[str, Command] = {}


def _command(name: str, summary: str, *options: Option) -> Callable[[Callable[[Args], None]], Callable[[Args], None]]:
    def register(run: Callable[[Args], None]) -> Callable[[Args], None]:
        COMMANDS[name] = Command(summary, options, run)
        return run

    return register


def _calls(where: str, name: str, summary: str, *options: Option) -> None:
    """A command that is nothing but one call."""
    COMMANDS[name] = Command(summary, options, lambda args: _show(args, _call(args, where)), where)


# A table of flags: one a line.
# fmt: off
SIGNED = _all(
    _option("--require-signed", metavar="PUBLIC.pem", help="refuse bundles and engines that this key did not sign"),
    _option("--signed-since", metavar="TIME", help="with it: refuse what was signed before, such as 2026-11-28T12:00Z"),
)
SIGN = _option("--sign", metavar="PRIVATE.pem", help="sign what is written with this Ed25519 key")
MODEL = _all(_option("model", help="checkpoint (.safetensors), bundle or engine"), SIGNED)
BUNDLE = _all(_option("bundle", help="folder that `export` wrote"), SIGNED)
DATA = _option("--data", required=True, metavar="DIR", help="dataset folder or CSV file (the layout is detected)")
LAYOUT = _all(
    _option("--layout", metavar="NAME",
            help="market1501 | dukemtmc | cuhk03-np | veri-776 | msmt17 | csv | folders | cameras | unlabeled "
            "(default: detected)"),
    _option("--pattern", metavar="REGEX", help=r"file names of any kind, such as '(?P<pid>\d+)_cam(?P<camid>\d+)'"),
    _option("--root", metavar="DIR", help="folder that the paths of a CSV file are relative to (default: its own)"),
    _flag("--same-camera", "count matches of the query's own camera"),
)
OUT_JSON = _option("-o", "--output", dest="out_json", metavar="FILE", help="write the result as JSON, for `report`")
SEED = _option("--seed", type=int, help="random seed (default 0)")
BATCH = _option("--batch", type=int, help="images in one forward pass (default 32)")
THREADS = _option("--threads", dest="intra_op_threads", type=int, help="CPU threads of a forward pass (default: all)")
DECODERS = _option("--decoders", type=int, help="threads that decode images (default: one per core, at most 8)")
IMGSZ = _option("--imgsz", type=int, nargs=2, metavar=("H", "W"), help="image height and width (default 256 128)")
ARCH = _option("--arch", type=_choice(spec.TRUNKS), metavar="NAME", help="backbone: resnet50, osnet_x0_25 ...")
K = _option("--k", type=int, help="neighbors per image (default 20)")
LANDMARKS = _option("--landmarks", type=int, help="landmark images per layer (default 5)")
HEADS = _option("--heads", type=int, help="attention heads (default 2)")
PRECISION = (
    _option("--precision", type=_choice(spec.PrecisionChoice), metavar="P",
            help="of the backbone: fp32 | fp16 | bf16 | int8, or auto: the fastest here within the accuracy budget"),
    _option("--fp16", action="store_const", const="fp16", dest="precision", help="short for --precision fp16"),
    _option("--int8", action="store_const", const="int8", dest="precision", help="short for --precision int8"),
    _option("--bf16", action="store_const", const="bf16", dest="precision", help="short for --precision bf16"),
)
HEAD_PRECISION = _option(
    "--head-precision", choices=("fp32", "int8"),
    help="int8: the linear layers of the paper's head, in onnxruntime (default fp32)",
)
CALIBRATION = (
    LAYOUT,
    _option("--calib-data", metavar="DIR", help="dataset with training images for calibration, or calibration.json"),
    _option("--calib-num", type=int, help="calibration images (default 256)"),
    _option("--calib-method", type=_choice(spec.CalibrationChoice), metavar="NAME",
            help="minmax | entropy | percentile (default) | mse | auto: the one that ranks held-out people best"),
    _flag("--force-calib", "accept query or gallery images for calibration", dest="force_calibration"),
)
BUDGET = (
    _option("--max-map-drop", type=float, metavar="POINTS",
            help="with --int8: keep the most sensitive nodes in float until held-out people lose no more mAP"),
    _option("--min-overlap", type=float, metavar="SHARE",
            help="the same until overlap@10 (ten nearest images, INT8 and FP32) is at least this"),
    _option("--min-neighbours", dest="min_overlap", type=float, help=argparse.SUPPRESS),  # its name in the last version
    _option("--budget-images", type=int, help="images of held-out people to measure with (default 600)"),
    _option("--budget-scope", choices=("auto", "backbone", "end_to_end"),
            help="part that the budget is for (default: end_to_end where there is a head)"),
    _option("--budget-data", metavar="DIR", help="dataset to take held-out people from (default: --calib-data)"),
    _option("--exclude-nodes", nargs="+", metavar="NAME",
            help="nodes that stay in float: names, a file of names, or the budget.json of another engine"),
)


def _out(what: str, **settings: Any) -> Option:
    return _option("-o", "--output", dest="out", metavar=what, **settings)


FORCE = _flag("--force", "replace what is at -o")


def _new(what: str) -> Option:
    return _out(what, required=True)


@_command(
    "make-data", "generate a dataset of walking figures in Market-1501's layout", _new("DIR"), SEED,
    _option("--train-ids", type=int, help="identities to train on"),
    _option("--test-ids", type=int, help="identities to query"),
    _option("--gallery-images", type=int, nargs="+", metavar="N",
            help="gallery images of a test identity, by turns, such as 1 2 4 8 20 (default 12 each)"),
    _option("--open-set", type=int, metavar="N", help="gallery identities that no query asks for (default 0)"),
    _option("--distractors", type=int, metavar="N", help="gallery images of passers-by and of nobody (default 150)"),
    _flag("--force", "replace an earlier generated dataset"),
)
def _make_data(args: Args) -> None:
    dataset = _call(args, "data.generate:generate_dataset", spec=_call(args, "data.generate:GenerateSpec"))
    _show(args, _call(args, "data.summary:summarize", dataset=dataset))


@_command(
    "summary", "identities, images and cameras of a dataset, as papers print them", DATA, LAYOUT,
    _flag("--check", "decode every image and name all that cannot be read; exit code 1"),
)
def _summary(args: Args) -> None:
    summary = _call(args, "data.summary:summarize", dataset=args.data)
    _show(args, summary)
    _call(args, "data.summary:require_readable", summary=summary)


def _question_size(args: Args) -> None:
    """A note where images would be wider than high: people are not."""
    height, width = getattr(args, "imgsz", (2, 1))
    if height < width and os.environ.get("RANK", "0") == "0":
        told = f"--imgsz {height} {width} is height {height}, width {width}; for people, --imgsz {width} {height}?"
        print(f"nformer-edge {args.command}: warning: {told}", file=sys.stderr)


@_command(
    "train",
    "train the backbone on images, then the NFormer head on its features; or the head alone on a feature store",
    _one_of(
        _option("--data", metavar="DIR", help="dataset folder or CSV file (the layout is detected)"),
        _option("--features", metavar="STORE.npz", help="train the head alone, on features that `embed` wrote"),
    ),
    LAYOUT, _new("FILE.safetensors"), FORCE, IMGSZ, ARCH, K, LANDMARKS, HEADS, SEED,
    _option("--device", help="cpu (default), or a CUDA device such as cuda:0"),
    _option("--backbone", metavar="CHECKPOINT", help="with --features: the model that computed them"),
    _flag("--resume", "continue an interrupted run of this training"),
    _option("--preset", choices=("gated", "published", "demo"), help="where to start (default gated)"),
    _option("--config", metavar="FILE.toml", help="configuration file; flags override it"),
    _option("--epochs", type=int, help="epochs of stage one"),
    _option("--head-epochs", type=int, help="epochs of stage two"),
    _option("--no-head", action="store_false", dest="with_head", help="train the backbone alone"),
    _option("--initial", metavar="CHECKPOINT", help="start from the backbone of this checkpoint"),
    _option("--rule", type=_choice(spec.NeighborRule), metavar="RULE", help="gated | features | affinity"),
    _option("--layers", type=int, help="layers of the head"),
    _option("--holdout", type=float, metavar="SHARE", help="share of the training identities held out for validation"),
    _option("--precision", metavar="NAME", help="fp32 | bf16 | fp16 (GPU) | fp64 (default fp32)"),
    _option("--accumulate", type=int, metavar="N", help="batches per optimizer step"),
    _flag("--deterministic", "allow only deterministic operations"),
    _option("--tensorboard", metavar="DIR", help="write event files for TensorBoard"),
)
def _train(args: Args) -> None:
    _question_size(args)
    head = {k: v for k in ("rule", "k", "landmarks", "layers", "heads") if (v := getattr(args, k, None)) is not None}
    start = getattr(args, "config", getattr(args, "preset", "gated"))
    config = _call(args, "training.config:configure", start=start, **head)
    history = _call(args, "training.train:train", config=config)
    if os.environ.get("RANK", "0") == "0":  # torchrun starts this command once a rank
        _show(args, history)
        for note in history.notes:
            print(inert(f"nformer-edge train: warning: {note}"), file=sys.stderr)


_calls(
    "compress.compress:compress", "compress",
    "checkpoint -> smaller or faster checkpoint, by the steps of a recipe, each judged on held-out training people",
    _option("model", metavar="CHECKPOINT", help="the teacher, and the start where the recipe names no other student"),
    DATA, LAYOUT, _new("FILE.safetensors"), FORCE,
    _option("--recipe", required=True, metavar="FILE.toml", help="steps: distil, prune ... (docs/compress.md)"),
    _option("--teacher", metavar="STORE.npz",
            help="the model's features of the training images (`embed --splits train --views 4`; default: computed)"),
    _option("--device", help="cpu (default), or a CUDA device such as cuda:0"),
    _flag("--resume", "continue an interrupted run of this recipe"),
)


@_command(
    "import", "published weights -> checkpoint; prints what matched",
    _option("path", metavar="FILE", help=".pth or .safetensors of torchreid, torchvision, reid-strong-baseline, "
            "NFormer, FastReID or Person_reID_baseline_pytorch; no code in the file is run"),
    _new("FILE.safetensors"), FORCE, IMGSZ, ARCH, HEADS, K, LANDMARKS,
    _option("--features", type=int, help="replace the file's neck by an untrained projection to this many features"),
    _option("--stem", type=_choice(spec.Stem), metavar="NAME", help="stem of a ResNet: standard | no_relu | ceil_pool"),
    _option("--last-stride", type=int, choices=(1, 2), help="of a ResNet, where the file does not say it"),
    _option("--pooling", type=_choice(spec.Pooling), metavar="NAME", help="avg | gem, where the file does not say it"),
    _flag("--ema", "take the averaged weights, where the file has both"),
    _option("--sha256", metavar="HEX", help="refuse any other file than this one"),
    _option("--partial", "--allow-partial", action="store_true", help="accept missing or unused tensors"),
)
def _import(args: Args) -> None:
    _question_size(args)
    wanted = _call(args, "model.importers.plan:Wanted")
    _show(args, _call(args, "model.weights:import_checkpoint", wanted=wanted))


_calls(
    "report.accuracy:evaluate", "evaluate",
    "accuracy (mAP, mINP, CMC) of a checkpoint, bundle or engine; the head under both query protocols",
    MODEL, DATA, LAYOUT, BATCH, THREADS, OUT_JSON,
    _option("--seed", dest="seeds", type=int, nargs="+", help="landmark seeds, a run each (default: the model's own)"),
    _flag("--rerank", "add k-reciprocal re-ranking (20/6/0.3) and other baselines, also after a gated head's map"),
    _option("--draws", type=int, metavar="N",
            help="draws of the table by images a person, averaged (default 1; 0 leaves the table out)"),
    _option("--scoring", metavar="NAME",
            help="average precision and CMC as another project computes them: open-reid | person-reid-baseline"),
)


@_command(
    "export", "checkpoint -> bundle: backbone.onnx, nformer.onnx and a manifest",
    _option("checkpoint", help="what `train` or `import` wrote"), _new("DIR"), SIGN, FORCE,
    _option("--seed", dest="landmark_seed", type=int, help="landmark seed for the manifest (default 0)"),
    _option("--opset", type=int, help="ONNX opset, 18 to 20 (default 18)"),
    _option("--images-per-person", type=float, metavar="N",
            help="of the galleries in use: sets a gated head's gates (default: gates for any gallery)"),
    _flag("--portable", "also write nformer.portable.onnx: the head of standard operators alone, for other runtimes"),
    _option("--input", choices=("float32", "uint8"),
            help="what backbone.onnx takes: normalized numbers (default), or pixels, which it normalizes itself"),
    _option("--input-layout", choices=("NCHW", "NHWC"), help="of pixels (default NCHW)"),
    _option("--input-channels", choices=("RGB", "BGR"), help="order of the pixels' colors (default RGB)"),
    _flag("--unit-features", "backbone.onnx divides each feature by its L2 norm"),
    _option("--data", metavar="DIR", help="dataset or feature store: measures the manifest's table by images a person "
            "(default: training's table, of held-out people)"),
    LAYOUT,
)
def _export(args: Args) -> None:
    measured = {}
    if hasattr(args, "data"):
        found = _call(args, "report.accuracy:evaluate", model=args.checkpoint, rank_lists=0, per_query=False)
        measured = {"accuracy": found.composition}
    _show(args, Written(_call(args, "exporting.export:export_bundle", **measured)))


@_command(
    "modelopt", "bundle -> bundle with a backbone quantized to INT8 or FP16 by NVIDIA ModelOpt, for TensorRT",
    BUNDLE, _new("DIR"), SIGN, FORCE, SEED, _one_of(*PRECISION[1:3], required=False), LAYOUT,
    _option("--calib-data", required=True, metavar="DIR", help="dataset with training images for calibration"),
    _option("--calib-num", type=int, help="calibration images (default 256)"),
    _option("--calib-method", choices=("minmax", "entropy"), help="for INT8 (default entropy)"),
    CALIBRATION[4], _flag("--own-choice", "ModelOpt alone chooses the nodes that stay in float"),
)
def _modelopt(args: Args) -> None:
    _call(args, "quantize.modelopt:bundle_by_modelopt")
    _show(args, _call(args, "quantize.modelopt:describe_bundle", path=args.out))


def _engine_inputs(args: Args) -> dict[str, Any]:
    """The `EngineSpec` and the `CalibrationData` of what was asked for."""
    from nformer_edge.quantize.spec import read_exclude

    given = {key: tuple(value) if isinstance(value, list) else value for key, value in vars(args).items()}
    if "exclude_nodes" in given:
        given["exclude_nodes"] = read_exclude(given["exclude_nodes"])
    asked = _call(Args(**given), "backends.spec:EngineSpec")
    budget = None
    if "max_map_drop" in given or "min_overlap" in given:
        renamed = {name: given[f"budget_{name}"] for name in ("images", "scope") if f"budget_{name}" in given}
        budget = _call(args, "quantize.spec:BudgetSpec", **renamed)
    data = _call(args, "quantize.prepare:CalibrationData", images=given.get("calib_data"), budget=budget,
                 force=given.get("force_calibration", False))
    return {"spec": asked, "calib_data": data}


@_command(
    "build-engine", "bundle -> engine for one backend and precision",
    BUNDLE, _out("DIR", help="default: a name made of model, size and precision"), SIGN, FORCE,
    _option("--target", metavar="NAME", help="build by a recipe, such as jetson-orin-jp62; flags override it"),
    _option("--backend", metavar="NAME",
            help="onnxruntime | openvino | tensorrt | tensorrt-rtx | auto: a GPU's, or the CPU's fastest (default)"),
    _one_of(*PRECISION, required=False), HEAD_PRECISION, *CALIBRATION, *BUDGET, SEED,
    _option("--batch", type=_sizes, metavar="MIN:OPT:MAX",
            help="batch of the backbone; engines are timed with OPT (default 1:8:32)"),
    _option("--gallery-size", type=_sizes, metavar="MIN:OPT:MAX",
            help="images in one pass of the head (TensorRT; default 20:2000:50000)"),
    _flag("--reduce-range", "with --int8: 7-bit weights, for CPUs with and without VNNI"),
    _option("--workspace", type=float, help="memory for the builder, in GiB (TensorRT)"),
    _option("--timing-cache", metavar="FILE", help="kernel times, read if present and written after the build"),
    _option("--hardware-compat", choices=("none", "same_compute_capability", "ampere_plus"),
            help="build a plan that runs on more GPUs, but slower (TensorRT)"),
    _flag("--version-compat", "the plan also runs on later versions (TensorRT)"),
    _option("--dla", type=int, metavar="CORE", help="run the backbone on a Jetson's DLA"),
    _flag("--keep-graphs", "keep the parsed ONNX files in the engine (TensorRT)"),
    _option("--capabilities", nargs="+", metavar="C", help="compute capabilities, such as 8.9 (TensorRT-RTX)"),
    _option("--device", help="the GPU to build on, such as cuda:0 (TensorRT); cpu | gpu | npu (OpenVINO)"),
)
def _build_engine(args: Args) -> None:
    engine = _call(args, "targets.build:build_for_target", **_engine_inputs(args))
    _show(args, _call(args, "backends.build:describe_engine", path=engine))


@_command(
    "prepare", "bundle -> graphs and trtexec commands, for devices without Python 3.10 (JetPack 5.1)",
    BUNDLE, _new("DIR"), FORCE,
    _option("--target", default="jetson-xavier-jp51", metavar="NAME", help="recipe (default jetson-xavier-jp51)"),
    _one_of(*PRECISION[:3], required=False), *CALIBRATION, *BUDGET, SEED,
)
def _prepare(args: Args) -> None:
    _show(args, _call(args, "targets.trtexec:prepare_for_target", **_engine_inputs(args)))


_calls(
    "backends.upgrade:upgrade", "upgrade", "bring a bundle or engine of manifest format 1 to this version",
    _option("path", metavar="DIR", help="its folder; replaced after verification and a run of its golden vectors"),
    SIGN,
)


_calls(
    "backends.tensorrt.plugin.build:build_plugin", "build-plugin",
    "compile the two operators as a plugin library for TensorRT, on the machine that will run it",
    _out("DIR", help="default: the folder where engines look for it"),
    _option("--tensorrt-root", metavar="DIR", help="unpacked tarball (default: headers of JetPack or apt)"),
    _option("--nvcc", metavar="FILE", help="CUDA compiler (default: from PATH, or /usr/local/cuda)"),
    _option("--arch", dest="architectures", help="auto (this machine's GPU, the default) | all | such as 87,89"),
)


@_command(
    "embed", "images -> feature store (.npz)",
    MODEL, _option("--data", required=True, metavar="DIR", help="dataset, or a folder of images"), LAYOUT,
    _new("FILE.npz"), BATCH, DECODERS, THREADS, SEED,
    _option("--splits", nargs="+", metavar="SPLIT", help="train query gallery junk (default: the first three)"),
    _option("--views", type=int, help="views of each training image: one plain, the rest augmented (default 1)"),
    _option("--augment", nargs="+", type=_assignment, metavar="NAME=X",
            help="flip, pad, erase (default flip=0.5 pad=10 erase=0.5)"),
    _option("--workers", type=int, metavar="N", help="processes of Ray Data, on this machine or RAY_ADDRESS's cluster"),
)
def _embed(args: Args) -> None:
    _show(args, _call(args, "gallery.embed:embed_files", augment=dict(getattr(args, "augment", ()))))


_calls(
    "gallery.model:search", "search", "query images -> ranked gallery images",
    MODEL, LAYOUT,
    _option("--query", dest="queries", required=True, nargs="+", metavar="IMAGE", help="images of the people to find"),
    _option("--gallery", required=True, metavar="DIR", help="folder of images, dataset, or feature store"),
    _option("--top", type=int, help="gallery images per query (default 10)"), BATCH, DECODERS, THREADS, OUT_JSON,
    _option("--threshold", type=float, metavar="COSINE",
            help="cosine from which a match counts, as `threshold` recommends (default: all count)"),
    _one_of(
        _option("--head", type=_head_use, metavar="USE",
                help="yes | no | auto: where the model's table by images a person shows no harm (default auto)"),
        _option("--no-head", action="store_false", dest="head", help="short for --head no"),
        required=False,
    ),
    _option("--images-per-person", type=int, metavar="N",
            help="images of one person in the gallery: sets a gated head's gates, and for --head auto (default: gates "
            "as exported; by the gallery's labels, or else 1)"),
    _flag("--together", "all queries in one pass of the head; they then affect each other"),
)


@_command(
    "serve", "a gallery over HTTP, with a page to look with (docs/serve.md)",
    MODEL, THREADS,
    _option("--gallery", dest="folder", required=True, metavar="DIR", help="the gallery's folder, made if missing"),
    _option("--host", help="address to listen at (default 127.0.0.1); another machine's needs --tokens"),
    _option("--port", type=int, help="default 8000"),
    _option("--tokens", metavar="FILE", help="lines `ROLE TOKEN`; roles: read | write | admin; read again on SIGHUP"),
    _option("--queue", type=int, help="requests at once; more are refused with 429 (default 64)"),
    BATCH,
    _option("--deadline", dest="deadline_s", type=float, metavar="S", help="seconds to the features (default 10)"),
    _option("--body", dest="body_mib", type=float, metavar="MIB", help="size of an image file (default 8)"),
    _option("--megapixels", type=float, help="size of an image (default 16)"),
    _option("--rate", type=float, help="requests a second of one token (default 100)"),
    _option("--threshold", type=float, metavar="COSINE", help="where a search names none"),
    _option("--head", type=_head_use, metavar="USE", help="yes | no | auto, as for `search` (default auto)"),
    _option("--purpose", metavar="TEXT", help="what the gallery is for; shown to who uses it"),
    _flag("--require-note", "refuse a search without a note, such as a case number"),
    _flag("--audit", "of a new gallery: log each search"),
    _flag("--thumbnails", "of a new gallery: keep small pictures, for the page"),
    _option("--keep-days", type=float, metavar="N", help="remove images that were seen longer ago (default: keep)"),
    _option("--erase-minutes", type=float, metavar="N",
            help="what was removed leaves the files within this time (default 0: at once)"),
)
def _serve(args: Args) -> None:
    _call(args, "gallery.service.server:serve", settings=_call(args, "gallery.service.settings:Settings"))


_calls(
    "report.threshold:threshold", "threshold",
    "the cosine from which a match counts, for a wanted share of queries that accept a stranger",
    MODEL, _option("--data", required=True, metavar="DIR", help="dataset, or a folder of crops that nobody labeled"),
    LAYOUT, BATCH, THREADS, OUT_JSON,
    _option("--rate", type=float, metavar="SHARE", help="of queries that may accept a stranger (default 0.01)"),
    _option("--gallery-size", type=int, metavar="N",
            help="images of others that a query meets in use (default: as many as in the data)"),
    _option("--images-per-person", type=int, metavar="N",
            help="of crops that nobody labeled, about; fewer are safer (default 4)"),
    _option("--limit", type=int, metavar="N",
            help="use at most this many queries (default: all; 200 where each is a pass of the head)"),
)


FOLDER = _option("path", metavar="GALLERY", help="the gallery's folder")
EMBEDDER = _all(_option("model", help="checkpoint (.safetensors), bundle or engine that the gallery is for"), SIGNED)


@contextlib.contextmanager
def _gallery(args: Args) -> Iterator[Any]:
    """The gallery that a command is about, with its model where the command has one."""
    if not hasattr(args, "model"):
        with _find("gallery.gallery:Gallery")(None, args.path) as gallery:
            yield gallery
        return
    create = args.command == "gallery add"  # nothing else makes one
    with _call(args, "gallery.model:open", path=args.model) as model, _call(args, model.gallery, create=create) as made:
        yield made


def _on_gallery(method: str) -> Callable[[Args], None]:
    """A command that is one method of a gallery."""

    def run(args: Args) -> None:
        with _gallery(args) as gallery:
            _show(args, _call(args, getattr(gallery, method)))

    return run


@_command(
    "gallery add", "embed images and add them to a gallery, which is made where there is none",
    EMBEDDER, FOLDER,
    _option("--data", required=True, metavar="DIR", help="folder of images, dataset, or feature store"), LAYOUT,
    _option("--id", dest="name", metavar="NAME", help="the person that all these images show"),
    _option("--ids-from", choices=("labels", "folder", "file"),
            help="who each image shows: the dataset's label, or else its path (labels, the default); the name of the "
            "folder that it lies in; or its file name without the ending"),
    _option("--camera", type=int, metavar="N", help="of all these images (default: the dataset's, or unknown)"),
    _option("--time", metavar="TIME", help="when they were seen, such as 2026-11-28T12:00Z (default: now)"),
    _option("--code", choices=("fp32", "fp16", "int8"), help="of a new gallery: how features are kept (default fp32)"),
    _flag("--thumbnails", "of a new gallery: keep a small picture of each image, for `gallery migrate`"),
    _flag("--audit", "of a new gallery: log each search"),
    BATCH, THREADS,
)
def _gallery_add(args: Args) -> None:
    with _gallery(args) as gallery:
        _show(args, _call(args, "gallery.enroll:add_data", gallery=gallery))


COMMANDS["gallery remove"] = Command(
    "remove all images of people, or all that are older than some days; `compact` then cleans the files",
    (
        FOLDER, _option("ids", nargs="*", metavar="ID", help="the people's ids"),
        _option("--keep-days", type=float, metavar="DAYS", help="remove what was seen longer ago than this"),
    ),
    _on_gallery("remove"),
)


@_command(
    "gallery search", "rank a gallery for images of people",
    EMBEDDER, FOLDER,
    _option("--query", dest="images", required=True, nargs="+", metavar="IMAGE", help="images of the people to find"),
    _option("--top", type=int, help="gallery images per query (default 10)"),
    _option("--camera", dest="cameras", type=int, nargs="+", metavar="N", help="rank images of these cameras only"),
    _option("--exclude-camera", type=int, metavar="N", help="do not rank images of this camera"),
    _option("--since", metavar="TIME", help="rank images seen then or later, such as 2026-11-28T12:00Z"),
    _option("--until", metavar="TIME", help="rank images seen then or earlier"),
    _option("--threshold", type=float, metavar="COSINE",
            help="cosine from which a match counts, as `threshold` recommends (default: all count)"),
    _flag("--one-person", "all query images show one person: they are one query"),
    _option("--head", type=_head_use, metavar="USE",
            help="yes | no | auto: where the model's table by images a person shows no harm (default auto)"),
    _option("--images-per-person", type=int, metavar="N",
            help="images of one person in the gallery: sets a gated head's gates, and for --head auto (default: by the "
            "ids)"),
    _option("--note", help="for the log, such as a case number; no name"), BATCH, THREADS, OUT_JSON,
)
def _gallery_search(args: Args) -> None:
    _on_gallery("search")(args)


COMMANDS["gallery compact"] = Command(
    "write the gallery's files anew, without a byte of what was removed; or with a smaller code",
    (
        FOLDER,
        _option("--code", type=_choice(spec.GalleryCode), metavar="NAME",
                help="how features are kept from now on: fp32 | fp16 | int8 | binary-int8 | pca128-int8 | pca64-int8"),
        _option("--max-map-drop", type=float, metavar="POINTS",
                help="choose the smallest code that loses no more mAP than this, by the gallery's ids or --held-out"),
        _option("--held-out", metavar="STORE.npz", help="features of people to measure with, that `embed` wrote"),
    ),
    _on_gallery("compact"),
)
COMMANDS["gallery stats"] = Command("what a gallery holds, and bytes an image", (FOLDER,), _on_gallery("stats"))
COMMANDS["gallery audit"] = Command("the log: additions, removals, searches", (FOLDER,), _on_gallery("audit"))
COMMANDS["gallery backup"] = Command(
    "copy a gallery as it is at this instant, while others read and write",
    (FOLDER, _option("-o", "--output", dest="to", required=True, metavar="DIR", help="a new folder")),
    _on_gallery("backup"),
)
COMMANDS["gallery merge"] = Command(
    "add all images of another gallery of the same model",
    (FOLDER, _option("other", metavar="OTHER", help="the other gallery's folder")),
    _on_gallery("merge"),
)
_calls(
    "gallery.upkeep:upgrade", "gallery upgrade", "bring a gallery of an older version's format to this version", FOLDER,
)


def _migrate(args: Args) -> None:
    without_model = _find("gallery.gallery:Gallery")
    with _call(args, "gallery.model:open", path=args.model) as model, without_model(None, args.path) as gallery:
        _show(args, _call(args, gallery.migrate, runner=model.runner))


COMMANDS["gallery migrate"] = Command(
    "embed a gallery's thumbnails with another model, which the gallery is then for",
    (
        _option("model", help="checkpoint (.safetensors), bundle or engine that the gallery shall be for"), SIGNED,
        FOLDER, BATCH, THREADS,
    ),
    _migrate,
)


@_command(
    "parity", "compare the ranking of an engine with its reference; exit code 1 if a gate fails",
    _option("reference", help="usually the checkpoint"), _option("engine"), DATA, LAYOUT, BATCH, THREADS, OUT_JSON,
    SIGNED,
    _option("--limit", type=int, help="use at most this many query and gallery images"),
    _option("--landmark-seeds", type=int, nargs="+", metavar="N",
            help="landmark seeds of the head; the worst result counts (default: the engine's own and two more)"),
    _flag("--layers", "compare the graphs node by node and print the table (always done for a part that fails)"),
)
def _parity(args: Args) -> None:
    result = _call(args, "report.parity:parity")
    tables = [str(found) for found in result.layers if found.nodes] if hasattr(args, "layers") else []
    _show(args, result, "\n".join([str(result), *tables]))
    result.require_passed()


_calls(
    "report.cross_model:cross_model", "fleet",
    "queries of one model against a gallery of another: accuracy and threshold of every pairing",
    _option("models", nargs="+", metavar="model", help="models or feature stores; the first is the reference"), SIGNED,
    _option("--data", metavar="DIR", help="dataset folder or CSV file; not needed for feature stores alone"),
    LAYOUT, BATCH, THREADS, OUT_JSON,
    _option("--false-match-rate", type=float, metavar="SHARE",
            help="share of pairs of different people that the threshold may accept (default 0.001)"),
)


_calls(
    "report.frontier:frontier", "frontier",
    "ranking against time of a teacher, its students, prunings and precisions, and which of them dominates which",
    _option("models", nargs="+", metavar="model", help="checkpoints, bundles or engines; the first is the teacher"),
    SIGNED, DATA, LAYOUT, BATCH, THREADS, OUT_JSON,
    _option("--batches", type=int, nargs="+", metavar="N", help="batch sizes to time (default 1 8)"),
)


@_command(
    "benchmark", "latency and throughput by MLPerf's rules; several models are timed alternately",
    _option("models", nargs="+", metavar="model"), SIGNED, DATA, LAYOUT, BATCH, THREADS, OUT_JSON,
    _option("--single-stream", type=int, metavar="N", help="queries of one image (default 130)"),
    _option("--multi-stream", type=int, metavar="N", help="queries of eight images; valid from 662 on (default 0)"),
    _option("--offline", type=int, metavar="N", help="images of one large query (default 0)"),
    _option("--gallery", type=int, help="gallery images searched (default 500)"),
    _option("--deadline-ms", type=float, metavar="MS",
            help="is p90 of one image (p99 of eight) below it? passed, failed or undecided; exit code 1 if failed"),
    _flag("--loadgen", "MLPerf's LoadGen issues the queries, and its verdict stands beside ours"),
)
def _benchmark(args: Args) -> None:
    if len(args.models) == 1:
        result = _call(args, "report.benchmark:benchmark", model=args.models[0])
        _show(args, result)
        return result.require_deadline()
    for name in ("deadline_ms", "loadgen"):
        if hasattr(args, name):
            given = f"--{name.replace('_', '-')}"
            raise UsageError(given, f"{len(args.models)} models", "one model", "Time each of them alone.")
    rounds = {"rounds": args.single_stream} if hasattr(args, "single_stream") else {}
    return _show(args, _call(args, "report.benchmark:compare", **rounds))


@_command(
    "report", "results in JSON -> one self-contained HTML page",
    _option("results", nargs="+", metavar="FILE.json"), _new("FILE.html"),
)
def _report(args: Args) -> None:
    _show(args, Written(_call(args, "report.html.page:write_report")))


_calls(
    "targets.kit:write_kit", "kit", "what a program of others needs around a model: configuration, source, README",
    _option("name", metavar="NAME", help="triton | cpp | web | deepstream | docker"), MODEL, _new("DIR"), FORCE,
)


_calls(
    "targets.doctor:doctor", "doctor",
    "what this machine can do, and how to install what is missing; what a tool did to FILE",
    _option("file", nargs="?", metavar="FILE.onnx", help="of a bundle or engine: names what another tool did to it"),
    _option("--target", metavar="NAME", help="list what does not match this target, such as jetson-orin-jp62"),
)


@_command(
    "demo", "the whole workflow: generate images, train, export, INT8, parity, benchmark, report",
    _out("DIR", default="demo", help="output folder (default demo)"), SEED,
    _flag("--tiny", "the same workflow in a minute; its accuracy means nothing"),
)
def _demo(args: Args) -> None:
    _show(args, _call(args, "demo:run_demo", say=(lambda _: None) if args.json else print))


# fmt: on
def parser() -> argparse.ArgumentParser:
    """Every command with its flags."""
    whole = argparse.ArgumentParser(
        prog="nformer-edge",
        description="Person re-identification with NFormer: train, export, build an engine, check it.",
        epilog="`nformer-edge COMMAND --help` shows a command's flags; `nformer-edge demo` runs the whole workflow.",
    )
    whole.add_argument("--version", action="version", version=f"nformer-edge {__version__}")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    about = "People's images, kept, searched and forgotten"
    group = commands.add_parser("gallery", help=about[0].lower() + about[1:], description=f"{about}.")
    verbs = group.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        about = command.summary[0].upper() + command.summary[1:] + "."
        among, verb = (verbs, name.partition(" ")[2]) if " " in name else (commands, name)
        sub = among.add_parser(verb, help=command.summary, description=about, argument_default=argparse.SUPPRESS)
        sub.set_defaults(command=name)
        for option in command.options:
            option(sub)
        sub.add_argument("--json", action="store_true", default=False, help="print the result as JSON")
        sub.add_argument("--verbose", action="store_true", default=False, help="on an error, print the traceback")
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0 done, 1 a gate failed, 2 bad input, 3 an error of this package's own, 130 interrupted.
    """
    args = parser().parse_args(argv)
    try:
        _read_datasets(args)
        with required(getattr(args, "require_signed", None), getattr(args, "signed_since", None)):
            COMMANDS[args.command].run(args)
    except Error as e:
        return _fail(args, str(e), e.exit_code)
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        extra = get(package).EXTRA if package in names() else _EXTRAS.get(package)
        if extra is None:
            return _internal(args, e)
        return _fail(args, f"{args.command}: got no {e.name}. Install it: pip install 'nformer-edge[{extra}]'", 2)
    except KeyboardInterrupt:
        again = "run the command again" + (", with --resume to continue" if args.command == "train" else "")
        return _fail(args, f"interrupted. No half-written file was left; {again}.", 130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:
        return _fail(args, f"{e.filename or args.command}: got {e.strerror or e}. Check the path and the disk.", 2)
    except Exception as e:
        if isinstance(e, MemoryError) or _NO_MEMORY.search(str(e)):
            hint = "Use fewer images at once (--batch), or a machine with more"
            return _fail(args, f"{args.command}: got no more memory. {hint}.", 2)
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
