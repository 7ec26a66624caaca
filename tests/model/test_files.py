"""Reading weights files: what is found, what is refused, and that nothing in them runs."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.each import each
from van_deploy.errors import CheckpointError, UsageError
from van_deploy.files import file_sha256
from van_deploy.model.files import read_weights
from van_deploy.model.van import VAN

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def _same(found: dict[str, Tensor]) -> bool:
    return found.keys() == WEIGHTS.keys() and all(
        torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS
    )


def _refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as error:
        read_weights(path)
    assert error.value.remedy
    return error.value


# --- what is found ---------------------------------------------------------------------------


def _van(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors that tell a VAN, which is how a container is chosen."""
    return {f"{prefix}{n}": t for n, t in state.items() if "conv_spatial" in n or "head" in n}


@each(
    "key", ["state_dict", "model", "model_state_dict", "net", "ema", "module", "teacher", "weights"]
)
def test_a_container_is_known_by_its_keys(tmp_path: Path, tiny: VAN, key: str) -> None:
    state, more = _van(tiny.state_dict()), {"state": {0: {"step": torch.tensor(1.0)}}}
    torch.save({key: state, "epoch": 3, "optimizer": more, "n": WEIGHTS}, tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth")
    assert list(found.tensors) == list(state)
    assert (found.container, found.notes) == (key, ())
    assert found.metadata == {"epoch": 3, "optimizer": more}


def test_bare_and_ordered_state_dicts(tmp_path: Path) -> None:
    torch.save(collections.OrderedDict(WEIGHTS), tmp_path / "w.pt")
    found = read_weights(tmp_path / "w.pt")
    assert _same(found.tensors)
    assert found.container == "top level"


def test_what_stands_among_the_tensors_is_metadata(tmp_path: Path) -> None:
    torch.save({**WEIGHTS, "epoch": 3, "class_to_idx": {"cat": 0}}, tmp_path / "w.pt")
    found = read_weights(tmp_path / "w.pt")
    assert _same(found.tensors)
    assert found.metadata == {"epoch": 3, "class_to_idx": {"cat": 0}}


@each("averaged", ["state_dict_ema", "model_ema", "ema", "ema_model.module"])
def test_averaged_weights_come_first_and_the_choice_is_free(
    tmp_path: Path, tiny: VAN, averaged: str
) -> None:
    raw, first = _van(tiny.state_dict(), "module."), averaged.partition(".")[0]
    ema: Any = _van(tiny.state_dict())
    whole = {"state_dict": raw, first: {"module": ema} if "." in averaged else ema}
    torch.save(whole, tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth")
    assert (list(found.tensors), found.container) == (list(ema), averaged)
    assert found.notes == (
        f"the file also holds state_dict: the averaged weights under {averaged} were taken; "
        "choose with --container",
    )
    chosen = read_weights(tmp_path / "w.pth", container="state_dict")
    assert (list(chosen.tensors), chosen.notes) == (list(raw), ())


def test_several_networks_must_be_told_apart(tmp_path: Path, tiny: VAN) -> None:
    state, path = _van(tiny.state_dict()), tmp_path / "w.pth"
    torch.save({"student": state, "teacher": {f"net.{n}": t for n, t in state.items()}}, path)
    with pytest.raises(UsageError) as error:
        read_weights(path)
    assert error.value.message == f"The checkpoint {path} holds several networks: student, teacher."
    assert error.value.remedy == "Say which: --container student or --container teacher."
    assert read_weights(path, container="student").container == "student"
    assert list(read_weights(path, container="teacher.net").tensors) == [f"net.{n}" for n in state]


@each("suffix", ["pth", "safetensors"])
def test_a_container_that_is_not_there(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    flat = suffix == "safetensors"
    save_file(WEIGHTS, path) if flat else torch.save({"model": WEIGHTS}, path)
    with pytest.raises(UsageError) as error:
        read_weights(path, container="state_dict_ema")
    assert error.value.message == f"The checkpoint {path} has no tensors under 'state_dict_ema'."
    assert error.value.remedy == f"It has tensors in: {'top level' if flat else 'model'} (2)."
    inside = read_weights(path, container="a" if flat else "model.a")
    assert _same(inside.tensors)


def test_what_training_scripts_leave_beside_the_weights(tmp_path: Path) -> None:
    arguments = argparse.Namespace(mean=[0.1, 0.2, 0.3], img_size=64, layers=None)
    whole = {
        "state_dict": WEIGHTS,
        "args": arguments,
        "metric": np.float64(77.5),
        "history": np.arange(3.0),
        "best": np.int64(4),
    }
    torch.save(whole, tmp_path / "w.pth.tar")
    found = read_weights(tmp_path / "w.pth.tar")
    assert _same(found.tensors)
    assert found.metadata["args"] == {"mean": [0.1, 0.2, 0.3], "img_size": 64, "layers": None}
    assert found.metadata["metric"] == 77.5


def test_mmengine_training_log_is_passed_over(tmp_path: Path) -> None:
    import sys
    import types

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history = np.arange(3.0)

    names = ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer")
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = names[-1], "HistoryBuffer"
    before = {name: sys.modules.get(name) for name in names}
    try:
        for name in names:
            sys.modules[name] = types.ModuleType(name)
        sys.modules[names[-1]].HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
        log = {"log_scalars": {"loss": HistoryBuffer()}}
        torch.save({"state_dict": WEIGHTS, "message_hub": log}, tmp_path / "epoch_1.pth")
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
    assert _same(read_weights(tmp_path / "epoch_1.pth").tensors)


def test_old_pickles_without_zip(tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert _same(read_weights(tmp_path / "w.pth").tensors)


def test_compressed_archives_are_read_right(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as plain,
        zipfile.ZipFile(tmp_path / "c.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    assert _same(read_weights(tmp_path / "c.pth").tensors)


def test_safetensors_under_any_name(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "w.bin", metadata={"crop_pct": "0.9", "who": "me"})
    found = read_weights(tmp_path / "w.bin")
    assert _same(found.tensors)
    assert found.metadata == {"crop_pct": 0.9, "who": "me"}


def test_digest_is_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_the_shared_checkpoint(shared_checkpoint: Path) -> None:
    found = read_weights(shared_checkpoint)
    assert found.container == "state_dict"
    assert len(found.tensors) == 402
    assert found.metadata["args"]["crop_pct"] == 1.0


# --- what is refused -------------------------------------------------------------------------


def _pickled(path: Path, thing: object, *, zipped: bool) -> None:
    whole = {"state_dict": WEIGHTS, "extra": thing}
    torch.save(whole, path, _use_new_zipfile_serialization=zipped)


class _Evil:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return (self.call, self.arguments)


@each("zipped", [True, False])
@each(("call", "wanted"), [(os.system, "posix.system"), (eval, "eval"), (os.mkdir, "posix.mkdir")])
def test_code_in_a_pickle_is_named_and_does_not_run(
    tmp_path: Path, call: Any, wanted: str, zipped: bool
) -> None:
    trace = tmp_path / "trace"
    argument = str(trace) if call is os.mkdir else f"__import__('os').mkdir({str(trace)!r})"
    if call is os.system:
        argument = f"mkdir {trace}"
    _pickled(tmp_path / "evil.pth", _Evil(call, argument), zipped=zipped)
    error = _refusal(tmp_path / "evil.pth")
    wanted = "builtins.eval" if zipped and wanted == "eval" else wanted
    assert f"is refused: its pickle wants {wanted}, and loading it would run code" in error.message
    assert not trace.exists()


def test_code_in_a_pickle_of_another_kind_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": _Evil(os.mkdir, str(trace))}))
    message = "its pickle is not one that torch.save writes"
    assert message in _refusal(tmp_path / "evil.pth").message
    assert not trace.exists()


@each("zipped", [True, False])
def test_a_whole_pickled_network_is_explained(tmp_path: Path, tiny: VAN, zipped: bool) -> None:
    torch.save(tiny, tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
    error = _refusal(tmp_path / "whole.pth")
    what = "holds a whole pickled network (van_deploy.model.van.VAN)"
    assert (what if zipped else "its pickle wants van_deploy.model.van.VAN,") in error.message
    assert "torch.save(model.state_dict()" in error.remedy


def test_torchscript_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as archive:  # what torch.jit.save writes, without its warning
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl"):
            archive.writestr(f"script/{name}", b"")
    assert "is a TorchScript program" in _refusal(path).message


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
    error = _refusal(path)
    assert "truncated" in str(error)


@each(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>Log in</body></html>", "is a web page"),
        (b"\n  <HTML><head>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
        (b"\x1f\x8b\x08\x00rest", "gzip archive"),
        (b"\x89HDF\r\n\x1a\n", "HDF5 file"),
        (b"hello, this is not a checkpoint", "not a checkpoint: it begins with b'hello, this '"),
        (b"\x80\x02nonsense", "cannot be read"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{nonsens", "cannot be read"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    assert what in _refusal(path).message


def test_real_tar_archives_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "w.pth.tar", "w") as archive:
        entry = tarfile.TarInfo("w.pth")
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"abcd"))
    assert "is a tar archive" in _refusal(tmp_path / "w.pth.tar").message


def test_other_zips_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "without PyTorch tensors (it holds readme.txt)" in _refusal(tmp_path / "w.pth").message


def test_zip_bombs_are_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", b"\0" * 10_000_000)
    assert "claims to unpack to 10,000,000" in _refusal(tmp_path / "w.pth").message


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert _refusal(tmp_path / "no.pth").message == f"There is no file {tmp_path / 'no.pth'}."
    assert "cannot be read: Is a directory" in _refusal(tmp_path).message


@each(
    ("thing", "what"),
    [
        ([torch.ones(2)], "holds a list, not a state dict"),
        (torch.ones(2), "holds a Tensor, not a state dict"),
        ({}, "holds no tensors."),
        ({"state_dict": {}}, "holds no tensors."),
        ({"epoch": 3, "optimizer": {}}, "holds no tensors."),
    ],
)
def test_what_is_no_state_dict(tmp_path: Path, thing: object, what: str) -> None:
    torch.save(thing, tmp_path / "w.pth")
    assert what in _refusal(tmp_path / "w.pth").message


def test_a_refused_pickle_whose_archive_is_damaged_is_one_message(tmp_path: Path) -> None:
    """The pickle wants what it may not have, and naming that fails on a wrong checksum."""
    import zipfile

    sound, path = tmp_path / "sound.pth", tmp_path / "bad.pth"
    with zipfile.ZipFile(sound, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(print, protocol=2))
        archive.writestr("archive/version", "3\n")
    data = bytearray(sound.read_bytes())
    place = data.index(b"PK\x01\x02") + 16  # the checksum in the archive's directory
    data[place] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError):
        read_weights(path)


# --- files made to be in the way ----------------------------------------------------------------


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pth")
    assert "cannot be read: it is no regular file." in _refusal(tmp_path / "w.pth").message


def test_more_entries_than_any_network_has(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("w/data.pkl", b"x")
        for number in range(30_000):
            archive.writestr(f"w/data/{number}", b"")
    assert "holds 30,001 tensors, more than any VAN has." in _refusal(tmp_path / "w.pth").message


def test_metadata_nested_beyond_the_stack_stays_text(tmp_path: Path) -> None:
    deep = "[" * 100_000
    save_file(WEIGHTS, tmp_path / "w.safetensors", metadata={"classes": deep})
    assert read_weights(tmp_path / "w.safetensors").metadata == {"classes": deep}
