"""ONNX file to plan, for TensorRT 8.5 to 11 and TensorRT-RTX, with every value that comes back checked.

TensorRT 10, 11 and TensorRT-RTX read the precision from the graph's types (a strongly typed network; 11 knows no
other). TensorRT 8 is told by flags: see `weakly_typed`. `backends.tensorrt.job` runs this module as a process of its
own, which loads only the builder.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from nformer_edge.backends.engine import BuiltFor
from nformer_edge.backends.tensorrt import weakly_typed
from nformer_edge.backends.tensorrt.audit import layers_from_json, layers_from_listing
from nformer_edge.backends.tensorrt.cuda import gpu_facts
from nformer_edge.backends.tensorrt.job import Answer, BuiltPlan, PlanJob, Refusal
from nformer_edge.backends.tensorrt.plugin import ahead
from nformer_edge.backends.tensorrt.plugin.library import load_plugin
from nformer_edge.core.artifact import atomic_write
from nformer_edge.core.errors import BackendError, Error, UsageError
from nformer_edge.core.values import dumps, from_json, to_json


def version(trt: Any) -> tuple[int, ...]:
    """Major and minor of a TensorRT, such as (10, 3). TensorRT-RTX 1.x has the interface of 11.

    The bindings that are installed are asked, not the metadata: JetPack's has none.
    """
    return (11, 0) if is_rtx(trt) else tuple(int(part) for part in str(trt.__version__).split(".")[:2])


def is_rtx(trt: Any) -> bool:
    """Whether the module is TensorRT-RTX's."""
    return hasattr(trt, "ComputeCapability")


def build_plan(trt: Any, job: PlanJob) -> BuiltPlan:
    """Builds one plan with the module `trt`, of TensorRT or TensorRT-RTX, and writes it.

    Raises:
        BackendError: with TensorRT's own lines, if any step is refused.
        UsageError: for an option that this version does not have.
    """
    logger = make_logger(trt, job.log, job.verbose)
    build = _Build(trt, job, logger)
    plan = build.plan()
    with atomic_write(job.plan) as file:
        file.write(plan)
    layers = layers_from_listing(logger.listing) if is_rtx(trt) else layers_from_json(build.inspect(plan))
    if not layers:
        hint = "Report this with the build log."
        raise BackendError(f"{job.package}: {job.part}", "no list of layers", "one, to audit the precision by", hint)
    kernels = build.ahead.facts() if build.ahead is not None else ()
    return BuiltPlan(str(trt.__version__), tuple(layers), built_for(job), kernels)


def built_for(job: PlanJob) -> BuiltFor:
    """The GPU here, or the compute capabilities that were asked for."""
    if job.capabilities:
        return BuiltFor(compute_capabilities=job.capabilities)
    gpu = gpu_facts(0)
    found = BuiltFor(gpu.name, gpu.compute_capability, gpu.multiprocessors)
    return found if job.hardware_compat == "none" else replace(found, hardware_compat=job.hardware_compat)


def make_logger(trt: Any, path: str, verbose: bool) -> Any:
    """A logger that appends each line to the file at once, so that it outlives an abort.

    ``errors`` keeps the warnings and errors since they were last cleared, ``listing`` TensorRT-RTX's list of layers,
    which it prints as one verbose message and tells in no other way where there is no GPU.
    """
    levels = trt.ILogger
    kinds = (levels.INTERNAL_ERROR, levels.ERROR, levels.WARNING, levels.INFO, levels.VERBOSE)
    words = dict(zip(map(int, kinds), ("error", "error", "warning", "info", "verbose"), strict=True))

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.listing = ""

        def log(self, severity: Any, msg: str) -> None:
            word = words[int(severity)]
            if word in ("error", "warning"):
                self.errors.append(msg)
            if msg.startswith("Layers:"):
                self.listing += msg + "\n"
            if word != "verbose" or verbose:
                with open(path, "a") as file:
                    file.write(f"{word}: {msg}\n")

    return Logger()


class _Build:
    def __init__(self, trt: Any, job: PlanJob, logger: Any) -> None:
        self._trt, self._job, self._logger = trt, job, logger
        self._strong = version(trt) >= (10, 0)
        self.ahead: ahead.AheadOfTime | None = None  # has the kernels of ours that the plan carries

    def plan(self) -> bytes:
        trt, job = self._trt, self._job
        self._checked("registering TensorRT's own plugins", trt.init_libnvinfer_plugins(self._logger, ""))
        if job.plugin:
            load_plugin(trt, Path(job.plugin), job.plugin_sha256)
        if job.ahead_of_time:
            self.ahead = ahead.register_operators(trt, job.hardware_compat, self._logger.errors)
        builder = self._checked("making a builder", trt.Builder(self._logger))
        network = self._checked("making a network", builder.create_network(self._network_flags()))
        self._parse(network)
        config = self._checked("making a configuration", builder.create_builder_config())
        self._configure(config)
        self._add_profile(builder, network, config)
        if not self._strong:
            weakly_typed.apply(trt, network, config, job, self._checked)
        self._logger.errors.clear()
        plan = self._checked("building", builder.build_serialized_network(network, config))
        self._keep_timings(config)
        return bytes(plan)

    def inspect(self, plan: bytes) -> str:
        """The layers as TensorRT's inspector tells them of the finished plan."""
        trt = self._trt
        runtime = self._checked("making a runtime", trt.Runtime(self._logger))
        if self._job.version_compat:
            runtime.engine_host_code_allowed = True  # our own plan, a moment old
        engine = self._checked("reading the plan back", runtime.deserialize_cuda_engine(plan))
        inspector = self._checked("making an inspector", engine.create_engine_inspector())
        # Without shapes, TensorRT tells "N/A due to dynamic shapes" in place of types.
        context = self._checked("making a context to inspect by", self._context(engine))
        for name, (_, opt, _) in self._job.profile.items():
            self._checked(f"inspecting at {name} {list(opt)}", context.set_input_shape(name, opt))
        inspector.execution_context = context
        return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

    def _context(self, engine: Any) -> Any:
        """An execution context that takes no memory of the GPU: nothing is run in it."""
        trt = self._trt
        if hasattr(trt, "ExecutionContextAllocationStrategy"):  # from 10.0 on
            return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        return engine.create_execution_context_without_device_memory()

    def _checked(self, doing: str, found: Any) -> Any:
        """What TensorRT returned, unless it is None or False."""
        if found is not None and found is not False:
            return found
        said = " | ".join(self._logger.errors[-6:]) or "nothing"
        doing = f"{self._job.package} {self._trt.__version__}: {doing}, for the {self._job.part}"
        hint = "See the lines above; --verbose logs all that the builder prints."
        raise BackendError(doing, f"a refusal. It said: {said[:2000]}", "success", hint)

    def _network_flags(self) -> int:
        trt = self._trt
        if version(trt) >= (10, 0):
            flag = ahead.network_flag(trt) if self._job.ahead_of_time else 0
            return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) | flag
        return weakly_typed.network_flags(trt)

    def _parse(self, network: Any) -> None:
        parser = self._checked("making an ONNX parser", self._trt.OnnxParser(network, self._logger))
        if not parser.parse(Path(self._job.graph).read_bytes()):
            found = [parser.get_error(i) for i in range(parser.num_errors)]
            self._logger.errors += [f"node {error.node()}: {error.desc()}" for error in found]
            self._checked("parsing the ONNX graph", False)

    def _configure(self, config: Any) -> None:
        trt, job = self._trt, self._job
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default; with it, FP32 multiplications read 10 bits of 23
        if job.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace)
        if job.version_compat:
            self._require_86("version_compat")
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        self._set_hardware_compat(config)
        if job.dla is not None:
            config.default_device_type = trt.DeviceType.DLA
            config.DLA_core = job.dla
            config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
        if job.timing_cache:
            file = Path(job.timing_cache)
            cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
            cache = self._checked(f"reading the timing cache {file}", cache)
            self._checked(f"taking the timing cache {file}", config.set_timing_cache(cache, False))
        if hasattr(trt, "ComputeCapability"):  # TensorRT-RTX
            config.num_compute_capabilities = len(job.capabilities)
            for i, capability in enumerate(job.capabilities):
                name = f"SM{capability.replace('.', '')}"
                known = self._checked(f"compiling for {capability}", getattr(trt.ComputeCapability, name, None))
                self._checked(f"compiling for {capability}", config.set_compute_capability(known, i))

    def _set_hardware_compat(self, config: Any) -> None:
        trt, wanted = self._trt, self._job.hardware_compat
        if wanted != "none":
            self._require_86("hardware_compat")
        if wanted == "ampere_plus":
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        elif wanted == "same_compute_capability":
            if hasattr(trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY"):
                config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
                return
            got = f"{wanted} with TensorRT {trt.__version__}"
            raise UsageError("hardware_compat", got, "a later TensorRT 10", "Use ampere_plus, or leave it out.")

    def _require_86(self, option: str) -> None:
        """Raises UsageError in TensorRT 8.5, whose plans run on their own GPU and version alone."""
        if not hasattr(self._trt, "HardwareCompatibilityLevel"):
            hint = "Leave it out, and build where the plan will run."
            raise UsageError(option, f"TensorRT {self._trt.__version__}", "8.6 or later", hint)

    def _add_profile(self, builder: Any, network: Any, config: Any) -> None:
        profile = self._checked("making a profile", builder.create_optimization_profile())
        names = [network.get_input(i).name for i in range(network.num_inputs)]
        for name, shapes in self._job.profile.items():
            if name not in names:
                self._logger.errors.append(f"inputs are {', '.join(names)}")
                self._checked(f"finding the input {name}", None)
            profile.set_shape(name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            self._checked(f"adding the profile {self._job.profile}", False)

    def _keep_timings(self, config: Any) -> None:
        if not self._job.timing_cache:
            return
        cache = self._checked("reading the timings", config.get_timing_cache())
        with atomic_write(self._job.timing_cache) as file:
            file.write(bytes(self._checked("keeping the timings", cache.serialize())))


def work(job: PlanJob) -> BuiltPlan:
    """Builds the plan, in the builder's own process.

    Raises:
        Error: as `build_plan` does, or if the package cannot be imported.
    """
    if job.device:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(job.device)
    try:
        trt = importlib.import_module(job.package)
    except (ImportError, OSError) as e:
        hint = "Install it again, with the CUDA libraries that it names."
        raise BackendError(job.package, f"a package that cannot be imported ({e})", "one that can", hint) from e
    return build_plan(trt, job)


def main(request: str, answer: str) -> int:
    """Reads a `PlanJob`, writes an `Answer`."""
    job = from_json(PlanJob, json.loads(Path(request).read_text()))
    try:
        found = Answer(plan=work(job))
    except Error as e:
        got, expected = (None if part is None else str(part) for part in (e.got, e.expected))
        found = Answer(refusal=Refusal(e.subject, got, expected, e.hint or ""))
    Path(answer).write_text(dumps(to_json(found)))
    return 0 if found.refusal is None else 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
