"""Weights files: formats, containers, damaged or unsafe files, and downloads from a local hub."""

import argparse
import hashlib
import io
import os
import pickle
import zipfile
from collections import defaultdict
from dataclasses import replace
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from tests.each import each
from tests.errors import error_of
from tests.model.conftest import FakeHub, torch_bytes
from training import public_weights
from van_deploy.errors import CheckpointError, DownloadError, UsageError
from van_deploy.model.checkpoint import read_weights
from van_deploy.model.files import find_weights, load_file
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANT_NAMES, VARIANTS, find_cached_weights

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def has_weights(loaded: Any) -> bool:
    return all(torch.equal(loaded[name], WEIGHTS[name]) for name in WEIGHTS)


def load_error(path: Path) -> str:
    return str(error_of(CheckpointError, load_file, path))


def zip_bytes(entries: dict[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


# --- formats and containers ------------------------------------------------------------------

NESTED = ("teacher.net", "teacher.net._orig_mod")


@each(
    ("places", "option"),
    [
        *(([place], None) for place in ("state_dict", "net", "teacher", "a.b")),
        *((["state_dict", place], None) for place in ("model_ema", "ema", "ema_model.module")),
        (["state_dict", "state_dict_ema"], None),
        (["state_dict", "ema"], "state_dict"),
        *((["student", "teacher"], place) for place in ("student", "teacher", *NESTED)),
    ],
)
def test_containers(tmp_path: Path, tiny: VAN, places: list[str], option: str | None) -> None:
    content: dict[str, Any] = {"epoch": 3, "optimizer": {"state": WEIGHTS}, "n": WEIGHTS}
    for factor, place in enumerate(places, 1):
        prefix, (first, _, inner) = "net._orig_mod." * (factor - 1), place.partition(".")
        state = {f"{prefix}{name}": factor * tensor for name, tensor in tiny.state_dict().items()}
        content[first] = {inner: state} if inner else state
    path = saved(content, tmp_path / "w.pth")
    assert "no tensors under 'x'" in error_of(UsageError, read_weights, path, "x").message
    if option == "student":
        remedy = error_of(UsageError, read_weights, path).remedy
        assert "--container student or --container teacher.net; or" in remedy
    loaded = read_weights(path, option)
    container = (option or places[-1]).removesuffix("._orig_mod")
    assert (loaded.container, loaded.content["epoch"]) == (container, 3)
    assert loaded.tensors.keys() == {n for n in tiny.state_dict() if "num_batches" not in n}
    factor = 1 if loaded.container == places[0] else 2
    assert torch.equal(loaded.tensors["head.weight"], factor * tiny.get_parameter("head.weight"))
    used = "the file also contains state_dict: the averaged weights are used (--container)"
    assert loaded.notes == ((used,) if factor == 2 and option is None else ())


def test_metadata_of_training_scripts(tmp_path: Path) -> None:
    path, place = tmp_path / "w.pth", PurePath("runs/1")
    arguments = argparse.Namespace(mean=[0.1, 0.2], layers=None, output=place)
    random = np.random.RandomState(0).get_state()
    more = {"metric": np.float64(77.5), "random": random, "best": np.int16(4)}
    more |= {"curves": defaultdict(list), "saved": datetime.now(), "torch": torch.__version__}
    stored = argparse.Namespace(**vars(arguments) | {"output": Path(place)})
    loaded = load_file(saved({"state": WEIGHTS, "args": stored, **more}, path))
    assert has_weights(loaded["state"])
    assert (loaded["args"], loaded["metric"]) == (arguments, 77.5)
    stored.methods = {"min": argparse.Namespace.__contains__}  # HistoryBuffer.min, for example
    torch.save({**WEIGHTS, "log": stored}, path, _use_new_zipfile_serialization=False)
    names = (b"argparse\nNamespace", b"mmengine.logging.history_buffer\nHistoryBuffer")
    path.write_bytes(path.read_bytes().replace(*names))  # mmengine's training log
    loaded = load_file(path)
    assert has_weights(loaded)
    assert loaded["log"].methods == {"min": None}


@each(
    ("place", "meta"),
    [("ema_state_dict", {"mmengine_version": "0.10.7"}), ("current_model_state", {})],
)
def test_weights_beside_averaged_ones(tmp_path: Path, tiny: VAN, place: str, meta: Any) -> None:
    """EMAHook of mmengine and Lightning's WeightAveraging save the averaged ones as state_dict."""
    state = tiny.state_dict()
    raw = {f"module.{name}": 2 * tensor for name, tensor in state.items()}
    content = {"state_dict": state, place: raw | {"steps": torch.tensor(9)}, "meta": meta}
    path = saved(content, tmp_path / "w.pth")
    for option, factor in ((None, 1), ("state_dict", 1), (place, 2), (f"{place}.module", 2)):
        loaded = read_weights(path, option)
        assert torch.equal(loaded.tensors["head.bias"], factor * state["head.bias"])
        assert any("the averaged weights are" in note for note in loaded.notes) == (not option)


def test_legacy_compressed_and_misnamed_files(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(io.BytesIO(torch_bytes(WEIGHTS))) as plain:
        compressed = zip_bytes({name: plain.read(name) for name in plain.namelist()})
    (tmp_path / "c.pth").write_bytes(compressed)
    metadata = {"crop_pct": "0.9", "who": "me", "deep": "[" * 100_000}
    save_file(WEIGHTS, tmp_path / "w.bin", metadata=metadata)
    for name in ("old.pth", "c.pth", "w.bin"):
        assert has_weights(load_file(tmp_path / name))
    loaded = load_file(tmp_path / "w.bin")
    assert (loaded["crop_pct"], loaded["deep"]) == (0.9, metadata["deep"])


# --- errors ----------------------------------------------------------------------------------


class _Payload(tuple[Any, ...]):
    """A call, which unpickling executes."""

    def __reduce__(self) -> Any:
        return (self[0], self[1:])


@each("form", ["zip", "old", "plain"])
@each(("call", "name"), [(os.system, "posix.system"), (eval, "eval"), (os.mkdir, "posix.mkdir")])
def test_code_in_a_pickle_is_not_executed(tmp_path: Path, call: Any, name: str, form: str) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.pth"
    code = {os.system: f"mkdir {trace}", eval: f"__import__('os').mkdir({str(trace)!r})"}
    extra = _Payload((call, code.get(call, str(trace))))
    thing = {"state_dict": WEIGHTS, "mean": np.ones(3), "extra": extra}
    if form == "plain":
        path.write_bytes(pickle.dumps(thing["extra"]))
        assert "more than tensors and plain values, or is not of torch.save" in load_error(path)
    else:
        torch.save(thing, path, _use_new_zipfile_serialization=form == "zip")
        message = load_error(path)
        assert f"its pickle imports {name}" in message
        assert "so loading it would execute code" in message
        assert "numpy" not in message  # which is allowed
    assert not trace.exists()


@each("share", [0.0005, 0.3, 0.9, 0.999])
@each("kind", ["zip", "old", "safetensors"])
def test_truncated_files(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "w.pth"
    weights = {f"layer{index}.weight": torch.randn(100, 10) for index in range(20)}
    torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")
    content = save(weights) if kind == "safetensors" else path.read_bytes()
    path.write_bytes(content[: max(20, int(len(content) * share))])
    assert "truncated" in load_error(path)


def damaged_archive() -> bytes:
    """Return an archive whose unsafe imports cannot be listed: its checksum is incorrect."""
    entries = {"archive/data.pkl": pickle.dumps(print, protocol=2), "archive/version": b"3\n"}
    data = bytearray(zip_bytes(entries, zipfile.ZIP_STORED))
    data[data.index(b"PK\x01\x02") + 16] ^= 1  # the checksum in the archive's directory
    return bytes(data)


@each(
    ("content", "message"),
    [
        (b"", "not a checkpoint: it begins with b''"),
        (b"<!DOCTYPE html><html>", "begins with b'<!DOCTYPE html>"),
        (b"\x1f\x8b\x08\x00rest", "not a checkpoint"),
        (b"\x80\x02nonsense", "cannot be read"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{nonsens", "cannot be read"),
        ({"readme.txt": b"hello"}, "cannot be read"),
        ({"s/data.pkl": b"", "s/code/t.py": b"", "s/constants.pkl": b""}, "cannot be read"),
        ({"w/data.pkl": b"\0" * 10_000_000}, "claims to unpack to 10,000,000 bytes in 1 entries"),
        ({f"{n}/data.pkl": b"" for n in range(30_001)}, "in 30,001 entries"),
        (damaged_archive(), ""),
        ([torch.ones(2)], "contains a list, not a state dict"),
        (torch.ones(2), ", not a state dict"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    data = zip_bytes(content) if isinstance(content, dict) else content
    data = data if isinstance(data, bytes) else torch_bytes(content)
    (tmp_path / "w.pth").write_bytes(data)
    assert message in load_error(tmp_path / "w.pth")


def test_missing_special_and_other_files_are_refused(tmp_path: Path, tiny: VAN) -> None:
    assert "cannot be read: No such file" in load_error(tmp_path / "no.pth")
    assert "cannot be read: Is a directory" in load_error(tmp_path)
    os.mkfifo(tmp_path / "fifo.pth")  # which would be waited for
    assert "it is not a regular file" in load_error(tmp_path / "fifo.pth")
    message = load_error(saved(tiny, tmp_path / "w.pth"))
    assert "its pickle imports van_deploy.model.van.VAN," in message
    assert "torch.save(model.state_dict()" in message
    path = saved({"epoch": 3, "optimizer": {}}, tmp_path / "w.pth")
    assert "is not a VAN (0 tensors" in error_of(CheckpointError, read_weights, path).message


# --- the hub ---------------------------------------------------------------------------------

REPO = "someone/van"
CONTENT = bytes(range(256)) * 400
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def hub(hub: FakeHub) -> FakeHub:
    """Return the local hub with one repository."""
    hub.repos[REPO] = {"w.pth": CONTENT}
    return hub


def download_error(spec: str, *, offline: bool = False, sha256: str | None = None) -> str:
    return error_of(DownloadError, find_weights, spec, sha256, offline).message


@pytest.mark.parametrize("length", [10**6, 9])
def test_incorrect_sizes(hub: FakeHub, monkeypatch: Any, length: int) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.length = {"w.pth": length}
    assert f"{REPO}/w.pth" in download_error(f"{REPO}:w.pth")
    hub.length = {}
    assert find_weights(f"{REPO}:w.pth").path.read_bytes() == CONTENT


def test_offline_mode_and_lost_network(hub: FakeHub, monkeypatch: Any) -> None:
    hub.repos[REPO]["config.json"] = b'{"a": 1}'
    for spec in (f"{REPO}:w.pth", REPO):
        assert "the cache (" in download_error(spec, offline=True)
    assert hub.log == []
    online = find_weights(REPO)
    assert (online.path.read_bytes(), online.sha256, online.name) == (CONTENT, DIGEST, "van")
    assert online.configs == {"config.json": {"a": 1}}
    assert find_weights(f"{REPO}:w.pth") == online
    assert len([line for line in hub.log if line.startswith("GET") and "w.pth" in line]) == 1
    hub.log.clear()
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert find_weights(REPO) == online
        assert f"{REPO}/v.pth is not available" in download_error(f"{REPO}:v.pth")
    assert hub.log == []
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    cached = find_weights(REPO)
    assert cached.path == online.path
    assert cached.notes[0].startswith("the cached copy is used, since the hub is not available: ")
    for spec in (f"{REPO}:other.pth", "someone/else", "someone/else:w.pth"):
        assert "is not available from http://127.0.0.1:9 or the cache" in download_error(spec)


def test_revisions(hub: FakeHub) -> None:
    hub.repos[f"{REPO}@v1"] = {"w.pth": CONTENT + b"old"}
    commit = hub.commit(f"{REPO}@v1")
    assert find_weights(REPO).path.read_bytes() == CONTENT
    for revision in ("v1", commit):
        for offline, name in ((False, ":w.pth"), (True, "")):
            file = find_weights(f"{REPO}@{revision}{name}", offline=offline)
            assert file.path.read_bytes() == CONTENT + b"old"
    hub.log.clear()
    assert find_weights(f"{REPO}@{commit}:w.pth").name == "van"
    assert hub.log == [], "a cached commit needs no request"
    assert "Revision" in download_error(f"{REPO}@v2")


def test_missing_files_and_digests(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for spec in ("nobody/nothing", "nobody/nothing:w.pth"):
        assert f"is not available from {hub.url}" in download_error(spec)
        assert "RepositoryNotFoundError" in download_error(spec)
    assert "EntryNotFoundError" in download_error(f"{REPO}:v.pth")
    assert "HFValidationError" in download_error("a--b/c")
    message = f"{REPO}/w.pth is another file: its SHA-256 is {DIGEST}, expected: {'0' * 64}."
    assert download_error(REPO, sha256="0" * 64) == message
    file = find_weights(REPO, expect_sha256=DIGEST.upper())
    file.path.write_bytes(b"damaged")
    assert f"the hub announced {DIGEST}" in download_error(REPO)
    assert find_weights(REPO).path.read_bytes() == CONTENT
    own = tmp_path / ("0" * 64)  # the name means nothing outside the cache
    own.write_bytes(CONTENT)
    (tmp_path / "loop.pth").symlink_to(tmp_path / "loop.pth")
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "loop.pth"))
        assert find_weights(str(own)).sha256 == DIGEST
        assert find_weights(str(tmp_path / "loop.pth")).sha256 == "", "load_file reports the error"
    hub.gated.add(REPO)
    assert "GatedRepoError" in download_error(REPO)  # even if it is cached


def test_selection_of_weights_file_and_configs(hub: FakeHub, tmp_path: Path) -> None:
    configs = {"config.json": b'{"a": 1}', "preprocessor_config.json": b'{"size": 224}'}
    files = dict.fromkeys(("model.safetensors", "pytorch_model.bin", "sub/w.pth"), CONTENT)
    hub.repos[REPO] = {**files, **configs, "sub/config.json": b'{"depths": 3}'}
    file = find_weights(REPO)
    assert file.path.name == "model.safetensors"
    assert file.configs == {"config.json": {"a": 1}, "preprocessor_config.json": {"size": 224}}
    assert find_weights(f"{REPO}:sub/w.pth").configs == {"config.json": {"depths": 3}}
    hub.repos["me/two"] = {"b.pth": CONTENT, "a.pth.tar": CONTENT, "README.md": b""}
    hub.repos["me/none"] = {"README.md": b""}
    hub.repos["me/shards"] = {f"model-0000{n}-of-00002.safetensors": CONTENT for n in (1, 2)}
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).touch()
    for spec, message in (
        ("me/two", "has 2 PyTorch weights files; its files: a.pth.tar, b.pth.\nSelect one, such"),
        (tmp_path, f"its files: a.pth, b.pth.\nSelect one, such as {tmp_path}/a.pth"),
        (
            "me/shards",
            "\nSave it in one file: model.save_pretrained(folder, max_shard_size='10GB')",
        ),
        ("me/none", "has 0 PyTorch weights files; its files: README.md"),
    ):
        assert message in str(error_of(UsageError, find_weights, str(spec)))
    (tmp_path / "b.pth").unlink()
    for content in (b"[1, 2]", b"{", b"\xff\xfe"):
        (tmp_path / "config.json").write_bytes(content)
        message = error_of(CheckpointError, find_weights, str(tmp_path)).message
        assert "config.json cannot be read: " in message


# --- the public weights ----------------------------------------------------------------------


def test_public_weights_script(published: bytes, monkeypatch: Any, capsys: Any) -> None:
    results = {"export": (0, ""), "verify": (0, ""), "evaluate": (0, "")}
    monkeypatch.setattr(public_weights, "run_command", lambda name, *_: results[name])

    def output(code: int, *arguments: str) -> str:
        assert public_weights.main(arguments) == code
        return capsys.readouterr().out

    assert [*map(find_cached_weights, VARIANTS.values())] == [None] * len(VARIANTS)
    digest = hashlib.sha256(published).hexdigest()
    first = output(0, "van_b0")
    assert f"sha256    {digest}\n  pinned    (not yet: pin the line above)" in first
    assert "top-1     not measured (no --imagenet)\nvan_b0: passed" in first
    cached = find_cached_weights(VARIANTS["van_b0"])
    assert cached is not None
    assert cached.read_bytes() == published
    for top1, code in ((0.754, 0), (0.74, 1)):
        results["evaluate"] = (0, f'{{"accuracy": {{"fp32": {{"top1": {top1}}}}}}}')
        measured = output(code, "van_b0", "--imagenet", "val")
    assert "van_b0: top-1 is 74.00 %, published 75.4 %" in measured
    results["verify"] = (1, "")
    assert "van_b0: verify ended with exit code 1" in output(1, "van_b0", "--imagenet", "val")
    assert "van_b1: Visual-Attention-Network/VAN-Small-original/" in output(1, "van_b1")
    with pytest.raises(SystemExit, match="2"):
        public_weights.main(["van_b9"])
    pinned = replace(VARIANTS["van_b0"], sha256="0" * 64)
    monkeypatch.setitem(VARIANT_NAMES, "van_b0", pinned)
    assert f"its SHA-256 is {digest}, expected: {'0' * 64}." in output(1, "van_b0")


@pytest.mark.slow
def test_public_weights_end_to_end(published: bytes, tmp_path: Path, capfd: Any) -> None:
    assert public_weights.main(["van_b0", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "van_b0" / "model.onnx").exists()
    text = capfd.readouterr().out
    assert "export    passed" in text
    assert "verify    passed" in text
