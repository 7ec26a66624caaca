"""Downloads, and ``make public-weights``, against a local server that answers as the hub does."""

from __future__ import annotations

import hashlib
import io
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.each import each
from training import public_weights
from van_deploy.errors import CheckpointError, DownloadError, UsageError
from van_deploy.model.files import find_weights
from van_deploy.model.van import random_van
from van_deploy.model.variants import VARIANT_NAMES, VARIANTS, find_cached_weights

if TYPE_CHECKING:
    from tests.model.conftest import FakeHub

REPO = "someone/van"
CONTENT = bytes(range(256)) * 400
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def refusal(word: str, *, offline: bool = False, sha256: str | None = None) -> str:
    with pytest.raises(DownloadError) as error:
        find_weights(word, sha256, offline)
    assert error.value.remedy
    return error.value.message


def test_a_download_is_cached(hub: FakeHub) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    first, again = find_weights(f"{REPO}:w.pth"), find_weights(f"{REPO}:w.pth")
    assert (first.path.read_bytes(), first.sha256, first.name) == (CONTENT, DIGEST, "van")
    assert first == again
    assert len(hub.downloads("w.pth")) == 1


def test_a_dropped_connection_is_taken_up(hub: FakeHub, monkeypatch: Any) -> None:
    # huggingface_hub writes in pieces of 10 MB; smaller ones let a small file break in the middle.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 16384)
    hub.repos[REPO] = {"w.pth": CONTENT}
    hub.drop_after = 40_000
    assert find_weights(f"{REPO}:w.pth").path.read_bytes() == CONTENT
    first, second = hub.downloads("w.pth")
    assert first is None
    assert second is not None
    assert 0 < int(second.removeprefix("bytes=").rstrip("-")) <= 40_000


@pytest.mark.parametrize(
    "fault", [{"length": {"w.pth": len(CONTENT) + 5000}}, {"length": {"w.pth": 9}}, {"stall": 0}]
)
def test_a_hub_lies_or_stands_still(hub: FakeHub, monkeypatch: Any, fault: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.repos[REPO] = {"w.pth": CONTENT}
    begun = time.monotonic()
    for name, value in fault.items():
        monkeypatch.setattr(hub, name, value)
    assert f"{REPO}/w.pth" in refusal(f"{REPO}:w.pth")
    assert time.monotonic() - begun < 60
    hub.length, hub.stall = {}, None
    assert find_weights(f"{REPO}:w.pth").path.read_bytes() == CONTENT


def test_offline_uses_the_cache_only(hub: FakeHub, monkeypatch: Any) -> None:
    hub.repos[REPO] = {"model.safetensors": CONTENT, "config.json": b'{"a": 1}'}
    for word in (f"{REPO}:w.pth", REPO):
        assert "the cache (" in refusal(word, offline=True)
    assert hub.log == []
    online = find_weights(REPO)
    hub.log.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_weights(REPO) == online
    assert online.configs == {"config.json": {"a": 1}}
    assert f"{REPO}/w.pth could not be had" in refusal(f"{REPO}:w.pth")
    assert hub.log == []


def test_a_revision_is_its_own_file(hub: FakeHub) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    hub.repos[f"{REPO}@v1"] = {"w.pth": CONTENT + b"old"}
    commit = hub.commit(f"{REPO}@v1")
    assert find_weights(REPO).path.read_bytes() == CONTENT
    for revision in ("v1", commit):
        for offline, file in ((False, ":w.pth"), (True, "")):
            found = find_weights(f"{REPO}@{revision}{file}", offline=offline)
            assert found.path.read_bytes() == CONTENT + b"old"
    hub.log.clear()
    assert find_weights(f"{REPO}@{commit}:w.pth").name == "van"
    assert hub.log == [], "a commit that is here never changes: nothing is asked"
    assert "Revision" in refusal(f"{REPO}@v2")


def test_without_a_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    path = find_weights(REPO).path
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", nowhere)
    found = find_weights(REPO)
    assert found.path == path
    assert found.notes[0].startswith("the copy in the cache, since the hub cannot be asked: ")
    for word in (f"{REPO}:other.pth", "someone/else", "someone/else:w.pth"):
        assert f"could not be had from {nowhere} or the cache" in refusal(word)


def test_what_the_hub_does_not_give_is_named(hub: FakeHub) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    for word in ("nobody/nothing", "nobody/nothing:w.pth"):
        assert f"could not be had from {hub.url}" in refusal(word)
        assert "RepositoryNotFoundError" in refusal(word)
    assert "EntryNotFoundError" in refusal(f"{REPO}:v.pth")
    assert "HFValidationError" in refusal("a--b/c")
    hub.gated.add(REPO)
    assert "GatedRepoError" in refusal(REPO)  # although it is in the cache


def test_digests_must_be_the_expected_and_the_announced(hub: FakeHub) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    assert refusal(REPO, sha256="0" * 64) == (
        f"{REPO}/w.pth is another file: its SHA-256 is {DIGEST}, the expected one {'0' * 64}."
    )
    assert find_weights(REPO, expect_sha256=DIGEST.upper()).sha256 == DIGEST
    hub.repos[REPO] = {"v.pth": CONTENT}
    hub.announce["v.pth"] = "a" * 64
    assert f"is damaged: the hub announced the SHA-256 {'a' * 64}" in refusal(REPO)


def test_the_one_file_and_the_json_beside_it(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos[REPO] = {
        "pytorch_model.bin": b"x",
        "model.safetensors": CONTENT,
        "config.json": b'{"layer_norm_eps": 1e-5}',
        "preprocessor_config.json": b'{"size": 224}',
        "sub/w.pth": CONTENT,
        "sub/config.json": b'{"depths": 3}',
    }
    found, beside = find_weights(REPO), {"config.json": {"layer_norm_eps": 1e-5}}
    assert found.path.name == "model.safetensors"
    assert found.configs == beside | {"preprocessor_config.json": {"size": 224}}
    assert find_weights(f"{REPO}:sub/w.pth").configs == {"config.json": {"depths": 3}}
    hub.repos["me/two"] = {"b.pth": CONTENT, "a.pth.tar": CONTENT, "README.md": b""}
    hub.repos["me/none"] = {"README.md": b""}
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).touch()
    for word, told in (
        ("me/two", "has 2 weights files .* a.pth.tar, b.pth.\nSay which, such as me/two:a.pth.tar"),
        (str(tmp_path), f"has 2 weights files .* a.pth, b.pth.\nSay .* {tmp_path}/a.pth"),
        ("me/none", "has 0 weights files that PyTorch can read, among README.md"),
    ):
        with pytest.raises(UsageError, match=told):
            find_weights(word)


@each("content", [b"[1, 2]", b"{", b"\xff\xfe"])
def test_broken_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").touch()
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: "):
        find_weights(str(tmp_path))


def test_locating_weights(hub: FakeHub) -> None:
    word = VARIANTS["van_b0"].weights
    assert word is not None
    repo, _, name = word.partition(":")
    hub.repos[repo] = {name: CONTENT}
    assert find_cached_weights(VARIANTS["van_b0"]) is None
    assert find_cached_weights(VARIANTS["van_b5"]) is None
    path = find_weights(word).path
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
    """Return the file that the local hub publishes as van_b0's."""
    repo, _, file = (VARIANTS["van_b0"].weights or "").partition(":")
    buffer = io.BytesIO()
    torch.save({"state_dict": random_van(VARIANTS["van_b0"].config, 1).state_dict()}, buffer)
    hub.repos[repo] = {file: buffer.getvalue()}
    return buffer.getvalue()


def test_what_is_not_as_published(published: bytes, monkeypatch: Any, capsys: Any) -> None:
    answers = {"export": (0, ""), "verify": (0, ""), "evaluate": (0, "")}
    monkeypatch.setattr(public_weights, "command", lambda word, *_: answers[word])

    def told(code: int, *words: str) -> str:
        assert public_weights.main(words) == code
        return capsys.readouterr().out

    digest = hashlib.sha256(published).hexdigest()
    first = told(0, "van_b0")
    assert f"sha256    {digest}\n  pinned    (not yet: pin the line above)" in first
    assert "top-1     not measured (no --imagenet)\nvan_b0: as published" in first
    for top1, code in ((0.754, 0), (0.74, 1)):
        answers["evaluate"] = (0, f'{{"accuracy": {{"fp32": {{"top1": {top1}}}}}}}')
        measured = told(code, "van_b0", "--imagenet", "val")
    assert "van_b0: top-1 is 74.00 %, published 75.4 %" in measured
    answers["verify"] = (1, "")
    assert "van_b0: verify ended with exit code 1" in told(1, "van_b0", "--imagenet", "val")
    assert "van_b1: Visual-Attention-Network/VAN-Small-original/" in told(1, "van_b1")
    pinned = replace(VARIANTS["van_b0"], sha256="0" * 64)
    monkeypatch.setitem(VARIANT_NAMES, "van_b0", pinned)
    assert f"its SHA-256 is {digest}, the expected one {'0' * 64}." in told(1, "van_b0")


@pytest.mark.slow
def test_the_whole_of_it(published: bytes, tmp_path: Path, capfd: Any) -> None:
    assert public_weights.main(["van_b0", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "van_b0" / "model.onnx").exists()
    told = capfd.readouterr().out
    assert "export    passed" in told
    assert "verify    passed" in told
