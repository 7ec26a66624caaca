"""Downloads, against a small local server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from van_deploy.errors import CheckpointError, DownloadError, UsageError
from van_deploy.model.digests import cache_folder, check_digest, hub_cache
from van_deploy.model.hub import choose_file, fetch_weights, locate_weights
from van_deploy.model.sources import Found, find_weights
from van_deploy.model.variants import VARIANTS, HubFile

if TYPE_CHECKING:
    from tests.model.conftest import FakeHub

REPO = "someone/van"
CONTENT = bytes(range(256)) * 400


def _refusal(*arguments: str, **options: object) -> DownloadError:
    with pytest.raises(DownloadError) as error:
        fetch_weights(*arguments, **options)  # type: ignore[arg-type]
    assert error.value.remedy
    return error.value


def _find(word: str, *, offline: bool = False, sha256: str | None = None) -> Found:
    return find_weights(word, offline, sha256, None)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_download_is_cached_reported_and_remembered(hub: FakeHub) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    seen: list[tuple[str, int, int | None]] = []
    digest = hashlib.sha256(CONTENT).hexdigest()
    file, path, sha256, notes = fetch_weights(
        REPO, "w.pth", progress=lambda *step: seen.append(step)
    )
    assert path.read_bytes() == CONTENT
    assert (file, sha256, notes) == (HubFile(REPO, "w.pth"), digest, ())
    assert seen[-1] == ("w.pth", len(CONTENT), len(CONTENT))
    first, again = _find(f"{REPO}:w.pth"), _find(f"{REPO}:w.pth")
    assert first.notes == (f"digest {digest[:12]}… recorded: the first download on this machine",)
    assert again.notes == (f"digest {digest[:12]}… as recorded at the first download",)
    assert len(hub.downloads("w.pth")) == 1


def test_a_dropped_connection_is_taken_up_where_it_broke(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    # huggingface_hub writes in pieces of 10 MB; smaller ones let a small file break in the middle.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 16384)
    hub.repos[REPO] = {"w.pth": CONTENT}
    hub.drop_after = 40_000
    seen: list[int] = []
    _, path, *_ = fetch_weights(REPO, "w.pth", progress=lambda _name, here, _all: seen.append(here))
    assert path.read_bytes() == CONTENT
    first, second = hub.downloads("w.pth")
    assert first is None
    assert second is not None
    start = int(second.removeprefix("bytes=").rstrip("-"))
    assert 0 < start <= 40_000
    assert seen == sorted(seen)
    assert seen[-1] == len(CONTENT)


@pytest.mark.parametrize("announced", [len(CONTENT) + 5000, len(CONTENT) - 5000])
def test_a_hub_that_lies_about_the_length(hub: FakeHub, announced: int) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    hub.length["w.pth"] = announced
    error = _refusal(REPO, "w.pth")
    assert f"{REPO}/w.pth" in error.message
    hub.length.clear()
    assert fetch_weights(REPO, "w.pth")[1].read_bytes() == CONTENT


def test_a_download_that_stands_still_is_given_up(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.repos[REPO] = {"w.pth": CONTENT}
    hub.stall_after = 0
    begun = time.monotonic()
    error = _refusal(REPO, "w.pth")
    assert time.monotonic() - begun < 60
    assert f"{REPO}/w.pth" in error.message
    hub.stall_after = None
    assert fetch_weights(REPO, "w.pth")[1].read_bytes() == CONTENT


def test_offline_uses_the_cache_and_nothing_else(hub: FakeHub) -> None:
    hub.repos[REPO] = {"model.safetensors": CONTENT, "config.json": b'{"a": 1}'}
    online = _find(REPO)
    hub.log.clear()
    offline = _find(REPO, offline=True)
    assert (offline.path, offline.beside) == (online.path, {"config.json": {"a": 1}})
    assert hub.log == []


def test_a_revision_is_its_own_file(hub: FakeHub) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    hub.repos[f"{REPO}@v1"] = {"w.pth": CONTENT + b"old"}
    commit = hub.commit(f"{REPO}@v1")
    assert _find(REPO).path.read_bytes() == CONTENT
    for revision in ("v1", commit):
        assert _find(f"{REPO}@{revision}:w.pth").path.read_bytes() == CONTENT + b"old"
        assert _find(f"{REPO}@{revision}", offline=True).path.read_bytes() == CONTENT + b"old"
    hub.log.clear()
    assert _find(f"{REPO}@{commit}:w.pth").repo_id == REPO
    assert hub.log == [], "a commit that is here never changes: nothing is asked"
    with pytest.raises(DownloadError, match=f"^The repository {REPO} has no such revision"):
        _find(f"{REPO}@v2")


def test_the_cache_serves_while_the_hub_is_away(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    path = _find(REPO).path
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{_free_port()}")
    found = _find(REPO)
    assert found.path == path
    assert found.notes[0].startswith("the copy in the cache, since the hub cannot be asked: ")
    with pytest.raises(DownloadError, match=f"^{REPO} could not be downloaded"):
        _find(f"{REPO}:other.pth")


def test_offline_by_environment(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert _refusal(REPO, "w.pth").message == (
        f"{REPO}/w.pth is not in the cache ({hub_cache()}), and this is offline."
    )
    assert hub.log == []


@pytest.mark.parametrize("filename", [None, "w.pth"])
def test_offline_without_cache(caches: Path, filename: str | None) -> None:
    error = _refusal(REPO, filename or "w.pth", offline=True)
    assert "is not in the cache" in error.message
    with pytest.raises(DownloadError, match=f"^{REPO} is not in the cache"):
        fetch_weights(REPO, offline=True)


def test_no_network(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = _free_port()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    for error in (_refusal(REPO, "w.pth"), _refusal(REPO)):
        assert f"could not be downloaded (http://127.0.0.1:{port}): " in error.message
        assert "Check the network" in error.remedy
    assert not list(hub_cache().rglob("*.incomplete"))


def test_no_such_repository_or_file(hub: FakeHub) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    assert _refusal("nobody/nothing").message == (
        f"There is no repository nobody/nothing on the hub ({hub.url}), or it is private."
    )
    assert _refusal("nobody/nothing", "w.pth").message == (
        f"There is no repository nobody/nothing on the hub ({hub.url}), or it is private."
    )
    assert _refusal(REPO, "v.pth").message == f"The repository {REPO} has no file v.pth."


def test_gated_repository(hub: FakeHub) -> None:
    hub.gated.add(REPO)
    error = _refusal(REPO, "w.pth")
    assert error.message == f"{REPO} is gated: its owners must let you in."
    assert "hf auth login" in error.remedy


def test_expected_digest(hub: FakeHub) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    right = hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(DownloadError) as error:
        _find(REPO, sha256="0" * 64)
    assert error.value.message == (
        f"{REPO}/w.pth is not the file that was asked for: its SHA-256 is {right}, "
        f"the expected one {'0' * 64}."
    )
    assert not (cache_folder() / "digests").exists(), "a refused file must not be remembered"
    assert _find(REPO, sha256=right).sha256 == right


def test_announced_digest_must_be_true(hub: FakeHub) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    hub.announce["w.pth"] = "a" * 64
    assert (
        f"is damaged: the hub announced the SHA-256 {'a' * 64}" in _refusal(REPO, "w.pth").message
    )


def test_a_changed_file_is_refused_later(hub: FakeHub) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT}
    old = _find(REPO).sha256
    hub.repos[REPO] = {"w.pth": CONTENT + b"changed"}
    with pytest.raises(DownloadError) as error:
        _find(REPO)
    assert f"and was {old} when it was first downloaded" in error.value.message
    remembered = next((cache_folder() / "digests").iterdir())
    assert str(remembered) in error.value.remedy
    remembered.unlink()
    assert _find(REPO).path.read_bytes().endswith(b"changed")


def test_repositorys_json_lies_beside(hub: FakeHub) -> None:
    hub.repos[REPO] = {
        "pytorch_model.bin": b"x",
        "model.safetensors": CONTENT,
        "config.json": b'{"layer_norm_eps": 1e-5}',
        "preprocessor_config.json": b'{"size": 224}',
        "sub/w.pth": CONTENT,
        "sub/config.json": b'{"depths": 3}',
    }
    found = _find(REPO)
    assert found.path.name == "model.safetensors"
    assert found.beside == {
        "config.json": {"layer_norm_eps": 1e-5},
        "preprocessor_config.json": {"size": 224},
    }
    assert _find(f"{REPO}:sub/w.pth").beside == {"config.json": {"depths": 3}}


@pytest.mark.parametrize("content", [b"[1, 2]", b"{", b"\xff\xfe"])
def test_broken_json_is_named(hub: FakeHub, content: bytes) -> None:
    hub.repos[REPO] = {"w.pth": CONTENT, "config.json": content}
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: "):
        _find(REPO)


def test_the_one_file_that_can_be_meant() -> None:
    assert choose_file(["a.pth.tar", "README.md"], REPO) == "a.pth.tar"
    assert choose_file(["pytorch_model.bin", "a.pth"], REPO) == "pytorch_model.bin"
    with pytest.raises(UsageError) as error:
        choose_file(["b.pth", "a.pth"], REPO)
    assert error.value.message == f"{REPO} has 2 weights files: a.pth, b.pth."
    assert error.value.remedy == f"Say which: {REPO}:a.pth"
    with pytest.raises(UsageError, match="no weights that PyTorch can read"):
        choose_file(["README.md"], REPO)


def test_locating_weights(hub: FakeHub) -> None:
    file = VARIANTS["van_b0"].weights
    assert file is not None
    hub.repos[file.repo_id] = {file.filename: CONTENT}
    assert locate_weights("van_b0") is None
    path = fetch_weights(file.repo_id, file.filename)[1]
    hub.log.clear()
    assert locate_weights("van_tiny") == path
    assert locate_weights("van_b5") is None
    assert hub.log == []


def test_locating_imports_nothing_heavy() -> None:
    code = (
        "import sys; from van_deploy.model.hub import locate_weights; locate_weights('van_b0');"
        "print([m for m in ('torch', 'numpy', 'huggingface_hub', 'timm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


# --- places ----------------------------------------------------------------------------------


def test_cache_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("VAN_DEPLOY_CACHE", "XDG_CACHE_HOME", "HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "van-deploy"
    assert hub_cache() == tmp_path / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "van-deploy"
    assert hub_cache() == tmp_path / "x" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "h"))
    assert hub_cache() == tmp_path / "h" / "hub"
    monkeypatch.setenv("VAN_DEPLOY_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("VAN_DEPLOY_CACHE", "XDG_CACHE_HOME", "HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "absent"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_folder().parent.parent == tmp_path
    assert check_digest(REPO, "w.pth", "a" * 64).endswith("first download on this machine")


def test_unwritable_memory_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VAN_DEPLOY_CACHE", str(tmp_path / "file"))
    note = check_digest(REPO, "w.pth", "a" * 64)
    assert note.startswith("digest aaaaaaaaaaaa… could not be recorded in ")


@pytest.mark.parametrize("content", ["", "{}", '{"sha256": 3}', "[]", '{"sha256": "xyz"}'])
def test_damaged_memory_is_named(caches: Path, content: str) -> None:
    check_digest(REPO, "w.pth", "a" * 64)
    (path,) = (cache_folder() / "digests").iterdir()
    assert json.loads(path.read_text())["sha256"] == "a" * 64
    path.write_text(content)
    with pytest.raises(DownloadError, match="cannot be read") as error:
        check_digest(REPO, "w.pth", "a" * 64)
    assert error.value.remedy == "Remove that file and try again."
