"""Every kind of artifact, made twice from tiny models, and the door that opens each."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from torture.cases import DONE, attempt, command

#: Fields of results that differ from run to run.
_TIMES = ("seconds", "sha256", "output", "model_sha256")


@dataclass(frozen=True)
class Kind:
    """One kind of artifact.

    Args:
        name: of the kind.
        place: the sound one, a file or a folder.
        other: another sound one.
        door: opens a path and computes: exit code, and what identifies the result.
        sealed: whether it carries a digest: then every change must be refused or change nothing. The others are
            written by hand, or hold results: a change that can be read is a new input.
    """

    name: str
    place: Path
    other: Path
    door: Callable[[Path, Path], tuple[int, Any]]
    sealed: bool = True

    @property
    def folder(self) -> bool:
        return self.place.is_dir()

    def copied(self, work: Path) -> Path:
        """A copy that may be changed."""
        return copy(self.place, work / f"case{self.place.suffix}")

    def run(self, work: Path) -> tuple[int, Any]:
        """The sound one through its door."""
        return self.door(self.copied(work), work)


def digest(data: bytes | str) -> str:
    return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()


def tree(path: Path) -> str:
    """What a file or folder holds, as one digest; "" where there is nothing."""
    if path.is_file():
        return digest(path.read_bytes())
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    return digest("".join(f"{p.relative_to(path)} {digest(p.read_bytes())}\n" for p in files)) if files else ""


def copy(source: Path, target: Path) -> Path:
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
    shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
    return target


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _plain(v) for k, v in data.items() if k not in _TIMES}
    return [_plain(v) for v in data] if isinstance(data, list) else data


class Workshop:
    """Makes the artifacts once, in `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images, self.data = root / "images", root / "data"
        self.query = root / "query.png"

    def must(self, *argv: object) -> None:
        code, out = command(*argv)
        assert code == 0, (argv, out)

    def make(self) -> None:
        """Everything, in about 10 seconds."""
        self.root.mkdir(parents=True)
        self._pictures()
        for i, name in enumerate("ab"):
            folder = self.root / name
            folder.mkdir()
            self._checkpoint(folder / "m.safetensors", seed=i)
            self.must("export", folder / "m.safetensors", "-o", folder / "bundle")
            self.must("build-engine", folder / "bundle", "-o", folder / "fp32", "--backend", "onnxruntime")
            self.must("build-engine", folder / "bundle", "-o", folder / "int8", "--int8", "--calib-data", self.data,
                      "--calib-num", 4 + i, "--backend", "onnxruntime")  # fmt: skip
            self.must("embed", folder / "m.safetensors", "--data", self.data, "-o", folder / "f.npz", "--splits",
                      "train", "query", "gallery")  # fmt: skip
            self.must("evaluate", folder / "bundle", "--data", self.data, "-o", folder / "evaluation.json")
            shutil.copyfile(folder / "int8" / "calibration.json", folder / "calibration.json")
            self._budget(folder, chosen=1 + i)
            self._journal(folder)
            self._format_1(folder)
            self._weights(folder / "weights.pth", seed=i)
            (folder / "train.toml").write_text(_TOML.format(seed=i))
            (folder / "recipe.toml").write_text(_RECIPE.format(seed=i))
            self._student(folder / "student.safetensors", seed=i)
            self.must("embed", folder / "bundle", "--data", self.data, "-o", folder / "teacher.npz", "--splits",
                      "train", "--views", 2)  # fmt: skip
            self._csv(folder)
            self._state(folder)

    def _pictures(self) -> None:
        for split, people, cameras in (("bounding_box_train", range(1, 5), (1, 2)), ("query", (11, 12), (1,)),
                                       ("bounding_box_test", (11, 12), (2, 3))):  # fmt: skip
            (self.data / split).mkdir(parents=True)
            for pid in people:
                for camera in cameras:
                    for shot in range(2):
                        rng = np.random.default_rng([pid, camera, shot])
                        color = np.random.default_rng(pid).integers(40, 215, 3)
                        pixels = np.clip(color + rng.normal(0, 30, (32, 16, 3)), 0, 255).astype(np.uint8)
                        Image.fromarray(pixels).save(self.data / split / f"{pid:04d}_c{camera}s1_{shot:06d}_00.png")
        self.images.mkdir()
        for i, path in enumerate(sorted((self.data / "bounding_box_test").iterdir())):
            shutil.copyfile(path, self.images / f"{i}.png")
        shutil.copyfile(min((self.data / "query").iterdir()), self.query)

    def _checkpoint(self, path: Path, seed: int) -> None:
        import torch

        from nformer_edge.core.spec import BackboneSpec, HeadSpec, ModelSpec, PreprocessSpec
        from nformer_edge.model.backbone import Backbone
        from nformer_edge.model.checkpoint import save_checkpoint
        from nformer_edge.model.nformer import NFormer

        head = HeadSpec(features=16, layers=1, heads=2, k=3, landmarks=3)
        spec = ModelSpec(BackboneSpec("osnet_x0_25", 16), head, PreprocessSpec(32, 16))
        torch.manual_seed(seed)
        save_checkpoint(path, spec, Backbone(spec.backbone), NFormer(head))

    def _student(self, path: Path, seed: int) -> None:
        """A narrower backbone without a stream, as pruning leaves it."""
        import torch

        from nformer_edge.core.spec import BackboneSpec, ModelSpec, PreprocessSpec
        from nformer_edge.model.backbone import Backbone
        from nformer_edge.model.checkpoint import save_checkpoint

        widths = {"trunk.conv2.0.conv2d": (0, 0), "trunk.conv5.conv": (128, 96), "trunk.conv5.bn": (96, 96)}
        widths["neck.projection"] = (96, 16)
        spec = ModelSpec(BackboneSpec("osnet_x0_25", 16, widths=widths), None, PreprocessSpec(32, 16))
        torch.manual_seed(seed)
        save_checkpoint(path, spec, Backbone(spec.backbone))

    def _budget(self, folder: Path, chosen: int) -> None:
        """What a search to a budget of accuracy leaves, of a search that was not run."""
        import onnx

        from nformer_edge.quantize.spec import BudgetSpec
        from nformer_edge.quantize.values import BudgetSearch, HeldOutFacts, NodeCost, Point, Score

        graph = onnx.load(folder / "bundle" / "backbone.onnx").graph
        names = [n.name for n in graph.node if n.op_type == "Conv"][:4]
        score = Score(0.9, 0.95, 0.01, 0.02, 0.97)
        points = tuple(Point(tuple(names[:i]), {"backbone": score}, 2.0, 0.5, 1.0, 3.0) for i in range(3))
        costs = tuple(NodeCost(name, "Conv", (name,), 0.1, score, score) for name in names)
        held_out = HeldOutFacts(4, 8, 16, "0" * 64)
        budget = BudgetSpec(max_map_drop=0.5, scope="backbone")
        facts = ("osnet_x0_25 32x16", "minmax", "backbone", budget, held_out, points[0])
        BudgetSearch(*facts, costs, points, chosen, 8, 0, 1.5).save(folder / "budget.json")

    def _journal(self, folder: Path) -> None:
        """What an embedding leaves that was interrupted behind its last batch."""
        target = folder / "j.npz"

        def embed() -> tuple[int, Any]:
            from nformer_edge.core.journal import Journal

            Journal.remove = lambda self: None
            return command("embed", folder / "bundle", "--data", self.data, "-o", target, "--batch", 4)

        assert attempt(embed, limit_s=300).status == DONE
        Path(f"{target}.journal").rename(folder / "f.journal")

    def _format_1(self, folder: Path) -> None:
        """The bundle as the version before this one wrote it."""
        old = copy(folder / "bundle", folder / "format1") / "manifest.json"
        manifest = json.loads(old.read_text()) | {"format_version": 1}
        del manifest["sha256"]
        old.write_text(json.dumps(manifest))

    def _weights(self, path: Path, seed: int) -> None:
        """A classifier's weights as torchreid publishes them."""
        import torch

        from nformer_edge.core.spec import BackboneSpec
        from nformer_edge.model.backbone import Backbone

        torch.manual_seed(seed)
        state = dict(Backbone(BackboneSpec("osnet_x0_25", 16)).trunk.state_dict())
        state |= {"fc.0.weight": torch.randn(512, 128), "fc.0.bias": torch.zeros(512)}
        state |= {f"fc.1.{name}": torch.ones(512) for name in ("weight", "bias", "running_mean", "running_var")}
        torch.save(state, path)

    def _csv(self, folder: Path) -> None:
        rows = ["path,pid,camid,split"]
        for split, name in (("train", "bounding_box_train"), ("query", "query"), ("gallery", "bounding_box_test")):
            for path in sorted((self.data / name).iterdir())[: 8 if folder.name == "a" else 6]:
                rows.append(f"{path.relative_to(self.root)},{int(path.name[:4])},{int(path.name[6])},{split}")
        (folder / "list.csv").write_text("\n".join(rows) + "\n")

    def _state(self, folder: Path) -> None:
        """The state of a training that was interrupted after its first epoch."""
        out = folder / "t" / "h.safetensors"
        out.parent.mkdir()

        def train() -> tuple[int, Any]:
            from nformer_edge.training.state import StateFile

            write = StateFile.write

            def stop(self: Any, tensors: Any, counters: Any) -> None:
                write(self, tensors, counters)
                raise KeyboardInterrupt

            StateFile.write, StateFile.due = stop, lambda self: True
            return command(*self.training(folder, out))

        attempt(train, limit_s=300)
        (out.parent / "h.unfinished" / "state" / "head.safetensors").rename(folder / "h.state")

    def training(self, folder: Path, out: Path) -> tuple[object, ...]:
        return ("train", "--features", folder / "f.npz", "--config", folder / "train.toml", "-o", out, "--resume")

    def kinds(self) -> list[Kind]:
        a, b = self.root / "a", self.root / "b"

        def search(path: Path, work: Path) -> tuple[int, Any]:
            return self.search(path, self.images)

        def head(path: Path, work: Path) -> tuple[int, Any]:
            return self.search(a / "bundle", path)

        rows = [
            Kind("checkpoint", a / "m.safetensors", b / "m.safetensors", search),
            Kind("student", a / "student.safetensors", b / "student.safetensors", search),
            Kind("bundle", a / "bundle", b / "bundle", search),
            Kind("engine FP32", a / "fp32", b / "fp32", search),
            Kind("engine INT8", a / "int8", b / "int8", search),
            Kind("feature store", a / "f.npz", b / "f.npz", head),
            Kind("teacher store", a / "teacher.npz", b / "teacher.npz", self._taught),
            Kind("calibration table", a / "calibration.json", b / "calibration.json", self._calibrated),
            Kind("budget", a / "budget.json", b / "budget.json", self._excluded),
            Kind("embed journal", a / "f.journal", b / "f.journal", self._embedded),
            Kind("training state", a / "h.state", b / "h.state", self._resumed),
            Kind("result JSON", a / "evaluation.json", b / "evaluation.json", self._reported, sealed=False),
            Kind("format 1", a / "format1", b / "format1", self._upgraded, sealed=False),
            Kind("weights", a / "weights.pth", b / "weights.pth", self._imported, sealed=False),
            Kind("TOML configuration", a / "train.toml", b / "train.toml", self._configured, sealed=False),
            Kind("recipe", a / "recipe.toml", b / "recipe.toml", self._recipe, sealed=False),
            Kind("CSV list", a / "list.csv", b / "list.csv", self._listed, sealed=False),
        ]
        return rows

    def search(self, model: Path, gallery: Path, *how: object) -> tuple[int, Any]:
        plain = ("search", model, "--query", self.query, "--gallery", gallery, "--json", "--threads", 1)
        code, out = command(*plain, *how)
        return code, digest(json.dumps(_plain(json.loads(out)))) if code == 0 else None

    def _calibrated(self, path: Path, work: Path) -> tuple[int, Any]:
        return self._built(work, "--calib-data", path)

    def _excluded(self, path: Path, work: Path) -> tuple[int, Any]:
        from nformer_edge.quantize.spec import read_exclude

        return direct(lambda: read_exclude([str(path)]))

    def _built(self, work: Path, *how: object) -> tuple[int, Any]:
        out = work / "engine"
        shutil.rmtree(out, ignore_errors=True)
        code, _ = command(
            "build-engine", self.root / "a" / "bundle", "-o", out, "--int8", "--backend", "onnxruntime", *how
        )
        return code, digest((out / "backbone.onnx").read_bytes()) if code == 0 else None

    def _embedded(self, path: Path, work: Path) -> tuple[int, Any]:
        out = work / "e.npz"
        shutil.copyfile(path, f"{out}.journal")
        bundle = self.root / "a" / "bundle"
        code, _ = command("embed", bundle, "--data", self.data, "-o", out, "--batch", 4, "--threads", 1)
        if code:
            return code, None
        with np.load(out, allow_pickle=False) as z:
            return code, digest(b"".join(z[name].tobytes() for name in sorted(z.files) if name.endswith("/features")))

    def _resumed(self, path: Path, work: Path) -> tuple[int, Any]:
        place = work / "t"
        shutil.rmtree(place, ignore_errors=True)
        state = place / "h.unfinished" / "state" / "head.safetensors"
        state.parent.mkdir(parents=True)
        shutil.copyfile(path, state)
        code, _ = command(*self.training(self.root / "a", place / "h.safetensors"))
        return code, digest((place / "h.safetensors").read_bytes()) if code == 0 else None

    def _upgraded(self, path: Path, work: Path) -> tuple[int, Any]:
        code, _ = command("upgrade", path)
        return self.search(path, self.images) if code == 0 else (code, None)

    def _imported(self, path: Path, work: Path) -> tuple[int, Any]:
        out = work / "i.safetensors"
        code, _ = command(*self.importing(path, out), "--force")
        return code, digest(out.read_bytes()) if code == 0 else None

    def importing(self, weights: Path, out: Path | str) -> tuple[object, ...]:
        return ("import", weights, "-o", out, "--arch", "osnet_x0_25", "--features", 16, "--imgsz", 32, 16, "--partial")

    def _reported(self, path: Path, work: Path) -> tuple[int, Any]:
        code, _ = command("report", path, "-o", work / "page.html")
        return code, digest((work / "page.html").read_bytes()) if code == 0 else None

    def _configured(self, path: Path, work: Path) -> tuple[int, Any]:
        from nformer_edge.training.config import configure

        return direct(lambda: configure(path))

    def _recipe(self, path: Path, work: Path) -> tuple[int, Any]:
        from nformer_edge.compress.recipe import read_recipe

        return direct(lambda: read_recipe(path))

    def _taught(self, path: Path, work: Path) -> tuple[int, Any]:
        place = work / "c"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        code, _ = command(*self.compressing(self.root / "a", path), "-o", place / "s.safetensors")
        assert not code or not tree(place), "a refusal left files"
        return code, digest((place / "s.safetensors").read_bytes()) if code == 0 else None

    def compressing(self, folder: Path, store: Path | None = None) -> tuple[object, ...]:
        how = ("--recipe", folder / "recipe.toml", "--teacher", store or folder / "teacher.npz")
        return ("compress", folder / "m.safetensors", "--data", self.data, *how)

    def _listed(self, path: Path, work: Path) -> tuple[int, Any]:
        beside = self.root / f"{work.name}.csv"  # its paths are relative
        shutil.copyfile(path, beside)
        code, out = command("summary", "--data", beside, "--layout", "csv", "--json")
        return code, digest(out) if code == 0 else None


def direct(function: Callable[[], object]) -> tuple[int, Any]:
    """What a command does before it computes for minutes, ended as a command ends."""
    from nformer_edge.core.errors import Error

    try:
        return 0, digest(repr(function()))
    except Error as e:
        print(f"nformer-edge: error: {e}", file=sys.stderr)
        return e.exit_code, None


_TOML = """seed = {seed}
holdout = 0.0

[model.backbone]
arch = "osnet_x0_25"
features = 16

[model.head]
layers = 1
heads = 2
k = 3
landmarks = 3

[head]
epochs = 2
sets = 2
set_size = 8
views = 1
"""

_RECIPE = """seed = {seed}
holdout = 0.0

[[steps]]
kind = "distil"
logits = 0.5

[steps.train]
epochs = 1
p = 2
k = 2
warmup = 0
"""
