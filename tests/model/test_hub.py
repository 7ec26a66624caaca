"""Downloads, against a small local server that answers as the hub does."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.each import each
from van_deploy.errors import CheckpointError, DownloadError, UsageError
from van_deploy.model.hub import cache_folder, hub_cache, locate_weights
from van_deploy.model.sources import Found, find_weights
from van_deploy.model.variants import VARIANTS

if TYPE_CHECKING:
    from tests.model.conftest import FakeHub

REPO = "someone/van"
CONTENT = bytes(range(256)) * 400
DIGEST = hashlib.sha256(CONTENT).hexdigest()

Seen = list[tuple[str, int, int | None]]


def find(
    word: str, *, offline: bool = False, sha256: str | None = None, seen: Seen | None = None
) -> Found:
    return find_weights(word, offline, sha256, lambda *s: None if seen is None else seen.append(s))


def refusal(word: str, *, offline: bool = False, sha256: str | None = None) -> str:
    with pytest.raises(DownloadError) as error:
        find(word, offline=offline, sha256=sha256)
    assert error.value.remedy
    return error.value.message


def test_a_download_is_cached_reported_and_remembered(hub: FakeHub) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    seen: Seen = []
    first, again = find(f"{REPO}:w.pth", seen=seen), find(f"{REPO}:w.pth")
    assert (first.path.read_bytes(), first.sha256) == (CONTENT, DIGEST)
    assert seen[-1] == ("w.pth", len(CONTENT), len(CONTENT))
    assert first.notes == (f"digest {DIGEST[:12]}… recorded: the first download on this machine",)
    assert again.notes == (f"digest {DIGEST[:12]}… as recorded at the first download",)
    assert len(hub.downloads("w.pth")) == 1


def test_a_dropped_connection_is_taken_up_where_it_broke(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    # huggingface_hub writes in pieces of 10 MB; smaller ones let a small file break in the middle.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 16384)
    hub.repos[REPO] = {"w.pth": CONTENT}
    hub.drop_after = 40_000
    seen: Seen = []
    assert find(f"{REPO}:w.pth", seen=seen).path.read_bytes() == CONTENT
    first, second = hub.downloads("w.pth")
    assert first is None
    assert second is not None
    assert 0 < int(second.removeprefix("bytes=").rstrip("-")) <= 40_000
    here = [step[1] for step in seen]
    assert here == sorted(here)
    assert here[-1] == len(CONTENT)


@pytest.mark.parametrize(
    "fault", [{"length": {"w.pth": len(CONTENT) + 5000}}, {"length": {"w.pth": 9}}, {"stall": 0}]
)
def test_a_hub_that_lies_about_the_length_or_stands_still(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, fault: dict[str, object]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.repos[REPO] = {"w.pth": CONTENT}
    begun = time.monotonic()
    for name, value in fault.items():
        monkeypatch.setattr(hub, name, value)
    assert f"{REPO}/w.pth" in refusal(f"{REPO}:w.pth")
    assert time.monotonic() - begun < 60
    hub.length, hub.stall = {}, None
    assert find(f"{REPO}:w.pth").path.read_bytes() == CONTENT


def test_offline_uses_the_cache_and_nothing_else(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = f"{REPO}/w.pth is not in the cache ({hub_cache()}), and this is offline."
    assert refusal(f"{REPO}:w.pth", offline=True) == missing
    assert refusal(REPO, offline=True) == missing.replace("/w.pth", "")
    hub.repos[REPO] = {"model.safetensors": CONTENT, "config.json": b'{"a": 1}'}
    online = find(REPO)
    hub.log.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = find(REPO)
    assert (offline.path, offline.beside) == (online.path, {"config.json": {"a": 1}})
    assert refusal(f"{REPO}:w.pth") == missing
    assert hub.log == []


def test_a_revision_is_its_own_file(hub: FakeHub) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    hub.repos[f"{REPO}@v1"] = {"w.pth": CONTENT + b"old"}
    commit = hub.commit(f"{REPO}@v1")
    assert find(REPO).path.read_bytes() == CONTENT
    for revision in ("v1", commit):
        assert find(f"{REPO}@{revision}:w.pth").path.read_bytes() == CONTENT + b"old"
        assert find(f"{REPO}@{revision}", offline=True).path.read_bytes() == CONTENT + b"old"
    hub.log.clear()
    assert find(f"{REPO}@{commit}:w.pth").repo_id == REPO
    assert hub.log == [], "a commit that is here never changes: nothing is asked"
    assert f"The repository {REPO} has no such revision" in refusal(f"{REPO}@v2")


def test_without_a_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    path = find(REPO).path
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", nowhere)
    found = find(REPO)
    assert found.path == path
    assert found.notes[0].startswith("the copy in the cache, since the hub cannot be asked: ")
    for word in (f"{REPO}:other.pth", "someone/else", "someone/else:w.pth"):
        assert f"could not be downloaded ({nowhere}): " in refusal(word)
    assert not list(hub_cache().rglob("*.incomplete"))


def test_what_the_hub_does_not_give_is_named(hub: FakeHub) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    for word in ("nobody/nothing", "nobody/nothing:w.pth"):
        told = f"There is no repository nobody/nothing, or it is private ({hub.url})."
        assert refusal(word) == told
    assert refusal(f"{REPO}:v.pth") == f"The repository {REPO} has no file v.pth ({hub.url})."
    hub.gated.add(REPO)
    assert refusal(REPO).startswith(f"{REPO} is gated: its owners must let you in")
    with pytest.raises(UsageError, match=r"'a--b/c' is no repository"):
        find("a--b/c")


def test_digests_must_be_the_expected_the_announced_and_the_first(hub: FakeHub) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    assert refusal(REPO, sha256="0" * 64) == (
        f"{REPO}/w.pth is not the file that was asked for: its SHA-256 is {DIGEST}, "
        f"the expected one {'0' * 64}."
    )
    assert not (cache_folder() / "digests").exists(), "a refused file must not be remembered"
    assert find(REPO, sha256=DIGEST.upper()).sha256 == DIGEST
    hub.repos[REPO] = {"w.pth": CONTENT + b"changed"}
    assert f"and was {DIGEST} when it was first downloaded" in refusal(REPO)
    (remembered,) = (cache_folder() / "digests").iterdir()
    for content in ("", "{}", '{"sha256": 3}', "[]"):
        remembered.write_text(content)
        assert "is not the file it was" in refusal(REPO)
    remembered.unlink()
    assert find(REPO).path.read_bytes().endswith(b"changed")
    hub.repos[REPO] = {"v.pth": CONTENT}
    hub.announce["v.pth"] = "a" * 64
    assert f"is damaged: the hub announced the SHA-256 {'a' * 64}" in refusal(REPO)


def test_the_one_file_that_can_be_meant_and_the_json_beside_it(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.repos[REPO] = {
        "pytorch_model.bin": b"x",
        "model.safetensors": CONTENT,
        "config.json": b'{"layer_norm_eps": 1e-5}',
        "preprocessor_config.json": b'{"size": 224}',
        "sub/w.pth": CONTENT,
        "sub/config.json": b'{"depths": 3}',
    }
    found = find(REPO)
    assert found.path.name == "model.safetensors"
    assert found.beside == {
        "config.json": {"layer_norm_eps": 1e-5},
        "preprocessor_config.json": {"size": 224},
    }
    assert find(f"{REPO}:sub/w.pth").beside == {"config.json": {"depths": 3}}
    hub.repos["me/two"] = {"b.pth": CONTENT, "a.pth.tar": CONTENT, "README.md": b""}
    hub.repos["me/none"] = {"README.md": b""}
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).touch()
    for word, told in (
        ("me/two", "has 2 weights files .* a.pth.tar, b.pth.\nSay which: me/two:a.pth.tar"),
        (str(tmp_path), f"has 2 weights files .* a.pth, b.pth.\nSay which: {tmp_path}/a.pth"),
        ("me/none", "has 0 weights files that PyTorch can read, among README.md"),
    ):
        with pytest.raises(UsageError, match=told):
            find(word)


@each("content", [b"[1, 2]", b"{", b"\xff\xfe"])
def test_broken_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").touch()
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: "):
        find(str(tmp_path))


def test_locating_weights(hub: FakeHub) -> None:
    file = VARIANTS["van_b0"].weights
    assert file is not None
    hub.repos[file.repo_id] = {file.filename: CONTENT}
    assert locate_weights(VARIANTS["van_b0"]) is None
    path = find(f"{file.repo_id}:{file.filename}").path
    hub.log.clear()
    assert locate_weights(VARIANTS["van_b0"]) == path
    assert locate_weights(VARIANTS["van_b5"]) is None
    assert hub.log == []
    code = (
        "import sys; from van_deploy.model.listing import listed_variants; listed_variants();"
        "print([m for m in ('torch', 'numpy', 'huggingface_hub', 'timm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_cache_places(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("VAN_DEPLOY_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "absent"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder().parents[2] == tmp_path
    for variable, folder, own, hubs in (
        ("HOME", "", ".cache/van-deploy", ".cache/huggingface/hub"),
        ("XDG_CACHE_HOME", "x", "x/van-deploy", "x/huggingface/hub"),
        ("HF_HOME", "h", "x/van-deploy", "h/hub"),
        ("VAN_DEPLOY_CACHE", "own", "own", "h/hub"),
    ):
        monkeypatch.setenv(variable, str(tmp_path / folder))
        assert (cache_folder(), hub_cache()) == (tmp_path / own, tmp_path / hubs)
    (tmp_path / "own").write_text("in the way")
    hub.repos[REPO] = {"w.pth": CONTENT}
    assert f"digest {DIGEST[:12]}… could not be recorded in " in find(REPO).notes[0]
