"""Fixtures for the model package: tensor names of other formats, and a local hub server."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from van_deploy.model.van import VAN, random_van
from van_deploy.model.variants import VanConfig


@pytest.fixture(scope="session")
def tiny_config() -> VanConfig:
    """Return a small architecture."""
    return VanConfig((8, 12, 16, 24), (1, 2, 1, 1), (4, 4, 2, 2), num_classes=5)


@pytest.fixture(scope="session")
def tiny(tiny_config: VanConfig) -> VAN:
    """Return a seeded VAN with non-trivial statistics; tests must not change it."""
    return random_van(tiny_config, seed=7)


# Regular expressions and replacements, written independently of the package: those of
# mmpretrain's tools/model_converters/van2mmpretrain.py, and the modules of Transformers'
# VanForImageClassification.
NAMES: dict[str, dict[str, Any]] = {
    "official": {},
    "mmpretrain": {
        r"^(?!head)": "backbone.",
        r"^head\.": "head.fc.",
        r"(patch_embed\d)\.proj\.": r"\1.projection.",
        r"\.block(\d)": r".blocks\1",
        r"\.conv0\.": ".DW_conv.",
        r"\.conv_spatial\.": ".DW_D_conv.",
        r"\.dwconv\.dwconv\.": ".dwconv.",
    },
    "transformers": {
        r"^head\.": "classifier.",
        r"attn\.spatial_gating_unit\.": "attention.attention_layer.attention.",
        r"\.conv0\.": ".depth_wise.",
        r"\.conv_spatial\.": ".depth_wise_dilated.",
        r"\.attention\.conv1\.": ".attention.point_wise.",
        r"attn\.proj_1": "attention.pre_projection.conv",
        r"attn\.proj_2": "attention.post_projection",
        r"mlp\.dwconv\.dwconv": "mlp.depth_wise",
        r"mlp\.fc1": "mlp.in_dense",
        r"mlp\.fc2": "mlp.out_dense",
        r"(block.*)\.norm1": r"\1.pre_normomalization",
        r"(block.*)\.norm2": r"\1.post_normalization",
        r"layer_scale_1": "attention_scaling.weight",
        r"layer_scale_2": "mlp_scaling.weight",
        r"^patch_embed(.)\.proj": r"van.encoder.stages.<\1>.embeddings.convolution",
        r"^patch_embed(.)\.norm": r"van.encoder.stages.<\1>.embeddings.normalization",
        r"^norm(.)\.": r"van.encoder.stages.<\1>.normalization.",
        r"^block(.)\.": r"van.encoder.stages.<\1>.layers.",
        r"<(.)>": lambda match: str(int(match[1]) - 1),
    },
}


def rename(state: Mapping[str, Tensor], target: str) -> dict[str, Tensor]:
    """Return an official state dict with the names of another format."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in NAMES[target].items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


# --- a local hub server --------------------------------------------------------------------


@dataclass
class FakeHub:
    """A local server with the hub's routes: model info, HEAD and ranged GET of files.

    Attributes:
        repos: content of each repository's files; another revision is ``owner/name@v1``.
        gated: gated repositories.
        drop_after: bytes after which the next download's connection is closed, once.
        announce: incorrect digests to announce, by file name.
        length: incorrect sizes to announce, by file name.
        stall: bytes after which every download stalls until the client closes the connection.
        log: method, path and Range header of each request.
    """

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    drop_after: int | None = None
    announce: dict[str, str] = field(default_factory=dict)
    length: dict[str, int] = field(default_factory=dict)
    stall: int | None = None
    log: list[tuple[str, str, str | None]] = field(default_factory=list)

    def commit(self, repo_id: str) -> str:
        """Return a commit hash of the files."""
        return hashlib.sha1(repr(self.repos.get(repo_id)).encode()).hexdigest()

    def downloads(self, filename: str) -> list[str | None]:
        """Return the Range header of each GET of a file."""
        return [r for method, path, r in self.log if method == "GET" and path.endswith(filename)]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        hub.log.append((self.command, self.path, self.headers.get("Range")))
        path = self.path.partition("?")[0].strip("/")
        is_api, name = path.startswith("api/models/"), ""
        if is_api:
            repo_id, _, revision = path.removeprefix("api/models/").partition("/revision/")
        else:
            repo_id, _, file = path.partition("/resolve/")
            revision, _, name = file.partition("/")
        # a revision is a name or a commit
        keys = [key for key in hub.repos if key.partition("@")[0] == repo_id]
        revisions = {key.partition("@")[2] or "main": key for key in keys}
        revisions |= {hub.commit(key): key for key in keys}
        key = revisions.get(revision or "main", "")
        if repo_id in hub.gated:
            self._error(403, "GatedRepo")
        elif not keys:
            self._error(404, "RepoNotFound")
        elif is_api and not key:
            self._error(404, "RevisionNotFound")
        elif is_api:
            siblings = [{"rfilename": file} for file in hub.repos[key]]
            info = {"id": repo_id, "modelId": repo_id, "sha": hub.commit(key), "siblings": siblings}
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif name not in hub.repos.get(key, {}):
            self._error(404, "EntryNotFound")
        else:
            self._send_file(key, name)

    def _send_file(self, key: str, name: str) -> None:
        hub, content = self.hub, self.hub.repos[key][name]
        digest = hub.announce.get(name, hashlib.sha256(content).hexdigest())
        headers = {
            "ETag": f'"{digest}"',
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(hub.length.get(name, len(content))),
            "X-Repo-Commit": hub.commit(key),
            "Accept-Ranges": "bytes",
        }
        start = int(re.sub(r"\D", "", (self.headers.get("Range") or "0").split("-")[0]) or 0)
        status, limit, stalls = 206 if start else 200, hub.stall, hub.stall is not None
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        is_download = self.command == "GET"
        if is_download and hub.drop_after is not None and len(content) > hub.drop_after:
            limit, hub.drop_after, self.close_connection = hub.drop_after, None, True
        elif name in hub.length:
            headers["Content-Length"] = str(hub.length[name] - start)
            self.close_connection = True
        self._send(status, content[start:], headers, limit)
        if is_download and stalls:
            self.wfile.flush()
            with contextlib.suppress(OSError):
                self.connection.settimeout(20)
                self.connection.recv(1)  # returns when the client closes it
            self.close_connection = True

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(
        self, status: int, content: bytes, headers: Mapping[str, str], limit: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:limit])


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty hub cache in ``tmp_path``, and none of the user's hub settings."""
    for name in ("HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))  # for child processes
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path


@pytest.fixture
def hub(caches: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Return a running local hub; ``HF_ENDPOINT`` is its address."""
    state = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", state.url)
    yield state
    server.shutdown()
    server.server_close()
    thread.join()
