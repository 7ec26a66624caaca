"""Downloads, and ``make public-weights``, from a local hub server."""

from __future__ import annotations

import hashlib
import io
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.each import each
from tests.model.conftest import FakeHub
from training import public_weights
from van_deploy.errors import CheckpointError, DownloadError, UsageError
from van_deploy.model.files import find_weights
from van_deploy.model.van import random_van
from van_deploy.model.variants import VARIANT_NAMES, VARIANTS, find_cached_weights

REPO = "someone/van"
CONTENT = bytes(range(256)) * 400
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def download_error(spec: str, *, offline: bool = False, sha256: str | None = None) -> str:
    with pytest.raises(DownloadError) as error:
        find_weights(spec, sha256, offline)
    assert error.value.remedy
    return error.value.message


def test_download_is_cached(hub: FakeHub) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    first, again = find_weights(f"{REPO}:w.pth"), find_weights(f"{REPO}:w.pth")
    assert (first.path.read_bytes(), first.sha256, first.name) == (CONTENT, DIGEST, "van")
    assert first == again
    assert len(hub.downloads("w.pth")) == 1


def test_interrupted_download_is_resumed(hub: FakeHub, monkeypatch: Any) -> None:
    # huggingface_hub writes chunks of 10 MB; smaller ones interrupt a small file in the middle.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 16384)
    hub.repos[REPO] = {"w.pth": CONTENT}
    hub.drop_after = 40_000
    assert find_weights(f"{REPO}:w.pth").path.read_bytes() == CONTENT
    first, second = hub.downloads("w.pth")
    assert first is None
    assert second is not None
    assert 0 < int(second.removeprefix("bytes=").rstrip("-")) <= 40_000


@pytest.mark.parametrize(
    ("name", "value"), [("length", {"w.pth": 10**6}), ("length", {"w.pth": 9}), ("stall", 0)]
)
def test_incorrect_sizes_and_stalled_downloads(
    hub: FakeHub, monkeypatch: Any, name: str, value: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.repos[REPO] = {"w.pth": CONTENT}
    start = time.monotonic()
    monkeypatch.setattr(hub, name, value)
    assert f"{REPO}/w.pth" in download_error(f"{REPO}:w.pth")
    assert time.monotonic() - start < 60
    hub.length, hub.stall = {}, None
    assert find_weights(f"{REPO}:w.pth").path.read_bytes() == CONTENT


def test_offline_mode(hub: FakeHub, monkeypatch: Any) -> None:
    hub.repos[REPO] = {"model.safetensors": CONTENT, "config.json": b'{"a": 1}'}
    for spec in (f"{REPO}:w.pth", REPO):
        assert "the cache (" in download_error(spec, offline=True)
    assert hub.log == []
    online = find_weights(REPO)
    hub.log.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_weights(REPO) == online
    assert online.configs == {"config.json": {"a": 1}}
    assert f"{REPO}/w.pth is not available" in download_error(f"{REPO}:w.pth")
    assert hub.log == []


def test_revisions(hub: FakeHub) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
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


def test_cache_is_used_without_a_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    path = find_weights(REPO).path
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        unused_url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", unused_url)
    file = find_weights(REPO)
    assert file.path == path
    assert file.notes[0].startswith("the cached copy is used, since the hub is not available: ")
    for spec in (f"{REPO}:other.pth", "someone/else", "someone/else:w.pth"):
        assert f"is not available from {unused_url} or the cache" in download_error(spec)


def test_missing_and_gated_repositories(hub: FakeHub) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    for spec in ("nobody/nothing", "nobody/nothing:w.pth"):
        assert f"is not available from {hub.url}" in download_error(spec)
        assert "RepositoryNotFoundError" in download_error(spec)
    assert "EntryNotFoundError" in download_error(f"{REPO}:v.pth")
    assert "HFValidationError" in download_error("a--b/c")
    hub.gated.add(REPO)
    assert "GatedRepoError" in download_error(REPO)  # even if it is cached


def test_digests(hub: FakeHub) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    message = f"{REPO}/w.pth is another file: its SHA-256 is {DIGEST}, expected: {'0' * 64}."
    assert download_error(REPO, sha256="0" * 64) == message
    assert find_weights(REPO, expect_sha256=DIGEST.upper()).sha256 == DIGEST
    hub.repos[REPO] = {"v.pth": CONTENT}
    hub.announce["v.pth"] = "a" * 64
    assert f"the hub announced {'a' * 64}" in download_error(REPO)


def test_selection_of_weights_file_and_configs(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos[REPO] = {
        "pytorch_model.bin": b"x",
        "model.safetensors": CONTENT,
        "config.json": b'{"layer_norm_eps": 1e-5}',
        "preprocessor_config.json": b'{"size": 224}',
        "sub/w.pth": CONTENT,
        "sub/config.json": b'{"depths": 3}',
    }
    file, config = find_weights(REPO), {"config.json": {"layer_norm_eps": 1e-5}}
    assert file.path.name == "model.safetensors"
    assert file.configs == config | {"preprocessor_config.json": {"size": 224}}
    assert find_weights(f"{REPO}:sub/w.pth").configs == {"config.json": {"depths": 3}}
    hub.repos["me/two"] = {"b.pth": CONTENT, "a.pth.tar": CONTENT, "README.md": b""}
    hub.repos["me/none"] = {"README.md": b""}
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).touch()
    for spec, message in (
        ("me/two", "has 2 PyTorch weights .* a.pth.tar, b.pth.\nSelect .* me/two:a.pth.tar"),
        (str(tmp_path), f"has 2 PyTorch weights .* a.pth, b.pth.\nSelect .* {tmp_path}/a.pth"),
        ("me/none", "has 0 PyTorch weights files; its files: README.md"),
    ):
        with pytest.raises(UsageError, match=message):
            find_weights(spec)


@each("content", [b"[1, 2]", b"{", b"\xff\xfe"])
def test_invalid_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").touch()
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: "):
        find_weights(str(tmp_path))


def test_cached_weights_are_listed_without_heavy_imports(hub: FakeHub) -> None:
    spec = VARIANTS["van_b0"].weights
    assert spec is not None
    repo, _, name = spec.partition(":")
    hub.repos[repo] = {name: CONTENT}
    assert find_cached_weights(VARIANTS["van_b0"]) is None
    assert find_cached_weights(VARIANTS["van_b5"]) is None
    path = find_weights(spec).path
    assert find_cached_weights(VARIANTS["van_b0"]) == path
    code = (
        "import sys; from van_deploy.model.variants import list_variants; list_variants();"
        "print([m for m in ('torch', 'numpy', 'httpx2', 'httpx', 'timm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


# --- the public weights ----------------------------------------------------------------------


@pytest.fixture
def published(hub: FakeHub) -> bytes:
    """Return the weights of van_b0 on the local hub."""
    repo, _, file = (VARIANTS["van_b0"].weights or "").partition(":")
    buffer = io.BytesIO()
    torch.save({"state_dict": random_van(VARIANTS["van_b0"].config, 1).state_dict()}, buffer)
    hub.repos[repo] = {file: buffer.getvalue()}
    return buffer.getvalue()


def test_public_weights_script(published: bytes, monkeypatch: Any, capsys: Any) -> None:
    results = {"export": (0, ""), "verify": (0, ""), "evaluate": (0, "")}
    monkeypatch.setattr(public_weights, "run_command", lambda name, *_: results[name])

    def output(code: int, *arguments: str) -> str:
        assert public_weights.main(arguments) == code
        return capsys.readouterr().out

    digest = hashlib.sha256(published).hexdigest()
    first = output(0, "van_b0")
    assert f"sha256    {digest}\n  pinned    (not yet: pin the line above)" in first
    assert "top-1     not measured (no --imagenet)\nvan_b0: as published" in first
    for top1, code in ((0.754, 0), (0.74, 1)):
        results["evaluate"] = (0, f'{{"accuracy": {{"fp32": {{"top1": {top1}}}}}}}')
        measured = output(code, "van_b0", "--imagenet", "val")
    assert "van_b0: top-1 is 74.00 %, published 75.4 %" in measured
    results["verify"] = (1, "")
    assert "van_b0: verify ended with exit code 1" in output(1, "van_b0", "--imagenet", "val")
    assert "van_b1: Visual-Attention-Network/VAN-Small-original/" in output(1, "van_b1")
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
