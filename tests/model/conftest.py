"""Fixtures for the model package: tensor names of other formats, and a local hub server."""

import argparse
import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from van_deploy.model.van import VAN, random_van
from van_deploy.model.variants import VARIANTS, VanConfig


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
        for pattern, replacement in NAMES.get(target, {}).items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def has_equal_outputs(one: VAN, other: VAN) -> bool:
    shape = (2, other.config.in_chans, 64, 64)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return torch.equal(one(images), other(images))


def sample_images() -> list[Image.Image]:
    """Return noise of sizes that are rounded in every way."""
    sizes = ((8, 8), (33, 57), (57, 33), (249, 248), (300, 301), (1, 5), (224, 224), (1000, 247))
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def save_weights(
    folder: Path,
    state: Mapping[str, Tensor],
    *,
    config: object = None,
    processor: object = None,
    **inside: Any,
) -> str:
    """Write a checkpoint with metadata in it and in the JSON beside it; return the folder."""
    folder.mkdir(exist_ok=True)
    torch.save({"state_dict": dict(state), **inside}, folder / "model.pth")
    for name, value in (("config.json", config), ("preprocessor_config.json", processor)):
        (folder / name).unlink(missing_ok=True)
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    return str(folder)


# --- a local hub server --------------------------------------------------------------------


class FakeHub(ThreadingHTTPServer):
    """A local server with the hub's routes: model info, HEAD and ranged GET of files.

    Attributes:
        repos: content of each repository's files; another revision is ``owner/name@v1``.
        gated: gated repositories.
        length: incorrect sizes to announce, by file name.
        log: method and path of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.length: dict[str, int] = {}
        self.log: list[str] = []

    def commit(self, repo_id: str) -> str:
        """Return a commit hash of the files."""
        return hashlib.sha1(repr(self.repos.get(repo_id)).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.log.append(f"{self.command} {path}")
        url = re.compile("/(api/models/)?([^/]+/[^/]+)(?:/(?:revision|resolve)/([^/]+))?/?(.*)")
        is_api, repo_id, revision, name = url.fullmatch(path).groups()  # type: ignore[union-attr]
        keys = [key for key in hub.repos if key.partition("@")[0] == repo_id]
        revisions = {key.partition("@")[2] or "main": key for key in keys}
        revisions |= {hub.commit(key): key for key in keys}
        key = revisions.get(revision or "main", "")
        files = hub.repos.get(key, {})
        if repo_id in hub.gated:
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif not key:
            code = "RevisionNotFound" if keys else "RepoNotFound"
            self._send(404, b"", {"X-Error-Code": code})
        elif is_api:
            siblings = [{"rfilename": file} for file in files]
            info = {"id": repo_id, "sha": hub.commit(key), "siblings": siblings}
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif name not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self._send_file(name, files[name], {"X-Repo-Commit": hub.commit(key)})

    def _send_file(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        hub, digest = self.server, hashlib.sha256(content).hexdigest()
        start = int((self.headers.get("Range") or "bytes=0-")[6:].rstrip("-"))
        length = hub.length.get(name, len(content))
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(length)}
        headers |= {"Content-Length": str(length - start)}
        self.close_connection = name in hub.length
        self._send(206 if start else 200, content[start:], headers)

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Return a running local hub and use it, with an empty cache in ``tmp_path``."""
    server = FakeHub()
    for name in ("HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))  # for child processes
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def torch_bytes(content: object) -> bytes:
    """Return the bytes of a file of ``torch.save``."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture
def published(hub: FakeHub) -> bytes:
    """Return the official file of van_b0, with random weights, on the local hub."""
    repo, _, file = (VARIANTS["van_b0"].weights or "").partition(":")
    empty = argparse.Namespace(mean=None, std=None, img_size=None, interpolation="", crop_pct=None)
    state = random_van(VARIANTS["van_b0"].config, 1).state_dict()
    hub.repos[repo] = {file: torch_bytes({"state_dict": state, "args": empty})}
    return hub.repos[repo][file]
