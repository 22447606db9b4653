"""Hostile and damaged files: refused by name, nothing executed, nothing left changed."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import struct
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtk.convert.megatron import pickles
from mtk.convert.megatron.pickles import Arguments, InertObject, StoredTensor
from mtk.convert.megatron.torch_file import open_torch_file
from mtk.errors import ConversionError


class Runs:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def as_zip(path: Path, data: bytes, **entries: bytes) -> Path:
    """A file of torch.save around any pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in ({"version": b"3\n"} | entries).items():
            archive.writestr(f"archive/{name}", content)
    return path


def text(value: str) -> bytes:
    """A short string on the pickle's stack."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def named(module: str, name: str) -> bytes:
    """STACK_GLOBAL: also takes names with dots."""
    return text(module) + text(name) + b"\x93"


def nested(levels: int, width: int) -> list[Any]:
    """Few bytes: every list holds the next one ``width`` times."""
    found: list[Any] = []
    for _ in range(levels):
        found = [found] * width
    return found


MARKER = "ran"
NAMESPACE = b"cargparse\nNamespace\n"
STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "os.system": (pickle.dumps(Runs(os.system, f"touch {MARKER}")), "posix.system"),
    "eval": (pickle.dumps(Runs(eval, f"open({MARKER!r}, 'w')")), "builtins.eval"),
    "exec": (pickle.dumps(Runs(exec, "import os")), "builtins.exec"),
    "getattr of a module": (
        b"\x80\x02c__builtin__\ngetattr\n(cos\nsystem\n" + text("x") + b"tR.",
        "os.system",
    ),
    "getattr of a class that is allowed": (
        b"\x80\x02cbuiltins\ngetattr\n(" + NAMESPACE + text("__init__") + b"tR.",
        "getattr",
    ),
    "getattr of a hidden name of an enum": (
        b"\x80\x02cbuiltins\ngetattr\n(cmegatron.core.enums\nModelType\n"
        + text("__subclasses__")
        + b"tR.",
        "getattr",
    ),
    "dotted name": (b"\x80\x04" + named("torch", "serialization.os.system") + b".", "os.system"),
    "dotted name of an allowed module": (
        b"\x80\x04" + named("collections", "OrderedDict.fromkeys") + b".",
        "OrderedDict.fromkeys",
    ),
    "import of a module": (b"\x80\x02cimportlib\nimport_module\n.", "importlib.import_module"),
    "a module of torch": (b"\x80\x02ctorch.hub\nload\n.", "torch.hub.load"),
    "torch's own loader": (b"\x80\x02ctorch\nload\n.", "torch.load"),
    "functools.partial": (b"\x80\x02cfunctools\npartial\n.", "functools.partial"),
    "instance opcode": (b"\x80\x02(" + text("x") + b"ios\nsystem\n.", "os.system"),
    "object opcode": (b"\x80\x02(cos\nsystem\n" + text("x") + b"o.", "os.system"),
    "extension opcode": (b"\x80\x02\x82\x01.", "unregistered extension"),
    "state of a class": (
        b"\x80\x02" + NAMESPACE + b"}" + text("__init__") + b"Ksb.",
        "damaged or hostile",
    ),
    "slots of a class": (
        b"\x80\x02" + NAMESPACE + b"N}" + text("values") + text("x") + b"s\x86b.",
        "damaged or hostile",
    ),
    "slots of a function": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}"
        + text("__defaults__")
        + text("x")
        + b"s\x86b.",
        "damaged or hostile",
    ),
    "state of a type": (
        b"\x80\x02ctorch\nHalfStorage\n}" + text("dtype") + text("x") + b"sb.",
        "damaged or hostile",
    ),
    "state of a dtype": (
        b"\x80\x02ctorch\nfloat16\nN}" + text("itemsize") + b"K\x08s\x86b.",
        "damaged or hostile",
    ),
    "namespace with a state that is none": (
        b"\x80\x02" + NAMESPACE + b")\x81" + text("x") + b"b.",
        "no dict of names",
    ),
    "a tensor made of text": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + text("x") + b"K\x00))\x89NtR.",
        "without a storage",
    ),
    "a tensor beyond its storage": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        + STORAGE
        + text("0")
        + text("cpu")
        + b"K\x04tQK\x00K\x09\x85K\x01\x85\x89NtR.",
        "in a storage of 4",
    ),
    "a tensor that begins before its storage": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        + STORAGE
        + text("0")
        + text("cpu")
        + b"K\x04tQI-3\nK\x02\x85K\x01\x85\x89NtR.",
        "a size of -3",
    ),
    "a storage that is not in the file": (
        b"\x80\x02" + STORAGE + text("7") + text("cpu") + b"K\x04tQ.",
        "storage 7 is missing",
    ),
    "a storage outside the archive": (
        b"\x80\x02" + STORAGE + text("../../etc/passwd") + text("cpu") + b"K\x04tQ.",
        "passwd is missing",
    ),
    "a storage of an unknown kind": (b"\x80\x02(" + text("module") + b"tQ.", "no storage"),
    "a storage that is a path": (b"\x80\x02P/etc/passwd\n.", "no storage"),
    "lists of lists without end": (pickle.dumps(nested(60, 2), 2), "without end"),
    "lists in lists": (pickle.dumps(nested(200, 1), 2), "without end"),
    "a number that cannot be printed": (pickle.dumps(1 << 50_000, 2), "50001 bits"),
    "a storage without end": (
        b"\x80\x02(" + text("storage") + pickle.dumps(nested(60, 2), 2)[2:-1] + b"tQ.",
        "a tuple is no storage",
    ),
    "no end": (b"\x80\x02}", "damaged or hostile"),
    "no bytes": (b"", "damaged or hostile"),
    "noise": (bytes(range(256)), "damaged or hostile"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickles(
    name: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, message = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pickles, "MOST_VALUES", 10_000)
    path = tmp_path / "model_optim_rng.pt"
    if zipped:
        as_zip(path, data)
    else:
        start = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in start) + data)
    if not zipped and "is missing" in message:
        # There the list of storages follows, and ends too early.
        message = "damaged or hostile"
    with pytest.raises(ConversionError, match=message) as caught:
        open_torch_file(path)
    assert str(path) in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    # What one file tried to change is as it was for the next.
    torch.save({"args": argparse.Namespace(a=1), "x": torch.ones(3, dtype=torch.half)}, path)
    opened = open_torch_file(path)
    assert opened.content["args"].values == {"a": 1}
    assert torch.equal(opened.tensor(opened.content["x"]), torch.ones(3, dtype=torch.half))


def test_a_pickle_does_not_say_how_much_memory_to_take(tmp_path: Path) -> None:
    """Object number 2^31: the unpickler in C would clear 32 GiB for a table up to there."""
    data = b"\x80\x02}r\xff\xff\xff\x7f."
    assert open_torch_file(as_zip(tmp_path / "x.pt", data)).content == {}


def test_a_tensor_is_not_larger_than_its_storage(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(1).expand(1 << 40), "b": torch.ones(2, 3).T}, path)
    opened = open_torch_file(path)
    assert torch.equal(opened.tensor(opened.content["b"]), torch.ones(3, 2))
    with pytest.raises(ConversionError, match=r"x\.pt: a tensor of shape \[1099511627776\]"):
        opened.tensor(opened.content["a"])


def test_what_real_checkpoints_hold_becomes_inert_data(tmp_path: Path) -> None:
    state = collections.OrderedDict(weight=torch.randn(3, 4), half=torch.randn(5).bfloat16())
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    content = {
        "args": argparse.Namespace(lr=1e-4, dtype=torch.bfloat16, path=Path("a/b")),
        "other": types.SimpleNamespace(x=[1, (2, None)]),
        "model": {"deep": {"state": state}},
        "rng": {"np": np.random.RandomState(0).get_state(), "n": np.float64(2.5)},
        "sets": ({1, 2}, frozenset({3}), b"raw", 1 + 2j),
        "factory": collections.defaultdict(dict, {"a": {"b": torch.ones(2)}}),
        "parameter": torch.nn.Parameter(torch.arange(3.0)),
        "view": torch.arange(12.0).view(3, 4).T[1:],
        "empty": torch.empty(0, 3),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
    }
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pt"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        opened = open_torch_file(path)
        found = opened.content
        assert isinstance(found["args"], Arguments) and found["args"].values["lr"] == 1e-4
        assert found["args"].values["dtype"] is torch.bfloat16
        assert isinstance(found["args"].values["path"], InertObject)
        assert found["other"].values == {"x": [1, (2, None)]}
        stored = {
            "weight": found["model"]["deep"]["state"]["weight"],
            "half": found["model"]["deep"]["state"]["half"],
        } | {name: found[name] for name in ("parameter", "view", "empty", "flag", "scalar")}
        expected = {**state, **content}
        for name, tensor in stored.items():
            assert isinstance(tensor, StoredTensor)
            assert torch.equal(opened.tensor(tensor), expected[name].detach()), name
        assert torch.equal(opened.tensor(found["factory"]["a"]["b"]), torch.ones(2))


@pytest.mark.parametrize("how", ["value", "name"])
def test_enums_of_megatron_are_inert(how: str, tmp_path: Path) -> None:
    call = b"cmegatron.core.transformer.enums\nAttnBackend\n"
    by_name = b"\x80\x02cbuiltins\ngetattr\n(" + call + text("auto") + b"tR."
    path = as_zip(
        tmp_path / "x.pt", by_name if how == "name" else b"\x80\x02" + call + b"K\x05\x85R."
    )
    found = open_torch_file(path).content
    assert isinstance(found, InertObject)
    assert repr(found) == (
        "<megatron.core.transformer.enums.AttnBackend"
        + ("('auto',)>" if how == "name" else "(5,)>")
    )


def truncated(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in entries.items():
            new.writestr(name, data)


def without_storage(path: Path) -> None:
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in entries.items():
            if not name.endswith("data/0"):
                new.writestr(name, data)


def big_endian(path: Path) -> None:
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in entries.items():
            new.writestr(name, b"big" if name.endswith("byteorder") else data)


def marked(path: Path, flag: int, first: int | None = None) -> None:
    """A flag in the directory of the archive, and another first byte of a name."""
    data = bytearray(path.read_bytes())
    entry = data.find(b"PK\x01\x02")
    data[entry + 8 : entry + 10] = flag.to_bytes(2, "little")
    data[entry + 46] = data[entry + 46] if first is None else first
    path.write_bytes(data)


DAMAGE: dict[str, tuple[bool, Callable[[Path], object], str]] = {
    "half a zip": (True, lambda p: truncated(p, 0.5), "damaged or cut short"),
    "zip without its end": (True, lambda p: truncated(p, 0.98), "damaged or cut short"),
    "half an old file": (False, lambda p: truncated(p, 0.5), "cut short|damaged"),
    "old file without its end": (False, lambda p: truncated(p, 0.99), "cut short"),
    "compressed": (True, compressed, "is compressed"),
    "encrypted": (True, lambda p: marked(p, 1), "damaged.*encrypted"),
    "a name that is no text": (True, lambda p: marked(p, 0x800, 0xFF), "damaged.*decode"),
    "missing storage": (True, without_storage, "storage 0 is missing"),
    "big-endian": (True, big_endian, "big-endian"),
    "text": (True, lambda p: p.write_text("hello"), "not a file of torch.save"),
    "empty": (True, lambda p: p.write_bytes(b""), "not a file of torch.save"),
    "a pickle": (True, lambda p: p.write_bytes(pickle.dumps([1])), "not one of torch.save|damaged"),
    "a folder": (True, lambda p: (p.unlink(), p.mkdir()), "cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    zipped, damage, message = DAMAGE[name]
    path = tmp_path / "x.pt"
    content = {"a": torch.randn(100), "b": torch.randn(1000)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    damage(path)
    with pytest.raises(ConversionError, match=message) as caught:
        open_torch_file(path)
    assert str(path) in str(caught.value)


def test_a_scripted_model_is_no_checkpoint(tmp_path: Path) -> None:
    path = as_zip(tmp_path / "x.pt", b"\x80\x02}.", **{"constants.pkl": b"\x80\x02)."})
    with pytest.raises(ConversionError, match="is no checkpoint"):
        open_torch_file(path)
