"""Settings: no token, no other machine; and tokens that cannot be used are refused without being told."""

from __future__ import annotations

import pytest

from nformer_edge.core.errors import UsageError
from nformer_edge.gallery.service.settings import Settings, read_tokens

GOOD = "a" * 16 + "b" * 16


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "gallery.example"])
def test_without_tokens_it_listens_to_no_other_machine(host):
    with pytest.raises(UsageError, match="without tokens"):
        Settings(host=host)
    Settings(host=host, tokens="tokens")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_on_this_machine_alone_it_needs_none(host):
    assert Settings(host=host).loopback


@pytest.mark.parametrize(
    "wrong",
    [{"queue": 0}, {"port": 99999}, {"rate": float("nan")}, {"deadline_s": 0}, {"keep_days": -1}, {"threshold": 2}],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError):
        Settings(**wrong)


@pytest.mark.parametrize(
    ("text", "mode"),
    [(f"read {GOOD}", 0o644), ("read short", 0o600), (f"rread {GOOD}", 0o600), ("", 0o600), (f"read {GOOD} x", 0o600)],
)
def test_a_file_of_tokens_that_cannot_be_used_is_refused_without_its_tokens(tmp_path, text, mode):
    file = tmp_path / "tokens"
    file.write_text(text)
    file.chmod(mode)
    with pytest.raises(UsageError) as refused:
        read_tokens(file)
    assert GOOD not in str(refused.value)


def test_comments_and_empty_lines_are_left_out(tmp_path):
    file = tmp_path / "tokens"
    file.write_text(f"# the clinic\n\nread {GOOD}\nadmin {GOOD[::-1]}\n")
    file.chmod(0o600)
    assert sorted(read_tokens(file).values()) == ["admin", "read"]
