"""A module ``tensorrt`` made of one version's list of names: what is not in the list is not in the module.

It parses ONNX files with the package onnx and "builds" a plan that is the file itself; the inspector then tells layers
in that version's words. What it does beyond names is what NVIDIA's documentation says of each call.
"""

from __future__ import annotations

import enum
import json
import types
from pathlib import Path
from typing import Any

LISTS = Path(__file__).parent / "tensorrt_names"

#: What the oldest parser that we prepare graphs for knows, by onnx-tensorrt's docs/operators.md at release/8.5-GA.
OPERATORS_OF_8 = (Path(__file__).parent / "operators_of_tensorrt_8.5.txt").read_text().split()

#: Nodes of which that parser makes layers without the node's name.
NAMELESS = ("ReduceL2", "LayerNormalization", "Gemm")
MAGIC = b"plan:"


class Machine:
    """What fails, and what was asked for."""

    def __init__(self) -> None:
        self.failing: dict[str, Any] = {}  # call -> what it returns instead
        self.lines: dict[str, str] = {}  # call -> what it says
        self.built: list[dict[str, Any]] = []
        self.wrong_type: dict[str, str] = {}  # node -> type that the builder chooses for it whatever was asked
        self.creators: set[str] = set()
        self.dies = False


def fake_tensorrt(version: str, machine: Machine) -> types.ModuleType:
    """Version is that of a list, such as ``10.3``."""
    names = json.loads((LISTS / f"{version}.json").read_text())
    trt = types.ModuleType("tensorrt")
    trt.__version__ = names["version"]
    major = int(version.partition(".")[0])
    for name, members in names["enums"].items():
        setattr(trt, name, enum.IntEnum(name, members, start=0))
    for name, members in names["classes"].items():
        if "." not in name and name not in names["enums"]:
            played = globals().get(f"Fake{name}")
            setattr(trt, name, _strict(trt, machine, name, set(members), played, major))
    trt.get_plugin_registry = lambda: trt.IPluginRegistry()
    trt.init_libnvinfer_plugins = lambda logger, namespace: True
    assert {"get_plugin_registry", "init_libnvinfer_plugins"} <= set(names["functions"])
    for i, name in enumerate(("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")):
        assert name in names["classes"]["ILogger"]
        setattr(trt.ILogger, name, i)
    return trt


def _strict(trt, machine, name, members, played, major):
    """A class that has nothing but `members`: playing those of `played`, and keeping the others as they are set."""
    body = {k: v for k, v in vars(played).items() if k in members or k.startswith("_")} if played else {}

    def __setattr__(self, key, value):
        if not key.startswith("_") and key not in members and name != "ILogger":
            raise AttributeError(f"tensorrt {trt.__version__}: {name} has no {key}")
        object.__setattr__(self, key, value)

    body |= {"__setattr__": __setattr__, "_trt": trt, "_machine": machine, "_major": major}
    body.pop("__dict__", None)
    body.pop("__weakref__", None)
    return type(name, (), body)


def _call(self, name: str, result: Any) -> Any:
    if name in self._machine.lines:
        self._logger.log(self._trt.ILogger.ERROR, self._machine.lines[name])
    return self._machine.failing.get(name, result)


class FakeBuilder:
    def __init__(self, logger) -> None:
        self._logger = logger

    def create_network(self, flags):
        network = self._trt.INetworkDefinition()
        network._flags, network._logger = flags, self._logger
        return _call(self, "create_network", network)

    def create_builder_config(self):
        config = self._trt.IBuilderConfig()
        config._asked, config._logger = {"flags": []}, self._logger
        return _call(self, "create_builder_config", config)

    def create_optimization_profile(self):
        profile = self._trt.IOptimizationProfile()
        profile._shapes = {}
        return _call(self, "create_optimization_profile", profile)

    def build_serialized_network(self, network, config):
        self._logger.log(self._trt.ILogger.INFO, "Engine generation completed")
        asked = config._asked | {
            "network_flags": network._flags, "held": {n.name for n in network._layers if hasattr(n, "precision")},
            "workspace": getattr(config, "_workspace", None), "model": network._model,
            "compat": getattr(config, "hardware_compatibility_level", None),
            "dla": getattr(config, "DLA_core", None),
        }  # fmt: skip
        self._machine.built.append(asked)
        plan = MAGIC + network._model.SerializeToString()
        return _call(self, "build_serialized_network", plan)


class FakeINetworkDefinition:
    _model = None
    _layers = ()

    @property
    def num_inputs(self):
        return len(self._model.graph.input)

    def get_input(self, index):
        tensor = self._trt.ITensor()
        tensor.name = self._model.graph.input[index].name
        return tensor

    @property
    def num_layers(self):
        return len(self._layers)

    def get_layer(self, index):
        return self._layers[index]


class FakeILayer:
    _outputs = ()

    @property
    def num_outputs(self):
        return len(self._outputs)

    def get_output(self, index):
        return self._outputs[index]

    def set_output_type(self, index, dtype):
        self._outputs[index].dtype = dtype


class FakeOnnxParser:
    def __init__(self, network, logger) -> None:
        self._network, self._logger = network, logger

    @property
    def num_errors(self):
        return 1

    def get_error(self, index):
        return self._trt.ParserError()

    def parse(self, model):
        import onnx

        parsed = onnx.load_from_string(bytes(model))
        opset = next(o.version for o in parsed.opset_import if not o.domain)
        ours = {node.op_type for node in parsed.graph.node if node.domain}
        kinds = {node.op_type for node in parsed.graph.node if not node.domain}
        if self._major < 10 and (opset > 17 or not kinds <= set(OPERATORS_OF_8)):
            return False
        if not ours <= self._machine.creators or parsed.functions:
            return False
        network = self._network
        network._model, network._layers = parsed, []
        types = _types(parsed)
        for node in parsed.graph.node:
            layer = self._trt.ILayer()
            layer.name = f"(Unnamed Layer* 0) {node.op_type}" if node.op_type in NAMELESS else node.name
            layer.type = self._trt.LayerType.PLUGIN_V2 if node.domain else self._trt.LayerType.IDENTITY
            layer._outputs = [self._tensor(types.get(name, 0)) for name in node.output]
            network._layers.append(layer)
        return _call(self, "parse", True)

    def _tensor(self, kind):
        tensor, kinds = self._trt.ITensor(), self._trt.DataType
        tensor.dtype = {1: kinds.FLOAT, 10: kinds.HALF, 3: kinds.INT8}.get(kind, kinds.INT32)
        return tensor


class FakeParserError:
    def desc(self):
        return "No importer registered for op"

    def node(self):
        return 3


class FakeIBuilderConfig:
    def set_flag(self, flag):
        self._asked["flags"].append(flag.name)

    def clear_flag(self, flag):
        self._asked["cleared"] = [*self._asked.get("cleared", ()), flag.name]

    def set_memory_pool_limit(self, pool, pool_size):
        assert pool == self._trt.MemoryPoolType.WORKSPACE
        self._workspace = pool_size

    def create_timing_cache(self, serialized_timing_cache):
        cache = self._trt.ITimingCache()
        cache._bytes = bytes(serialized_timing_cache)
        return _call(self, "create_timing_cache", cache)

    def set_timing_cache(self, cache, ignore_mismatch):
        self._cache = cache
        return _call(self, "set_timing_cache", True)

    def get_timing_cache(self):
        return self._cache

    def add_optimization_profile(self, profile):
        self._asked["profile"] = profile._shapes
        return _call(self, "add_optimization_profile", 0)


class FakeITimingCache:
    def serialize(self):
        return self._bytes + b"timed;"


class FakeIOptimizationProfile:
    def set_shape(self, input, min, opt, max):
        self._shapes[input] = (min, opt, max)


class FakeRuntime:
    def __init__(self, logger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        engine = self._trt.ICudaEngine()
        engine._plan, engine._logger = serialized_engine, self._logger
        return _call(self, "deserialize_cuda_engine", engine)


class FakeICudaEngine:
    def create_execution_context(self, strategy):
        assert strategy == self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return self._context()

    def create_execution_context_without_device_memory(self):
        return self._context()

    def _context(self):
        context = self._trt.IExecutionContext()
        context._shapes, context._logger = {}, self._logger
        return _call(self, "create_execution_context", context)

    def create_engine_inspector(self):
        inspector = self._trt.EngineInspector()
        inspector._plan = self._plan
        return inspector


class FakeIExecutionContext:
    def set_input_shape(self, name, shape):
        self._shapes[name] = shape
        return _call(self, "set_input_shape", True)


class FakeEngineInspector:
    """Each node is a layer, in the types of its inputs; TensorRT 8 follows its flags. Nothing without shapes."""

    def get_engine_information(self, format):
        import onnx

        assert format == self._trt.LayerInformationFormat.JSON
        model = onnx.load_from_string(bytes(self._plan)[len(MAGIC) :])
        types, made_by = _types(model), {name: n for n in model.graph.node for name in n.output}
        asked = self._machine.built[-1]
        layers = []
        if not self.execution_context._shapes:
            return json.dumps({"Layers": [{"Name": "x", "Inputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]}]})
        for node in model.graph.node:
            if not node.input or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                continue
            kind = {1: "fp32", 10: "fp16"}.get(types.get(node.input[0], 0), "")
            sources = [made_by.get(name) for name in node.input[:2]]
            if all(source is not None and source.op_type == "DequantizeLinear" for source in sources):
                kind = "int8"
            elif self._major < 10 and kind and "FP16" in asked["flags"] and node.name not in asked["held"]:
                kind = "fp16"
            layers.append(self._told(node, self._machine.wrong_type.get(node.name, kind)))
        return json.dumps({"Layers": layers, "Bindings": []})

    def _told(self, node, kind):
        words = {"int8": "Int8", "fp16": "Half", "fp32": "Float", "": "Int32"}
        old = {"int8": "Int8 NCxHW32", "fp16": "Channel major FP16", "fp32": "Row major linear FP32", "": "Int32"}
        said = {"Format/Datatype": old[kind]} if self._major < 11 else {"Datatype": words[kind], "Format": "Linear"}
        tensor = {"Name": "t", "Dimensions": [1], **said}
        kind_of_layer = {"Conv": "CaskConvolution", "Gemm": "gemm"}.get(node.op_type, node.op_type)
        layer = {"Name": node.name, "LayerType": kind_of_layer, "Inputs": [tensor], "Outputs": [tensor]}
        return layer | ({"Metadata": f"[ONNX Layer: {node.name}]"} if self._major >= 10 else {})


class FakeIPluginRegistry:
    def load_library(self, plugin_path):
        self._machine.creators |= {"RowTopK", "ReciprocalNeighborAttention"}
        return object()

    def _find(self, name, version, plugin_namespace=""):
        return name if name in self._machine.creators else None

    get_creator = get_plugin_creator = _find


def _types(model) -> dict[str, int]:
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model)
    infos = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    return {i.name: i.type.tensor_type.elem_type for i in infos} | {
        t.name: t.data_type for t in model.graph.initializer
    }
