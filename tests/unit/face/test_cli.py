"""The command line: no flag that nothing reads, no default that the functions do not have."""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect

import pytest

from nformer_edge import cli

ENGINE = ("backends.spec:EngineSpec", "quantize.spec:BudgetSpec", "quantize.prepare:CalibrationData")

#: The functions that read a command's flags, where it is more than one call.
CALLED = {
    "make-data": ("data.generate:generate_dataset", "data.generate:GenerateSpec"),
    "summary": ("data.summary:summarize",),
    "train": ("training.config:configure", "training.config:HeadConfig", "core.spec:HeadSpec", "training.train:train"),
    "import": ("model.weights:import_checkpoint", "model.importers.plan:Wanted"),
    "export": ("exporting.export:export_bundle", "report.accuracy:evaluate"),
    "modelopt": ("quantize.modelopt:bundle_by_modelopt",),
    "build-engine": ("targets.build:build_for_target", *ENGINE),
    "prepare": ("targets.trtexec:prepare_for_target", *ENGINE),
    "embed": ("gallery.embed:embed_files",),
    "gallery add": ("gallery.model:open", "gallery.model:Model.gallery", "gallery.enroll:add_data"),
    "gallery search": ("gallery.model:open", "gallery.model:Model.gallery", "gallery.gallery:Gallery.search"),
    "gallery migrate": ("gallery.model:open", "gallery.gallery:Gallery.migrate"),
    **{f"gallery {verb}": (f"gallery.gallery:Gallery.{verb}",) for verb in
       ("remove", "compact", "stats", "audit", "backup", "merge")},
    "serve": ("gallery.service.server:serve", "gallery.service.settings:Settings"),
    "parity": ("report.parity:parity",),
    "benchmark": ("report.benchmark:benchmark",),
    "report": ("report.html.page:write_report",),
    "demo": ("demo:run_demo",),
}  # fmt: skip

#: Flags that a command reads itself.
OWN = {"json", "verbose", "out_json", "help"} | {"layout", "pattern", "root", "same_camera"}
OWN |= {"require_signed", "signed_since"}
READ = {
    "summary": {"data"}, "train": {"features", "preset", "config"}, "benchmark": {"models"},
    "build-engine": {"calib_data", "force_calibration", "budget_images", "budget_scope"},
    **{f"gallery {verb}": {"path"} for verb in ("remove", "compact", "stats", "audit", "backup", "merge")},
    **{f"gallery {verb}": {"path", "model"} for verb in ("add", "search", "migrate")},
    "prepare": {"calib_data", "force_calibration", "budget_images", "budget_scope"},
}  # fmt: skip


def parsers() -> dict[str, argparse.ArgumentParser]:
    def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
        (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        return dict(action.choices)

    found = commands(cli.parser())
    return found | {f"gallery {verb}": parser for verb, parser in commands(found["gallery"]).items()}


def parameters(where: str) -> set[str]:
    module, _, name = where.partition(":")
    found = importlib.import_module(f"nformer_edge.{module}")
    return set(inspect.signature(functools.reduce(getattr, name.split("."), found)).parameters)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_flag_is_a_parameter_of_what_the_command_calls(name: str) -> None:
    command, parser = cli.COMMANDS[name], parsers()[name]
    known = set().union(*map(parameters, (command.calls,) if command.calls else CALLED[name]))
    flags = {action.dest for action in parser._actions} - OWN - READ.get(name, set())
    assert flags <= known, f"nothing reads {sorted(flags - known)}"


def test_a_flag_that_was_not_given_is_not_passed_on() -> None:
    args = cli.parser().parse_args(["evaluate", "model", "--data", "d"])
    assert set(vars(args)) == {"command", "model", "data", "json", "verbose"}


@pytest.mark.parametrize("flag", ["--same-camera", "--layout folders", "--root d", "--pattern x"])
@pytest.mark.parametrize("line", ["evaluate m --data s.npz", "search m --query q.jpg --gallery s.npz"])
def test_what_says_how_images_are_read_is_refused_with_a_feature_store(line: str, flag: str, capsys) -> None:
    assert cli.main([*line.split(), *flag.split()]) == 2
    assert f"{flag.split()[0]}: got a feature store, expected images. " in capsys.readouterr().err


def test_the_check_sees_a_flag_that_nothing_reads() -> None:
    assert not {"nonsense"} <= parameters("report.accuracy:evaluate")
    with pytest.raises(AttributeError):
        parameters("report.accuracy:nothing")


@pytest.mark.parametrize("flags", [("--int8", "--fp16"), ("--int8", "--precision", "fp32")])
def test_two_precisions_are_refused(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["build-engine", "bundle", *flags])
    assert "not allowed with argument" in capsys.readouterr().err
