"""Signed bundles and engines: what is refused where a signature is required, before anything is opened."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest

from nformer_edge.backends.build import build_engine
from nformer_edge.backends.open import open_model
from nformer_edge.backends.spec import EngineSpec
from nformer_edge.cli import main
from nformer_edge.core import signature
from nformer_edge.core.artifact import MANIFEST, SIGNATURE, read_manifest, write_manifest
from nformer_edge.core.errors import ArtifactError, BackendError, UsageError
from nformer_edge.core.signature import required, sign_folder
from nformer_edge.exporting import bundle as bundles
from nformer_edge.exporting.export import export_bundle

serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")


def key_pair(folder: Path, name: str, key=None) -> tuple[Path, Path]:
    """PEM files of a new key: private, public."""
    key = key or ed25519.Ed25519PrivateKey.generate()
    files = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    kinds = serialization.PrivateFormat.PKCS8, serialization.PublicFormat.SubjectPublicKeyInfo
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    files[0].write_bytes(key.private_bytes(pem, kinds[0], plain))
    files[1].write_bytes(key.public_key().public_bytes(pem, kinds[1]))
    return files


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return {name: key_pair(folder, name) for name in ("ours", "theirs")}


@pytest.fixture
def signed(tiny_bundle, keys, tmp_path, monkeypatch):
    """A bundle that our key signed at a time of the test's choice, of a user who has opened nothing yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def make(at: int = 1000, name: str = "bundle", key: str = "ours") -> Path:
        folder = tmp_path / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_bundle, folder)
        monkeypatch.setattr(signature.time, "time", lambda: at)
        sign_folder(folder, "bundle", keys[key][0])
        return folder

    return make


def test_what_export_and_build_engine_sign_is_opened_by_the_public_key(tiny_checkpoint, keys, tmp_path):
    private, public = keys["ours"]
    bundle = export_bundle(tiny_checkpoint, tmp_path / "bundle", sign=private)
    with required(public):
        engine = build_engine(bundle, tmp_path / "engine", EngineSpec(backend="onnxruntime"), sign=private)
        with open_model(engine) as runner:
            assert runner.has_head


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda folder: (folder / SIGNATURE).unlink(), "got no signature.json in it, expected one by the key"),
        (
            lambda folder: write_manifest(folder, "bundle", {**read_manifest(folder, "bundle"), "landmark_seed": 3}),
            "got another manifest than was signed",
        ),
        (lambda folder: (folder / "backbone.onnx").write_bytes(b"x"), r"backbone.onnx: got 1 bytes"),
        (lambda folder: (folder / SIGNATURE).write_text("{}"), "expected signature, version 1"),
        (lambda folder: (folder / SIGNATURE).write_text("[" * 100_000), "no readable JSON"),
        (
            lambda folder: (folder / SIGNATURE).write_text(
                json.dumps(json.loads((folder / SIGNATURE).read_text()) | {"signed_at": 2000})
            ),
            "got a signature that this key did not make",
        ),
    ],
    ids=["absent", "swapped manifest", "swapped file", "empty", "nested", "later time"],
)
def test_what_is_not_as_signed_is_refused(change, match, signed, keys):
    folder = signed()
    change(folder)
    with required(keys["ours"][1]), pytest.raises(ArtifactError, match=match):
        open_model(folder)


def test_another_key_and_another_kind_are_refused(signed, keys, tiny_bundle, tmp_path):
    theirs = signed(key="theirs")
    with required(keys["ours"][1]), pytest.raises(ArtifactError, match="got a signature that this key did not make"):
        open_model(theirs)
    folder = tmp_path / "other"
    shutil.copytree(tiny_bundle, folder)
    sign_folder(folder, "engine", keys["ours"][0])
    with required(keys["ours"][1]), pytest.raises(ArtifactError, match="of a signed engine"):
        open_model(folder)


def test_no_file_but_the_manifest_is_read_before_the_signature_holds(signed, keys):
    folder = signed()
    (folder / SIGNATURE).unlink()
    for file in folder.iterdir():
        if file.name != MANIFEST:
            file.unlink()
            os.mkfifo(file)  # whoever opens it waits for ever
    with required(keys["ours"][1]), pytest.raises(ArtifactError, match="no signature"):
        open_model(folder)


def test_an_older_signed_version_is_refused_once_a_newer_one_was_opened_there(signed, keys):
    ours = keys["ours"][1]
    with required(ours):
        open_model(signed(at=1000))
        open_model(signed(at=2000))
        with pytest.raises(ArtifactError, match=r"signed 1970-01-01T00:16:40.*as was opened here before"):
            open_model(signed(at=1000))
        open_model(signed(at=1000, name="elsewhere"))  # nothing is known of another place


def test_a_machine_that_has_opened_nothing_goes_by_the_time_asked_for(signed, keys):
    folder = signed(at=1000)
    with required(keys["ours"][1], since="1970-01-01T00:16:40Z"):
        open_model(folder)
    with required(keys["ours"][1], since="1970-01-01T00:16:41"), pytest.raises(ArtifactError, match="as asked for"):
        open_model(folder)


def test_every_thread_goes_by_what_is_required(tiny_bundle, keys):
    refused = []

    def attempt() -> None:
        try:
            open_model(tiny_bundle)
        except ArtifactError as e:
            refused.append(e)

    with required(keys["ours"][1]):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert len(refused) == 1
    open_model(tiny_bundle)  # and nothing is required afterwards


def test_a_checkpoint_carries_no_signature(tiny_checkpoint, keys):
    with required(keys["ours"][1]), pytest.raises(ArtifactError, match="got a checkpoint, which carries no signature"):
        open_model(tiny_checkpoint)


def test_keys_of_other_kinds_are_named(keys, tmp_path):
    from cryptography.hazmat.primitives.asymmetric import ec

    private, public = keys["ours"]
    other = key_pair(tmp_path, "curve", ec.generate_private_key(ec.SECP256R1()))
    (tmp_path / "text").write_text("no key")
    for path, match in (
        (private, "got no public key"),
        (other[1], "got a key of type"),
        (tmp_path / "text", "no public"),
    ):
        with pytest.raises(UsageError, match=match), required(path):
            pass
    for path, match in ((public, "got no private key"), (other[0], "got a key of type"), (tmp_path, "got a folder")):
        with pytest.raises(UsageError, match=match):
            signature.check_private_key(path)
    with pytest.raises(UsageError, match="signed_since: got later"), required(public, since="later"):
        pass
    with pytest.raises(UsageError, match="expected a public key beside it"), required(None, since="2026-11-28"):
        pass


def test_without_cryptography_the_error_names_the_extra(keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with (
        pytest.raises(BackendError, match=r"got no package cryptography.*nformer-edge\[sign\]"),
        required(keys["ours"][1]),
    ):
        pass


def test_a_command_refuses_in_one_line(tiny_bundle, tiny_market, keys, tmp_path, capsys):
    command = ["embed", str(tiny_bundle), "--data", str(tiny_market), "-o", str(tmp_path / "f.npz")]
    assert main([*command, "--require-signed", str(keys["ours"][1])]) == 2
    assert "got no signature.json in it, expected one by the key" in capsys.readouterr().err
    assert not (tmp_path / "f.npz").exists()


def test_a_signature_is_no_file_of_the_manifest(signed):
    assert SIGNATURE not in bundles.open_bundle(signed()).files.files
