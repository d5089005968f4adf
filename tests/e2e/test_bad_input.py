"""Bad input: one line that says what was got and what to do, exit code 2, and nothing lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nformer_edge.core.artifact import OWN_FIELDS, write_manifest
from nformer_edge.core.features import load_features, save_features
from nformer_edge.core.machine import nvidia_driver

Run = Callable[..., object]


def refuses(ran: object, *words: str) -> None:
    assert ran.code == 2, (ran.code, ran.out, ran.err)
    assert ran.out == ""
    said = [line for line in ran.err.strip().splitlines() if ": note: " not in line]
    assert len(said) == 1, ran.err
    assert "Traceback" not in ran.err
    for word in words:
        assert word in ran.err, ran.err


@pytest.fixture
def data(road: Path, tmp_path: Path) -> Path:
    """A copy of the road's dataset that a test may damage."""
    return Path(shutil.copytree(road / "data", tmp_path / "data"))


def test_a_missing_or_empty_folder(run: Run, road: Path, tmp_path: Path) -> None:
    refuses(run("evaluate", road / "bundle", "--data", tmp_path / "none"), "no such folder")
    (tmp_path / "empty").mkdir()
    refuses(run("evaluate", road / "bundle", "--data", tmp_path / "empty"), "empty folder")
    refuses(run("train", "--data", tmp_path / "empty", "-o", tmp_path / "m.safetensors"), "empty folder")


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "empty file"), (b"no image at all", "another kind"), (b"\x89PNG\r\n\x1a\n", "")]
)
def test_an_image_that_cannot_be_read_is_named(run: Run, road: Path, data: Path, content: bytes, said: str) -> None:
    victim = sorted((data / "query").iterdir())[2]
    victim.write_bytes(content)
    refuses(run("evaluate", road / "fp32", "--data", data), victim.name, said)


def test_a_huge_image_is_refused_before_decoding(run: Run, road: Path, tmp_path: Path) -> None:
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    refuses(
        run("search", road / "fp32", "--query", tmp_path / "huge.png", "--gallery", road / "data"), "huge.png", "9000"
    )


def test_a_name_that_does_not_parse_is_shown(run: Run, road: Path, data: Path) -> None:
    shutil.copy(next((data / "query").iterdir()), data / "query" / "IMG_4711.png")
    refuses(run("evaluate", road / "fp32", "--data", data), "IMG_4711.png")


def test_one_identity_cannot_be_trained_on(run: Run, data: Path, tmp_path: Path) -> None:
    for image in (data / "bounding_box_train").iterdir():
        if not image.name.startswith("0001"):
            image.unlink()
    refuses(run("train", "--data", data, "-o", tmp_path / "m.safetensors"), "one identity")


def test_queries_without_any_match_are_refused(run: Run, road: Path, data: Path) -> None:
    for image in (data / "bounding_box_test").iterdir():
        if not image.name.startswith(("0000", "-1")):
            image.unlink()
    refuses(run("evaluate", road / "fp32", "--data", data), "match")


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_features_that_are_none_are_refused_by_row(run: Run, road: Path, tmp_path: Path, value: float) -> None:
    store = tmp_path / "f.npz"
    assert run("embed", road / "fp32", "--data", road / "data", "-o", store).code == 0
    sets = load_features(store)
    sets["gallery"].features[7] = value
    save_features(store, sets)
    refuses(run("evaluate", road / "fp32", "--data", store), "row 7")


def test_a_gallery_smaller_than_k_and_a_gallery_of_one_are_searched(run: Run, road: Path, tmp_path: Path) -> None:
    images = sorted((road / "data" / "query").iterdir())
    (tmp_path / "g").mkdir()
    for count in (1, 3):
        shutil.copy(images[count], tmp_path / "g")
        if count == 3:
            shutil.copy(images[2], tmp_path / "g")
        ran = run("search", road / "fp32", "--query", images[0], "--gallery", tmp_path / "g")
        assert ran.code == 0, ran.err


def test_a_bundle_with_a_changed_byte_is_refused(run: Run, road: Path, tmp_path: Path) -> None:
    for name in ("backbone.onnx", "nformer.onnx", "golden.npz"):
        bundle = Path(shutil.copytree(road / "bundle", tmp_path / name.replace(".", "-")))
        content = bytearray((bundle / name).read_bytes())
        content[len(content) // 2] ^= 0x40
        (bundle / name).write_bytes(content)
        refuses(run("evaluate", bundle, "--data", road / "data"), name, "sha256")
        refuses(run("build-engine", bundle, "-o", tmp_path / "e"), name, "sha256")
    assert not (tmp_path / "e").exists()


def test_a_checkpoint_with_a_changed_byte_or_cut_short_is_refused(run: Run, road: Path, tmp_path: Path) -> None:
    content = bytearray((road / "model.safetensors").read_bytes())
    (tmp_path / "short.safetensors").write_bytes(content[: len(content) // 3])
    content[len(content) // 2] ^= 1
    (tmp_path / "changed.safetensors").write_bytes(content)
    for name in ("short", "changed"):
        refuses(run("export", tmp_path / f"{name}.safetensors", "-o", tmp_path / "b"), name)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("opset", [7, 99])
def test_an_unknown_opset_is_refused(run: Run, road: Path, tmp_path: Path, opset: int) -> None:
    refuses(run("export", road / "model.safetensors", "-o", tmp_path / "b", "--opset", opset), str(opset))


def test_a_manifest_of_a_later_opset_is_refused(run: Run, road: Path, tmp_path: Path) -> None:
    import json

    bundle = Path(shutil.copytree(road / "bundle", tmp_path / "b"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").unlink()
    fields = {k: v for k, v in manifest.items() if k not in OWN_FIELDS}
    write_manifest(bundle, "bundle", fields | {"opset": 99})
    refuses(run("evaluate", bundle, "--data", road / "data"), "opset", "99")


def test_a_full_disk_is_named_and_the_old_file_survives(
    run: Run, road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from nformer_edge.core import artifact

    out = tmp_path / "f.npz"
    out.write_bytes(b"what stood here")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artifact.os, "fsync", full)
    refuses(run("embed", road / "fp32", "--data", road / "data", "-o", out), "No space left", "Free some space")
    assert out.read_bytes() == b"what stood here"
    assert {p.name for p in tmp_path.iterdir()} == {"f.npz", "f.npz.journal"}  # by which the next run goes on


def test_ctrl_c_in_the_middle_leaves_nothing_half_written(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nformer_edge.cli", "make-data", "-o", str(tmp_path / "data")]

    def heed() -> None:  # a test run in the background of a shell has SIGINT ignored, and so would its children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, **pipes, preexec_fn=heed) as process:
        deadline = time.monotonic() + 60
        while not any(tmp_path.rglob("*.png")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].endswith("run the command again.")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_calibrating_on_query_images_is_refused_unless_forced(run: Run, road: Path, data: Path, tmp_path: Path) -> None:
    victim = sorted((data / "bounding_box_train").iterdir())[0]
    shutil.rmtree(data / "bounding_box_train")
    (data / "bounding_box_train").mkdir()
    for i, image in enumerate(sorted((data / "query").iterdir())[:24]):
        shutil.copy(image, data / "bounding_box_train" / f"{1 + i % 4:04d}{victim.name[4:7]}s1_{i:06d}_01.png")
    build = ("build-engine", road / "bundle", "-o", tmp_path / "e", "--int8", "--calib-data", data, "--calib-num", 24)
    refuses(run(*build), "query")
    assert run(*build, "--force-calib").code == 0


def test_int8_without_calibration_images_says_how_to_give_them(run: Run, road: Path, tmp_path: Path) -> None:
    refuses(run("build-engine", road / "bundle", "-o", tmp_path / "e", "--int8"), "--calib-data")


def test_a_backend_that_is_not_here_says_what_is_missing(run: Run, road: Path, tmp_path: Path) -> None:
    if find_spec("tensorrt"):
        pytest.skip("the package tensorrt is here")
    refuses(run("build-engine", road / "bundle", "-o", tmp_path / "e", "--backend", "tensorrt"), "no package tensorrt")


def test_an_engine_for_rtx_is_built_without_a_gpu_and_refused_where_none_can_run_it(
    run: Run, road: Path, tmp_path: Path
) -> None:
    if find_spec("tensorrt_rtx") is None:
        pytest.skip("no package tensorrt_rtx for this machine: pip install 'nformer-edge[tensorrt-rtx]'")
    if nvidia_driver():
        pytest.skip("an NVIDIA driver is here")
    built = run(
        "build-engine", road / "bundle", "-o", tmp_path / "e", "--backend", "tensorrt-rtx", "--capabilities", "8.6"
    )
    assert built.code == 0, built.err
    ran = run("evaluate", tmp_path / "e", "--data", road / "data")
    refuses(ran)
    assert "pycuda" in ran.err or "NVIDIA" in ran.err


def test_a_misspelt_choice_gets_the_nearest_one(run: Run, road: Path, tmp_path: Path) -> None:
    ran = run("build-engine", road / "bundle", "-o", tmp_path / "e", "--backend", "onnxruntim")
    assert ran.code == 2
    assert "Did you mean 'onnxruntime'?" in ran.err


def test_an_output_that_is_not_ours_is_never_replaced(run: Run, road: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    refuses(run("export", road / "model.safetensors", "-o", tmp_path / "photos"), "not ours to replace")
    refuses(run("make-data", "-o", tmp_path / "photos", "--force"), "not ours to replace")
    assert (tmp_path / "photos" / "a.jpg").read_bytes() == b"x"


def test_the_trace_is_shown_only_when_asked_for(run: Run, road: Path, tmp_path: Path) -> None:
    ran = run("evaluate", road / "bundle", "--data", tmp_path / "none", "--verbose")
    assert ran.code == 2
    assert "Traceback" in ran.err


@pytest.mark.parametrize(
    "error", [RecursionError("deep"), KeyError("x"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")]
)
def test_an_error_that_nobody_foresaw_is_one_line_and_exit_code_3(run: Run, monkeypatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("nformer_edge.data.readers.read_dataset", fail)
    ran = run("summary", "--data", "anything")
    assert (ran.code, ran.out, len(ran.err.strip().splitlines())) == (3, "", 1)
    assert type(error).__name__ in ran.err
    assert "--verbose" in ran.err
    assert "Traceback" in run("summary", "--data", "anything", "--verbose").err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MemoryError(), 2, "no more memory"),
        (RuntimeError("std::bad_alloc"), 2, "no more memory"),
        (OSError(5, "Input/output error", "x.csv"), 2, "x.csv: got Input/output error"),
        (OverflowError("too large"), 3, "OverflowError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_other_end_has_its_exit_code_and_one_line(
    run: Run, monkeypatch, error: BaseException, code: int, said: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("nformer_edge.data.readers.read_dataset", fail)
    ran = run("summary", "--data", "anything")
    assert (ran.code, ran.out, len(ran.err.strip().splitlines())) == (code, "", 1)
    assert said in ran.err


def test_damaged_images_that_are_looked_for_are_a_gate_that_fails(run: Run, tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 32))
    for name in ("0001_c1s1_000001_00.png", "0001_c2s1_000001_00.png"):
        image.save(tmp_path / name)
    rows = "".join(f"{name},1,{name[6]},query\n" for name in sorted(p.name for p in tmp_path.iterdir()))
    (tmp_path / "list.csv").write_text("path,pid,camid,split\n" + rows)
    assert run("summary", "--data", tmp_path / "list.csv", "--check").code == 0
    (tmp_path / "0001_c1s1_000001_00.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert run("summary", "--data", tmp_path / "list.csv", "--check").code == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("x" * 70_000 + ",1,1,query", "70010 characters"),
        ('"' + "x" * 140_000 + '",1,1,query', "140012 characters"),
        ("a\0b,1,1,query", "a zero byte"),
        ("," * 70_000, "70000 characters"),
    ],
)
def test_a_field_that_no_list_needs_is_refused_by_its_line(run: Run, tmp_path: Path, row: str, said: str) -> None:
    (tmp_path / "list.csv").write_text(f"path,pid,camid,split\n{row}\n")
    ran = run("summary", "--data", tmp_path / "list.csv", "--layout", "csv")
    assert (ran.code, len(ran.err.strip().splitlines())) == (2, 1)
    assert "line 2" in ran.err
    assert said in ran.err


def test_control_characters_in_names_do_not_reach_the_terminal(run: Run, tmp_path: Path) -> None:
    ran = run("summary", "--data", tmp_path / "\x1b]0;owned\x07\x1b[31mred")
    assert ran.code == 2
    assert "\x1b" not in ran.err
    assert r"\x1b[31mred" in ran.err
    (tmp_path / "gallery\x1b[31mred").mkdir()
    said = run("embed", tmp_path / "no-model", "--data", tmp_path / "gallery\x1b[31mred", "-o", tmp_path / "f.npz").err
    assert "\x1b" not in said
