"""Reading weights files: formats, containers, and load_error of damaged or unsafe files."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.each import each
from van_deploy.errors import CheckpointError, UsageError
from van_deploy.model.checkpoint import read_weights
from van_deploy.model.files import load_file
from van_deploy.model.van import VAN

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def has_weights(loaded: Any) -> bool:
    return all(torch.equal(loaded[name], WEIGHTS[name]) for name in WEIGHTS)


def load_error(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as error:
        load_file(path)
    assert error.value.remedy
    return error.value


def write_zip(path: Path, entries: dict[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


# --- formats and containers ------------------------------------------------------------------


@each("key", ["state_dict", "model", "net", "teacher", "weights", "a.b"])
def test_container_detection(tmp_path: Path, tiny: VAN, key: str) -> None:
    more: dict[str, Any] = {"state": {0: {"step": torch.tensor(1.0)}}}
    first, _, inner = key.partition(".")
    state = {inner: tiny.state_dict()} if inner else tiny.state_dict()
    content = {first: state, "epoch": 3, "optimizer": more, "n": WEIGHTS}
    loaded = read_weights(save(content, tmp_path / "w.pth"))
    parameters = [n for n in tiny.state_dict() if not n.endswith("num_batches_tracked")]
    assert (list(loaded.tensors), loaded.container, loaded.notes) == (parameters, key, ())
    assert loaded.content["epoch"] == 3


@each("averaged", ["state_dict_ema", "model_ema", "ema", "ema_model.module"])
def test_averaged_weights_are_preferred(tmp_path: Path, tiny: VAN, averaged: str) -> None:
    first, _, inner = averaged.partition(".")
    ema = {f"net.{name}": 2 * tensor for name, tensor in tiny.state_dict().items()}
    content = {"state_dict": tiny.state_dict(), first: {inner: ema} if inner else ema}
    path = save(content, tmp_path / "w.pth")
    loaded, chosen = read_weights(path), read_weights(path, "state_dict")
    assert loaded.container == averaged
    assert torch.equal(loaded.tensors["head.weight"], 2 * chosen.tensors["head.weight"])
    assert "the file also contains state_dict: the averaged" in loaded.notes[0]
    assert (chosen.container, chosen.notes) == ("state_dict", ())


def test_several_networks_need_a_container(tmp_path: Path, tiny: VAN) -> None:
    state: dict[str, Tensor] = tiny.state_dict()
    other = {f"net.{name}": 2 * tensor for name, tensor in state.items()}
    path = save({"student": state, "teacher": other}, tmp_path / "w.pth")
    with pytest.raises(UsageError) as error:
        read_weights(path)
    assert "--container student or --container teacher.net; or" in error.value.remedy
    for container, factor in (("student", 1), ("teacher.net", 2), ("teacher", 2)):
        loaded = read_weights(path, container)
        assert torch.equal(loaded.tensors["head.bias"], factor * state["head.bias"])
        assert loaded.container == container
    with pytest.raises(UsageError, match="no tensors under 'ema'"):
        read_weights(path, "ema")


def test_metadata_of_training_scripts(tmp_path: Path, monkeypatch: Any) -> None:
    arguments = argparse.Namespace(mean=[0.1, 0.2, 0.3], img_size=64, layers=None)
    more = {"metric": np.float64(77.5), "history": np.arange(3.0), "best": np.int64(4)}
    loaded = load_file(save({"state": WEIGHTS, "args": arguments, **more}, tmp_path / "w.pth"))
    assert has_weights(loaded["state"])
    assert (loaded["args"], loaded["metric"]) == (arguments, 77.5)
    assert has_weights(load_file(save(collections.OrderedDict(WEIGHTS), tmp_path / "flat.pt")))
    # mmengine's training log
    names = ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer")
    kind = type("HistoryBuffer", (), {"__module__": names[-1]})
    with monkeypatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setattr(sys.modules[names[-1]], "HistoryBuffer", kind, raising=False)
        buffer = kind()
        buffer.log = np.arange(3.0)
        save({**WEIGHTS, "message_hub": {"loss": buffer}}, tmp_path / "w.pth")
    assert has_weights(load_file(tmp_path / "w.pth"))


def test_legacy_compressed_and_misnamed_files(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(save(WEIGHTS, tmp_path / "w.pth")) as plain:
        write_zip(tmp_path / "c.pth", {name: plain.read(name) for name in plain.namelist()})
    for name in ("old.pth", "c.pth"):
        assert has_weights(load_file(tmp_path / name))
    metadata = {"crop_pct": "0.9", "who": "me", "deep": "[" * 100_000}
    save_file(WEIGHTS, tmp_path / "w.bin", metadata=metadata)
    loaded = load_file(tmp_path / "w.bin")
    assert has_weights(loaded)
    assert (loaded["crop_pct"], loaded["deep"]) == (0.9, metadata["deep"])


# --- errors ----------------------------------------------------------------------------------


class _Payload:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return (self.call, self.arguments)


@each("form", ["zip", "old", "plain"])
@each(("call", "name"), [(os.system, "posix.system"), (eval, "eval"), (os.mkdir, "posix.mkdir")])
def test_code_in_a_pickle_is_not_executed(tmp_path: Path, call: Any, name: str, form: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.pth"
    code = {os.system: f"mkdir {trace}", eval: f"__import__('os').mkdir({str(trace)!r})"}
    thing = {"state_dict": WEIGHTS, "extra": _Payload(call, code.get(call, str(trace)))}
    if form == "plain":
        path.write_bytes(pickle.dumps(thing["extra"]))
        assert "its pickle was not written by torch.save" in load_error(path).message
    else:
        torch.save(thing, path, _use_new_zipfile_serialization=form == "zip")
        message = load_error(path).message
        assert f"its pickle imports {name}" in message
        assert "so loading it would execute code" in message
    assert not trace.exists()


def test_pickled_modules_are_refused(tmp_path: Path, tiny: VAN) -> None:
    error = load_error(save(tiny, tmp_path / "content.pth"))
    assert "its pickle imports van_deploy.model.van.VAN," in error.message
    assert "torch.save(model.state_dict()" in error.remedy


@each("share", [0.0005, 0.3, 0.9, 0.999])
@each("kind", ["zip", "old", "safetensors"])
def test_truncated_files(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "w.pth"
    weights = {f"layer{index}.weight": torch.randn(100, 10) for index in range(20)}
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: max(20, int(len(content) * share))])
    assert "truncated" in str(load_error(path))


@each(
    ("content", "what"),
    [
        (b"", "not a checkpoint: it begins with b''"),
        (b"<!DOCTYPE html><html>", "begins with b'<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "begins with b'version https://git-l"),
        (b"\x1f\x8b\x08\x00rest", "not a checkpoint"),
        (b"\x80\x02nonsense", "cannot be read"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{nonsens", "cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    assert what in load_error(tmp_path / "w.pth").message


@each(
    ("entries", "what"),
    [
        ({"readme.txt": b"hello"}, "cannot be read"),
        ({"s/data.pkl": b"", "s/code/t.py": b"", "s/constants.pkl": b""}, "cannot be read"),
        ({"w/data.pkl": b"\0" * 10_000_000}, "claims to unpack to 10,000,000 bytes in 1 entries"),
        ({f"{n}/data.pkl": b"" for n in range(30_001)}, "in 30,001 entries"),
    ],
)
def test_other_zips_are_refused(tmp_path: Path, entries: dict[str, bytes], what: str) -> None:
    assert what in load_error(write_zip(tmp_path / "w.pth", entries)).message


def test_unsafe_pickle_in_a_damaged_archive(tmp_path: Path) -> None:
    """Listing the unsafe imports of the pickle fails on the incorrect checksum."""
    pickled = {"archive/data.pkl": pickle.dumps(print, protocol=2), "archive/version": b"3\n"}
    path = write_zip(tmp_path / "w.pth", pickled, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 16] ^= 1  # the checksum in the archive's directory
    path.write_bytes(bytes(data))
    load_error(path)


def test_missing_and_special_files_are_refused(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in load_error(tmp_path / "no.pth").message
    assert "cannot be read: Is a directory" in load_error(tmp_path).message
    os.mkfifo(tmp_path / "w.pth")  # which would be waited for
    assert "it is not a regular file" in load_error(tmp_path / "w.pth").message


def test_other_objects_are_refused(tmp_path: Path) -> None:
    for thing in ([torch.ones(2)], torch.ones(2)):
        assert ", not a state dict" in load_error(save(thing, tmp_path / "w.pth")).message
    with pytest.raises(CheckpointError, match=r"is not a VAN \(0 tensors"):
        read_weights(save({"epoch": 3, "optimizer": {}}, tmp_path / "w.pth"))
