"""Reading weights files: what is found, what is refused, and that nothing in them runs."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import sys
import tarfile
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
from van_deploy.model.files import read_weights
from van_deploy.model.van import VAN

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def same(found: dict[str, Tensor]) -> bool:
    return found.keys() == WEIGHTS.keys() and all(torch.equal(found[n], WEIGHTS[n]) for n in found)


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as error:
        read_weights(path)
    assert error.value.remedy
    return error.value


def zipped(path: Path, entries: dict[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


# --- what is found ---------------------------------------------------------------------------


@each("key", ["state_dict", "model", "net", "teacher", "weights", "a.b"])
def test_a_container_is_known_by_its_keys(tmp_path: Path, tiny: VAN, key: str) -> None:
    more: dict[str, Any] = {"state": {0: {"step": torch.tensor(1.0)}}}
    first, _, inner = key.partition(".")
    state = {inner: tiny.state_dict()} if inner else tiny.state_dict()
    torch.save({first: state, "epoch": 3, "optimizer": more, "n": WEIGHTS}, tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth")
    assert (list(found.tensors), found.container) == (list(tiny.state_dict()), key)
    assert found.notes == ()
    assert found.metadata["epoch"] == 3


@each("averaged", ["state_dict_ema", "model_ema", "ema", "ema_model.module"])
def test_averaged_weights_come_first_and_the_choice_is_free(
    tmp_path: Path, tiny: VAN, averaged: str
) -> None:
    first, _, inner = averaged.partition(".")
    ema = {f"net.{name}": tensor for name, tensor in tiny.state_dict().items()}
    whole = {"state_dict": tiny.state_dict(), first: {inner: ema} if inner else ema}
    torch.save(whole, tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth")
    assert (list(found.tensors), found.container) == (list(ema), averaged)
    assert found.notes == (
        f"the file also holds state_dict: the averaged weights under {averaged} were taken; "
        "choose with --container",
    )
    chosen = read_weights(tmp_path / "w.pth", container="state_dict")
    assert (list(chosen.tensors), chosen.notes) == (list(tiny.state_dict()), ())


def test_several_networks_must_be_told_apart(tmp_path: Path, tiny: VAN) -> None:
    state, path = tiny.state_dict(), tmp_path / "w.pth"
    torch.save({"student": state, "teacher": {f"net.{n}": t for n, t in state.items()}}, path)
    with pytest.raises(UsageError) as error:
        read_weights(path)
    assert error.value.message == f"The checkpoint {path} holds several networks: student, teacher."
    assert error.value.remedy == "Say which: --container student or --container teacher."
    assert read_weights(path, container="student").container == "student"
    assert list(read_weights(path, container="teacher.net").tensors) == [f"net.{n}" for n in state]


@each("suffix", ["pth", "safetensors"])
def test_a_container_that_is_not_there(tmp_path: Path, suffix: str) -> None:
    path, flat = tmp_path / f"w.{suffix}", suffix == "safetensors"
    save_file(WEIGHTS, path) if flat else torch.save({"model": WEIGHTS}, path)
    with pytest.raises(UsageError) as error:
        read_weights(path, container="state_dict_ema")
    assert error.value.message == f"The checkpoint {path} has no tensors under 'state_dict_ema'."
    assert error.value.remedy == f"It has tensors in: {'top level' if flat else 'model'} (2)."
    assert same(read_weights(path, container="a" if flat else "model.a").tensors)


def test_what_training_scripts_leave_beside_the_weights(tmp_path: Path) -> None:
    arguments = argparse.Namespace(mean=[0.1, 0.2, 0.3], img_size=64, layers=None)
    more = {"metric": np.float64(77.5), "history": np.arange(3.0), "best": np.int64(4)}
    torch.save({"state_dict": WEIGHTS, "args": arguments, **more}, tmp_path / "w.pth.tar")
    found = read_weights(tmp_path / "w.pth.tar")
    assert same(found.tensors)
    assert found.metadata["args"] == vars(arguments)
    assert found.metadata["metric"] == 77.5
    torch.save(collections.OrderedDict({**WEIGHTS, "epoch": 3}), tmp_path / "flat.pt")
    found = read_weights(tmp_path / "flat.pt")
    assert same(found.tensors)
    assert (found.container, found.metadata) == ("top level", {"epoch": 3})


def test_mmengine_training_log_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer")
    kind = type("HistoryBuffer", (), {"__module__": names[-1]})
    with monkeypatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setattr(sys.modules[names[-1]], "HistoryBuffer", kind, raising=False)
        buffer = kind()
        buffer.log = np.arange(3.0)
        torch.save({"state_dict": WEIGHTS, "message_hub": {"loss": buffer}}, tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.pth").tensors)


def test_old_compressed_and_misnamed_files(tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(WEIGHTS, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as plain:
        zipped(tmp_path / "c.pth", {name: plain.read(name) for name in plain.namelist()})
    for name in ("old.pth", "c.pth"):
        assert same(read_weights(tmp_path / name).tensors)
    metadata = {"crop_pct": "0.9", "who": "me", "deep": "[" * 100_000}
    save_file(WEIGHTS, tmp_path / "w.bin", metadata=metadata)
    found = read_weights(tmp_path / "w.bin")
    assert same(found.tensors)
    assert found.metadata == {**metadata, "crop_pct": 0.9}


# --- what is refused -------------------------------------------------------------------------


class _Evil:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return (self.call, self.arguments)


@each("form", ["zip", "old", "plain"])
@each(("call", "wanted"), [(os.system, "posix.system"), (eval, "eval"), (os.mkdir, "posix.mkdir")])
def test_code_in_a_pickle_is_named_and_does_not_run(
    tmp_path: Path, call: Any, wanted: str, form: str
) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.pth"
    code = {os.system: f"mkdir {trace}", eval: f"__import__('os').mkdir({str(trace)!r})"}
    thing = {"state_dict": WEIGHTS, "extra": _Evil(call, code.get(call, str(trace)))}
    if form == "plain":
        path.write_bytes(pickle.dumps(thing["extra"]))
        assert "its pickle is not one that torch.save writes" in refusal(path).message
    else:
        torch.save(thing, path, _use_new_zipfile_serialization=form == "zip")
        told = f"{wanted}, and loading it would run code"
        assert told in refusal(path).message
    assert not trace.exists()


def test_a_whole_pickled_network_is_explained(tmp_path: Path, tiny: VAN) -> None:
    torch.save(tiny, tmp_path / "whole.pth")
    error = refusal(tmp_path / "whole.pth")
    assert "holds a whole pickled network: its pickle wants van_deploy.model.van.VAN," in str(error)
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
    whole = path.read_bytes()
    path.write_bytes(whole[: max(20, int(len(whole) * share))])
    assert "truncated" in str(refusal(path))


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("w.pth"), io.BytesIO())
    return buffer.getvalue()


@each(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>Log in</body></html>", "is a web page"),
        (b"\n  <HTML><head>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
        (b"\x1f\x8b\x08\x00rest", "gzip, bzip2, xz or tar archive"),
        (tarred(), "gzip, bzip2, xz or tar archive"),
        (b"\x89HDF\r\n\x1a\n", "HDF5 file"),
        (b"hello, this is not a checkpoint", "not a checkpoint: it begins with b'hello, this '"),
        (b"\x80\x02nonsense", "cannot be read"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{nonsens", "cannot be read"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    assert what in refusal(tmp_path / "w.pth").message


@each(
    ("entries", "what"),
    [
        ({"readme.txt": b"hello"}, "without PyTorch tensors (it holds readme.txt)"),
        ({"s/data.pkl": b"", "s/code/t.py": b"", "s/constants.pkl": b""}, "TorchScript"),
        ({"w/data.pkl": b"\0" * 10_000_000}, "claims to unpack to 10,000,000 bytes in 1 entries"),
        ({f"{n}/data.pkl": b"" for n in range(30_001)}, "in 30,001 entries"),
    ],
)
def test_other_zips_are_refused(tmp_path: Path, entries: dict[str, bytes], what: str) -> None:
    assert what in refusal(zipped(tmp_path / "w.pth", entries)).message


def test_a_refused_pickle_whose_archive_is_damaged_is_one_message(tmp_path: Path) -> None:
    """The pickle wants what it may not have, and naming that fails on a wrong checksum."""
    pickled = {"archive/data.pkl": pickle.dumps(print, protocol=2), "archive/version": b"3\n"}
    path = zipped(tmp_path / "w.pth", pickled, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 16] ^= 1  # the checksum in the archive's directory
    path.write_bytes(bytes(data))
    refusal(path)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    assert f"The file {tmp_path / 'no.pth'} cannot be read: No such file" in str(
        refusal(tmp_path / "no.pth")
    )
    assert "cannot be read: Is a directory" in refusal(tmp_path).message
    os.mkfifo(tmp_path / "w.pth")  # which would be waited for
    assert "cannot be read: it is no regular file." in refusal(tmp_path / "w.pth").message


@each(
    ("thing", "what"),
    [
        ([torch.ones(2)], "holds a list, not a state dict"),
        (torch.ones(2), "holds a Tensor, not a state dict"),
        ({"state_dict": {}}, "holds no tensors."),
        ({"epoch": 3, "optimizer": {}}, "holds no tensors."),
    ],
)
def test_what_is_no_state_dict(tmp_path: Path, thing: object, what: str) -> None:
    torch.save(thing, tmp_path / "w.pth")
    assert what in refusal(tmp_path / "w.pth").message
