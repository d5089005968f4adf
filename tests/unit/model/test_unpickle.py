"""Pickles of every kind are read and none is obeyed."""

from __future__ import annotations

import argparse
import io
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nformer_edge.model.unpickle import Saved, Unreadable, mappings


def saved(data: object, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(data, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def tensors(data: bytes, place: str = "") -> dict[str, Tensor]:
    read = Saved(data)
    return {n: read.tensor(v) for n, v in mappings(read.root)[place].items()}


def repacked(data: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out.getvalue()


class CfgNode(dict):  # type: ignore[type-arg]
    """As yacs and others write: a mapping with state of its own."""

    def __init__(self, **items: object) -> None:
        super().__init__(items)
        self.frozen = True


class Planted:
    """Writes a file where it is unpickled as it asks to be."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({str(self.path)!r}, 'w').write('ran')",)


STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.tensor([1, 2]), "b": torch.tensor(3.0).half()}


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_come_back_as_they_were(zipped: bool) -> None:
    kinds = {str(kind): torch.ones(2).to(kind) for kind in (torch.bfloat16, torch.float64, torch.bool, torch.uint8)}
    state = STATE | kinds | {"shared": STATE["a.weight"].T, "parameter": nn.Parameter(torch.ones(2))}
    state |= {"part": STATE["a.weight"][1:], "empty": torch.empty(0, 3)}
    found = tensors(saved(OrderedDict(state), zipped))
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_beside_the_weights_do_no_harm(zipped: bool, tmp_path: Path) -> None:
    beside = {
        "rank1": np.float32(0.9), "dtype": np.dtype("float32"), "array": np.ones(3), "args": argparse.Namespace(a=[1]),
        "config": CfgNode(MODEL=CfgNode(NAME="x")), "counts": defaultdict(list, {"a": [1]}), "path": Path("x"),
        "set": {1, 2}, "complex": 1j, "dtype_": torch.float32, "device": torch.device("cpu"), "size": torch.Size([1]),
        "planted": Planted(tmp_path / "ran"), "optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2))]).state_dict(),
    }  # fmt: skip
    found = tensors(saved(beside | {"state_dict": STATE}, zipped), "state_dict")
    assert all(torch.equal(found[name], tensor) for name, tensor in STATE.items())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_pickled_model_gives_its_state_dict_without_its_code(zipped: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(2, 2)))
    model.register_buffer("temporary", torch.ones(1), persistent=False)
    found = tensors(saved({"model": model}, zipped), "model")
    assert list(found) == list(model.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_a_pickle_that_is_code_runs_nothing(protocol: int, tmp_path: Path) -> None:
    root = Saved(pickle.dumps({"x": Planted(tmp_path / "ran")}, protocol)).root if protocol >= 2 else None
    assert root is None or mappings(root) == {}
    planted = saved({"w": torch.ones(2)})
    data = pickle.dumps({"x": Planted(tmp_path / "ran")}, protocol)
    Saved(repacked(planted, lambda name, old: data if name.endswith("data.pkl") else old))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cbuiltins\nexec\n(Vraise SystemExit\ntR.",
        b"cos\nsystem\n(Vtouch ran\ntR.",
        b"c__main__\n__builtins__\nVx\nb.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x05\x00\x00\x00buildNs\x86b.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(cos\nsystem\nK\x00(K\x01t(K\x01ttR.",
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nNVx\n\x85NtR.",
    ],
)
def test_a_written_pickle_imports_and_calls_nothing(code: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise SystemExit("called")

    monkeypatch.setattr("os.system", never)
    outside = saved({"w": torch.ones(2)})
    try:
        assert mappings(Saved(repacked(outside, lambda n, old: code if n.endswith("data.pkl") else old)).root) == {}
    except Unreadable:
        pass


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"K\x02K\x03\x86", b"K\x02K\x7f\x86", "larger than its storage"),
        (b"K\x03K\x01\x86", b"K\x7fK\x01\x86", "larger than its storage"),
        (b"K\x06tq", b"K\x07tq", "of another size"),
        (b"\x80\x02}", b"\x80\x02\x82\x01}", "does not write"),
        (b"\x80\x02}", b"\x80\x02}r\xff\xff\xff\x7f", "does not write"),
        (b"q\rs.", b"q\rss.", "damaged pickle"),
        (b"q\rs.", b"}X\x05\x00\x00\x00shape)sbs.", "damaged pickle"),
        (b"q\rs.", b"N}X\x05\x00\x00\x00shape)s\x86bs.", "damaged pickle"),
    ],
)
def test_a_pickle_that_asks_for_too_much_is_refused(old: bytes, new: bytes, said: str) -> None:
    data = saved({"a": torch.arange(6.0).view(2, 3)})

    def change(name: str, entry: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return entry
        assert old in entry
        return entry.replace(old, new, 1)

    with pytest.raises(Unreadable, match=said):
        Saved(repacked(data, change))


def test_compressed_entries_another_byte_order_and_cut_files_are_refused() -> None:
    data = saved(STATE)
    with pytest.raises(Unreadable, match="compressed"):
        Saved(repacked(data, lambda _, old: old, zipfile.ZIP_DEFLATED))
    with pytest.raises(Unreadable, match="byte order"):
        Saved(repacked(data, lambda n, old: b"big" if n.endswith("byteorder") else old))
    for zipped in (True, False):
        whole = saved(STATE, zipped)
        for size in (len(whole) // 3, len(whole) - 9):
            with pytest.raises(Unreadable, match=r"truncated|damaged|another size"):
                Saved(whole[:size])


def test_a_changed_byte_of_an_archive_is_noticed() -> None:
    data = bytearray(saved({"a": torch.full((64,), 7.0)}))
    at = bytes(data).index(torch.full((2,), 7.0).numpy().tobytes())
    data[at] ^= 1
    with pytest.raises(Unreadable, match="damaged"):
        Saved(bytes(data))


def test_an_entry_that_holds_less_than_its_list_says_is_refused() -> None:
    data = bytearray(saved({"a": torch.full((64,), 7.0)}))
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"/data/0"))  # of the central directory
    data[entry + 16 : entry + 24] = bytes(8)  # its checksum and its compressed size
    with pytest.raises(Unreadable, match="cut short"):
        Saved(bytes(data))
