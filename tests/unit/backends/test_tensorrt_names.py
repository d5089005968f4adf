"""Every name that our code takes from TensorRT is in the bindings of each version, or behind a test for it.

The lists in `tensorrt_names` were taken from the bindings' own packages by `collect.py` beside them, which also checks
them against packages. TensorRT-RTX is asked itself where it is installed.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import nformer_edge
from nformer_edge.backends.tensorrt.plugin import ahead

TENSORRT = Path(nformer_edge.__file__).parent / "backends" / "tensorrt"
LISTS = Path(__file__).parents[2] / "helpers" / "tensorrt_names"
WHEELS = "NFORMER_EDGE_TENSORRT_WHEELS"
VERSIONS = ("8.6", "10.3", "10.9", "10.13", "10.16", "11.4")

#: Names under which our code holds TensorRT's objects, with or without a leading underscore or `self.`.
HELD = {
    "builder": "Builder", "network": "INetworkDefinition", "config": "IBuilderConfig", "parser": "OnnxParser",
    "profile": "IOptimizationProfile", "runtime": "Runtime", "engine": "ICudaEngine", "inspector": "EngineInspector",
    "context": "IExecutionContext", "registry": "IPluginRegistry", "cache": "ITimingCache", "layer": "ILayer",
    "tensor": "ITensor", "error": "ParserError", "kinds": "DataType",
}  # fmt: skip

#: What is run for TensorRT 8 alone, and so checked against it alone.
ONLY_8 = {"weakly_typed.py"}

#: What is run from a version on: `backends.tensorrt.build` asks for it.
LATER = {"ahead.py": (10, 9)}

FILES = [
    *(TENSORRT / f"{name}.py" for name in ("network", "weakly_typed", "context", "plan", "run")),
    *(TENSORRT / "plugin" / f"{name}.py" for name in ("library", "ahead")),
]


class Bindings:
    """The names of one version."""

    def __init__(self, names: dict) -> None:
        self.version = tuple(int(n) for n in names["version"].split(".")[:2])
        self.classes = {name: set(attributes) for name, attributes in names["classes"].items()}
        self.all = {"": set(names["functions"]) | {n for n in self.classes if "." not in n}, **self.classes}

    def has(self, owner: str, name: str) -> bool:
        return name.startswith("__") or name in self.all.get(owner, set())


def bindings(version: str) -> Bindings:
    return Bindings(json.loads((LISTS / f"{version}.json").read_text()))


def owner_of(node: ast.expr) -> str | None:
    """The class that an expression is of: "" for the module itself, None where it is nothing of TensorRT's."""
    if isinstance(node, ast.Name):
        name = node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        name = node.attr
    elif isinstance(node, ast.Attribute) and owner_of(node.value) == "":
        return node.attr  # trt.DataType
    else:
        return None
    name = name.lstrip("_")
    return "" if name == "trt" else HELD.get(name)


class Taken(ast.NodeVisitor):
    """Collects the names that a file takes and one version lacks. Branches that a version does not enter are left."""

    def __init__(self, bindings: Bindings) -> None:
        self.bindings, self.missing, self.seen = bindings, [], 0

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = owner_of(node.value)
        if owner is not None and (owner == "" or owner in HELD.values() or owner in self.bindings.classes):
            self.seen += 1
            if not self.bindings.has(owner, node.attr):
                self.missing.append(f"line {node.lineno}: {owner or 'tensorrt'}.{node.attr}")
        self.generic_visit(node)

    def _branches(self, node: ast.If | ast.IfExp) -> None:
        entered = self._entered(node.test)
        body = node.body if isinstance(node.body, list) else [node.body]
        other = node.orelse if isinstance(node.orelse, list) else [node.orelse]
        if entered is None:
            self.visit(node.test)
        for part, dead in ((body, entered is False), (other, entered is True)):
            for child in [] if dead else part:
                self.visit(child)

    visit_If = visit_IfExp = _branches

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """What follows ``if ...: return`` is not reached by a version that enters it."""
        for child in node.body:
            self.visit(child)
            if isinstance(child, ast.If) and self._entered(child.test) and isinstance(child.body[-1], ast.Return):
                break

    def _entered(self, test: ast.expr) -> bool | None:
        """Whether this version enters: by ``hasattr(object, "name")`` or ``version(trt) >= (10, 0)``; None: unknown."""
        if isinstance(test, ast.Call) and getattr(test.func, "id", "") == "hasattr":
            owner, name = owner_of(test.args[0]), test.args[1]
            if owner is not None and isinstance(name, ast.Constant):
                return self.bindings.has(owner, name.value)
        asks_version = (
            isinstance(test, ast.Compare) and getattr(getattr(test.left, "func", None), "id", "") == "version"
        )
        if asks_version and isinstance(test.ops[0], ast.GtE):
            return self.bindings.version >= ast.literal_eval(test.comparators[0])
        return None


def missing_names(source: str, names: Bindings) -> tuple[list[str], int]:
    taken = Taken(names)
    taken.visit(ast.parse(source))
    return taken.missing, taken.seen


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_every_name_that_our_code_takes_is_in_the_bindings(file, version):
    if file.name in ONLY_8 and version != "8.6":
        return  # `network` enters it below 10 alone: the next test
    if bindings(version).version < LATER.get(file.name, (0,)):
        return
    missing, _ = missing_names(file.read_text(), bindings(version))
    assert missing == []


def test_what_is_only_for_tensorrt_8_is_called_below_10_alone():
    source = (TENSORRT / "network.py").read_text()
    assert source.count("weakly_typed.") == 2
    assert "if not self._strong:\n            weakly_typed.apply(" in source
    assert "self._strong = version(trt) >= (10, 0)" in source
    for path in TENSORRT.parents[1].rglob("*.py"):
        if path.name != "network.py":
            assert "import weakly_typed" not in path.read_text()


def test_kernels_go_into_plans_from_the_version_on_that_can():
    assert LATER["ahead.py"] == ahead.SINCE
    assert ahead.missing_ahead_of_time((10, 8))
    flag = "PREFER_AOT_PYTHON_PLUGINS"
    for version in VERSIONS:
        listed = bindings(version)
        assert listed.has("NetworkDefinitionCreationFlag", flag) == (listed.version >= ahead.SINCE)


def test_the_check_sees_the_names_at_all():
    seen = {file.name: missing_names(file.read_text(), bindings("10.3"))[1] for file in FILES}
    assert seen["network.py"] >= 50
    assert seen["ahead.py"] >= 3
    assert sum(seen.values()) >= 85


@pytest.mark.parametrize(
    ("source", "version", "missing"),
    [
        ("trt.BuilderFlag.FP16", "10.3", []),
        ("trt.BuilderFlag.FP16", "11.4", ["line 1: BuilderFlag.FP16"]),
        ("self._trt.BuilderFlag.FP16", "11.4", ["line 1: BuilderFlag.FP16"]),
        ("config.max_workspace_size = 1", "10.3", ["line 1: IBuilderConfig.max_workspace_size"]),
        ("self._engine.get_binding_name(0)", "10.3", ["line 1: ICudaEngine.get_binding_name"]),
        ("trt.nothing()", "10.3", ["line 1: tensorrt.nothing"]),
        ("x = 1 if version(trt) >= (11, 0) else trt.BuilderFlag.FP16", "11.4", []),
        ("if hasattr(trt.BuilderFlag, 'FP16'):\n    trt.BuilderFlag.FP16", "11.4", []),
        ("if spec.fast:\n    trt.BuilderFlag.FP16", "11.4", ["line 2: BuilderFlag.FP16"]),
        ("def f():\n    if version(trt) >= (10, 0):\n        return 1\n    return trt.BuilderFlag.FP16", "11.4", []),
    ],
)
def test_a_wrong_name_is_found_and_a_version_test_is_understood(source, version, missing):
    assert missing_names(source, bindings(version))[0] == missing


@pytest.mark.skipif(not os.environ.get(WHEELS), reason=f"no wheels of the bindings: name their folder in {WHEELS}")
def test_the_lists_are_what_the_bindings_own_packages_say():
    command = [sys.executable, LISTS / "collect.py", "--check", os.environ[WHEELS]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as committed") >= 4


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="no package tensorrt_rtx")
@pytest.mark.parametrize("file", [f for f in FILES if f.name not in ONLY_8 | LATER.keys()], ids=lambda f: f.name)
def test_every_name_is_in_tensorrt_rtx_too(file):
    import tensorrt_rtx as trt

    public = [name for name in dir(trt) if not name.startswith("_")]
    classes = {name: dir(getattr(trt, name)) for name in public if isinstance(getattr(trt, name), type)}
    names = {"version": "11.0", "functions": [n for n in public if n not in classes], "classes": classes}
    missing, _ = missing_names(file.read_text(), Bindings(names))
    assert missing == []
