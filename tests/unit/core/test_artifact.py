"""Files are whole or absent, and nothing is believed before its hash has matched."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.manifests import reseal

from nformer_edge.core import artifact
from nformer_edge.core.errors import ArtifactError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "b"
    with artifact.atomic_folder(folder, "bundle") as temporary:
        (temporary / "backbone.onnx").write_bytes(b"weights" * 100)
        artifact.write_manifest(temporary, "bundle", {"opset": 18})
    return folder


def temporaries(folder: Path) -> list[Path]:
    return list(folder.glob(".nformer-edge-tmp-*"))


def test_atomic_write_leaves_the_old_file_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), artifact.atomic_write(path) as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert not temporaries(tmp_path)


def test_a_full_disk_is_named_and_the_old_file_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artifact.os, "fsync", no_space)
    with pytest.raises(ArtifactError, match=r"No space left.*Free some space.*untouched"):
        artifact.atomic_write_json(path, {"a": 1})
    assert path.read_text() == "old"
    assert not temporaries(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="No space left"), artifact.atomic_write(tmp_path / "x"):
        Path("/dev/full").write_bytes(b"x")


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_sweeps_its_temporary(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    code = (
        "import sys, time\nfrom nformer_edge.core.artifact import atomic_write\n"
        "with atomic_write(sys.argv[1]) as f:\n f.write(b'new'); f.flush(); print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"
    (left,) = temporaries(tmp_path)
    artifact.atomic_write_json(tmp_path / "y", {})
    assert not left.exists()


def test_temporaries_of_another_machine_are_swept_after_a_day(tmp_path: Path) -> None:
    left = tmp_path / ".nformer-edge-tmp-elsewhere-1-abc"
    left.touch()
    artifact.atomic_write_json(tmp_path / "y", {})
    assert left.exists(), "its process may be running there"
    os.utime(left, (time.time() - 2 * 86400,) * 2)
    artifact.atomic_write_json(tmp_path / "y", {})
    assert not temporaries(tmp_path)


def test_atomic_folder_replaces_an_earlier_artifact_of_its_kind(bundle: Path) -> None:
    with artifact.atomic_folder(bundle, "bundle") as temporary:
        (temporary / "new.onnx").write_bytes(b"n")
        artifact.write_manifest(temporary, "bundle", {})
    assert sorted(p.name for p in bundle.iterdir()) == ["manifest.json", "new.onnx"]
    assert not temporaries(bundle.parent)


def test_atomic_folder_keeps_the_earlier_artifact_when_interrupted(bundle: Path) -> None:
    with pytest.raises(KeyboardInterrupt), artifact.atomic_folder(bundle, "bundle") as temporary:
        (temporary / "new.onnx").write_bytes(b"n")
        raise KeyboardInterrupt
    assert artifact.read_manifest(bundle, "bundle")["opset"] == 18
    assert not temporaries(bundle.parent)


@pytest.mark.parametrize("what", ["photos", "engine", "file", "link"])
def test_atomic_folder_never_replaces_what_is_not_its_kind(tmp_path: Path, what: str) -> None:
    target = tmp_path / "out"
    if what == "photos":
        target.mkdir()
        (target / "holiday.jpg").write_bytes(b"x")
    elif what == "engine":
        target.mkdir()
        artifact.write_manifest(target, "engine", {})
    elif what == "file":
        target.write_text("x")
    else:
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="not ours to replace"), artifact.atomic_folder(target, "bundle"):
        pytest.fail("the block must not run")


def test_read_manifest_accepts_what_write_manifest_wrote(bundle: Path) -> None:
    manifest = artifact.read_manifest(bundle, "bundle")
    assert manifest["files"]["backbone.onnx"]["bytes"] == 700


def test_a_changed_byte_is_refused_by_name(bundle: Path) -> None:
    data = bytearray((bundle / "backbone.onnx").read_bytes())
    data[350] ^= 1
    (bundle / "backbone.onnx").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"backbone\.onnx: got sha256"):
        artifact.read_manifest(bundle, "bundle")


def test_a_truncated_file_is_refused_by_size(bundle: Path) -> None:
    os.truncate(bundle / "backbone.onnx", 699)
    with pytest.raises(ArtifactError, match="got 699 bytes, expected 700 bytes"):
        artifact.read_manifest(bundle, "bundle")


def test_a_missing_file_is_refused(bundle: Path) -> None:
    (bundle / "backbone.onnx").unlink()
    with pytest.raises(ArtifactError, match="no such file"):
        artifact.read_manifest(bundle, "bundle")


def test_a_reader_gets_the_old_folder_or_the_new_one_while_a_writer_replaces_it(bundle: Path, monkeypatch) -> None:
    read = artifact.read_verified

    def replaced(folder, manifest, name):
        monkeypatch.setattr(artifact, "read_verified", read)
        with artifact.atomic_folder(bundle, "bundle") as new:
            (new / "backbone.onnx").write_bytes(b"new")
            artifact.write_manifest(new, "bundle", {})
        return read(folder, manifest, name)

    monkeypatch.setattr(artifact, "read_verified", replaced)
    assert artifact.open_artifact(bundle, "bundle").files == {"backbone.onnx": b"new"}


def test_a_text_is_read_from_a_plain_file_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    for name, got in (
        ("fifo", "a device or a FIFO"),
        (".", "a folder"),
        ("latin", "another encoding"),
        ("none", "no such file"),
    ):
        with pytest.raises(ArtifactError, match=got):
            artifact.read_text(tmp_path / name)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret"])
def test_a_manifest_cannot_name_files_outside_its_folder(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_text("s")
    reseal(bundle, files={name: {"sha256": "0" * 64, "bytes": 1}})
    with pytest.raises(ArtifactError, match="a way out of the folder"):
        artifact.read_manifest(bundle, "bundle")


@pytest.mark.parametrize(("link", "said"), [("symlink_to", "way out of the folder"), ("hardlink_to", "a hard link")])
def test_links_in_an_artifact_are_refused(bundle: Path, link: str, said: str) -> None:
    (bundle / "backbone.onnx").rename(bundle.parent / "outside")
    getattr(bundle / "backbone.onnx", link)(bundle.parent / "outside")
    with pytest.raises(ArtifactError, match=said):
        artifact.read_manifest(bundle, "bundle")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no readable manifest"),
        ("[]", "no readable manifest"),
        ('{"kind": "bundle", "format_version": 2}', "no readable manifest"),
        ('{"kind": "engine", "format_version": 2, "files": {}}', "got an engine, expected a bundle"),
        ('{"kind": "bundle", "format_version": 99, "files": {}}', "format version 99"),
    ],
)
def test_a_manifest_that_cannot_be_used_says_why(bundle: Path, text: str, said: str) -> None:
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=said):
        artifact.read_manifest(bundle, "bundle")


def test_a_missing_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        artifact.read_manifest(tmp_path / "nowhere", "bundle")


REPLACE = """
import os, sys
from nformer_edge.core import artifact
path, exchange, last = sys.argv[1], sys.argv[2] == "exchange", int(sys.argv[3])
done = 0
def counted(real):
    def call(*args, **kwargs):
        global done
        done += 1
        if done > last:
            os._exit(9)  # as SIGKILL: nothing is tidied up
        return real(*args, **kwargs)
    return call
if not exchange:
    artifact._exchange = lambda a, b: False
for name in ("rename", "replace", "unlink", "rmdir", "fsync"):
    setattr(os, name, counted(getattr(os, name)))
artifact._exchange = counted(artifact._exchange)
with artifact.atomic_folder(path, "thing") as folder:
    (folder / "word").write_text("new")
    artifact.write_manifest(folder, "thing", {})
print("done")
"""


@pytest.mark.parametrize("way", ["exchange", "journal"])
def test_a_folder_that_is_being_replaced_is_the_old_or_the_new_one_wherever_the_process_is_killed(tmp_path, way):
    path, words = tmp_path / "thing", []
    for last in range(60):
        with artifact.atomic_folder(path, "thing") as folder:
            (folder / "word").write_text("old")
            artifact.write_manifest(folder, "thing", {})
        done = subprocess.run(
            [sys.executable, "-c", REPLACE, path, way, str(last)], capture_output=True, text=True, check=False
        )
        assert done.returncode in (0, 9), done.stderr
        artifact.read_manifest(path, "thing")
        words.append((path / "word").read_text())
        if done.stdout:
            break
    assert words[-1] == "new"
    assert words == sorted(words, reverse=True), "once new, never old again"
    with artifact.atomic_folder(path, "thing") as folder:
        artifact.write_manifest(folder, "thing", {})
    assert [p.name for p in tmp_path.iterdir()] == ["thing"], "what the killed processes left is swept"


def test_leftovers_of_a_living_process_stay(tmp_path):
    with artifact.atomic_folder(tmp_path / "outer", "thing") as outer:
        with artifact.atomic_folder(tmp_path / "inner", "thing") as inner:
            artifact.write_manifest(inner, "thing", {})
        assert outer.is_dir()
        artifact.write_manifest(outer, "thing", {})
    assert (tmp_path / "outer").is_dir()


def test_an_error_after_the_new_folder_has_its_name_says_so(tmp_path, monkeypatch):
    path = tmp_path / "thing"
    real, put = artifact.fsync, artifact._put

    def placed(new, where):
        put(new, where)
        monkeypatch.setattr(artifact, "fsync", lambda p: (_ for _ in ()).throw(OSError(5, "Input/output error")))

    monkeypatch.setattr(artifact, "_put", placed)
    words = "The new thing is in place, but the disk has not confirmed it"
    with pytest.raises(ArtifactError, match=words), artifact.atomic_folder(path, "thing") as folder:
        artifact.write_manifest(folder, "thing", {})
    monkeypatch.setattr(artifact, "fsync", real)
    artifact.read_manifest(path, "thing")


def test_a_manifest_of_which_any_value_was_changed_is_refused(bundle: Path) -> None:
    path = bundle / "manifest.json"
    whole = path.read_text()
    for old, new in (
        ('"opset": 18', '"opset": 19'),
        ('"bytes": 700', '"bytes": 701'),
        ('"kind"', '"extra": 1, "kind"'),
    ):
        assert old in whole
        path.write_text(whole.replace(old, new, 1))
        with pytest.raises(ArtifactError, match="manifest was changed"):
            artifact.read_manifest(bundle, "bundle")
    path.write_text(json.dumps(json.loads(whole)))  # other white space, the same values
    artifact.read_manifest(bundle, "bundle")


def test_a_manifest_of_the_first_format_names_the_command_that_brings_it_up(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 1}))
    with pytest.raises(ArtifactError, match="nformer-edge upgrade"):
        artifact.read_manifest(bundle, "bundle")


def test_a_manifest_nested_too_deep_is_refused(bundle: Path) -> None:
    (bundle / "manifest.json").write_text('{"kind": "bundle", "format_version": 2, "files": ' + "[" * 100_000)
    with pytest.raises(ArtifactError, match="no readable manifest"):
        artifact.read_manifest(bundle, "bundle")


def _set(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"m.{name}").write_text(text)
    return folder


@pytest.mark.parametrize("moves", range(3))
def test_files_that_belong_together_are_all_new_or_all_old_wherever_the_process_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    _set(tmp_path, json="old", csv="old", gone="old")
    work = _set(tmp_path / "m.unfinished", json="new", csv="new", gone="")
    (work / "state").mkdir()
    left = [moves]

    def replace(source: Path, target: Path) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        os.rename(source, target)

    monkeypatch.setattr(artifact.os, "replace", replace)
    with suppress(KeyboardInterrupt):
        artifact.put_together(work, tmp_path / "m.json")
    monkeypatch.undo()
    artifact.recover(tmp_path / "m.csv")  # of whichever file is opened or written first
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"m.json": "new", "m.csv": "new"}


def test_files_that_cannot_take_their_names_leave_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set(tmp_path, json="old")
    work = _set(tmp_path / "m.unfinished", json="new")

    def rename(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact.os, "rename", rename)
    with pytest.raises(ArtifactError, match=r"The earlier m\.json is untouched"):
        artifact.put_together(work, tmp_path / "m.json")
    assert (tmp_path / "m.json").read_text() == "old"
