"""Hosts that lack something: every command with the network refused, and without PyTorch.

The commands of a host run one after the other in one process, on one bundle. Its Python and
that of every process it starts load a ``sitecustomize`` whose audit hook refuses whatever
leaves the machine and writes it down, so that a refusal somebody swallows is seen too.
"""

from __future__ import annotations

import contextlib
import importlib.metadata as metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ed25519
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.artifacts import Subject, enter_engine
from tests.conftest import ROOT
from van_deploy.bundle import MANIFEST
from van_deploy.cli.app import COMMANDS

WITHIN_S = 500
RTX = find_spec("tensorrt_rtx") is not None
HOOK = """
import json, os, sys

def _refuse(event, details):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = details[1]
        if not isinstance(address, tuple):  # a Unix socket, or an address given before
            return
        host = address[0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = details[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if not host or str(host).startswith(("127.", "::1", "localhost")):
        return
    with open(os.environ["REFUSALS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(str(host)) + "\\n")
    raise OSError(101, "the network is refused in this test")

sys.addaudithook(_refuse)
"""

# Every finder is asked as usual, and what may not be there is not found by any. A lone
# command (serve) is the process's own.
DRIVER = """
import json, sys

class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in BLOCKED:
            return self.finder.find_spec(name, path, target)

BLOCKED, commands = json.load(open(sys.argv[1], encoding="utf-8"))
before = set(sys.modules)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
sys.path_importer_cache.clear()
from typer.testing import CliRunner
from van_deploy.cli.app import app, main
if len(commands) == 1:
    sys.argv = ["van-deploy", *commands[0]]
    main()
done = {}
for words in commands:
    result = CliRunner().invoke(app, words)
    fault = result.exception
    told = "" if fault is None or isinstance(fault, SystemExit) else repr(fault)
    done[" ".join(words)] = [result.exit_code, result.stdout, result.stderr, told]
found = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not found & set(BLOCKED), found
json.dump(done, open(sys.argv[2], "w", encoding="utf-8"))
"""


class Host:
    """A machine that refuses the network and lacks some modules; its files are in ``folder``."""

    def __init__(self, folder: Path, blocked: list[str]) -> None:
        self.folder, self.blocked = folder, blocked
        (folder / "site").mkdir()
        (folder / "site/sitecustomize.py").write_text(HOOK)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        paths = [str(folder / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            **kept,
            "PYTHONPATH": os.pathsep.join(paths),
            "REFUSALS": str(folder / "refusals"),
            "HF_HOME": str(folder / "hub"),
            "COLUMNS": "100",
            "NO_COLOR": "1",
        }

    def command(self, commands: list[list[str]]) -> list[str]:
        (self.folder / "in.json").write_text(json.dumps([self.blocked, commands]))
        return [
            sys.executable,
            "-c",
            DRIVER,
            *(str(self.folder / f"{n}.json") for n in ("in", "out")),
        ]

    def run(self, commands: list[list[str]]) -> dict[str, list[Any]]:
        """Return exit code, outputs and fault of each command, by its words."""
        words = self.command(commands)
        subprocess.run(
            words, env=self.environment, check=True, capture_output=True, timeout=WITHIN_S
        )
        found: dict[str, list[Any]] = json.loads((self.folder / "out.json").read_text())
        assert {words: done[3] for words, done in found.items() if done[3]} == {}
        return found

    @contextlib.contextmanager
    def serving(self, bundle: Path) -> Iterator[str]:
        """Run `serve` and give its address."""
        out, words = self.folder / "serve.json", ["serve", str(bundle), "--port", "0", "--json"]
        with out.open("w") as stdout:
            server = subprocess.Popen(self.command([words]), env=self.environment, stdout=stdout)
        try:
            until = time.monotonic() + 120
            while not out.read_text().rstrip().endswith("}"):
                assert time.monotonic() < until
                assert server.poll() is None
                time.sleep(0.1)
            yield str(json.loads(out.read_text())["url"]).rstrip("/")
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)

    def refusals(self) -> set[str]:
        file = self.folder / "refusals"
        return set(map(json.loads, file.read_text().splitlines())) if file.exists() else set()


def commands(folder: Path, images: Path) -> list[list[str]]:
    """Return every command on ``van_digits`` but `serve`, small; `run` goes over the bundle."""
    bundle, key, baseline = (str(folder / name) for name in ("b", "k.pem", "baseline.json"))
    secret = ed25519.Ed25519PrivateKey.generate()
    plain, spki = pem.NoEncryption(), pem.PublicFormat.SubjectPublicKeyInfo
    Path(key).write_bytes(secret.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, plain))
    Path(f"{key}.pub").write_bytes(secret.public_key().public_bytes(pem.Encoding.PEM, spki))
    build = ["build", bundle, "--target", "sm_89", "--optimization-level", "0"]
    skip = ["--allow-skip", "engines"]
    return [
        ["list"],
        ["doctor", "--json"],
        ["info", "van_b1"],
        ["export", "van_digits", "--output", bundle],
        ["quantize", bundle, "--precision", "fp16"],
        *([build] if RTX else []),
        ["info", bundle],
        ["run", "van_digits", "--output", bundle, "--precision", "fp16", *skip],
        ["verify", bundle, "--no-modules", *skip],
        ["drift", bundle, "--level", "stage", "--count", "1", "--artefact", "fp16"],
        ["evaluate", bundle, "--images", str(images), "--artefact", "fp32"],
        ["check", bundle, "--baseline", baseline, "--update", *skip],
        ["inspect", bundle],
        ["package", "triton", bundle, "--output", str(folder / "triton")],
        [
            *("bench", bundle, "--runners", "ort-cpu", "--batches", "1", "--seconds", "0.1"),
            *("--calls", "2", "--limit", "0.2", "--rounds", "1", "--warmup", "0", "--no-save"),
        ],
        ["report", bundle],
        ["sign", bundle, "--key", key],
        ["verify-signature", bundle, "--public-key", f"{key}.pub"],
        ["predict", bundle, f"{bundle}/golden/0.png", "--require-signature", f"{key}.pub"],
    ]


@pytest.mark.slow
def test_no_command_asks_for_the_network(tmp_path: Path, judged: Subject) -> None:
    host = Host(tmp_path, [])
    done = host.run(commands(tmp_path, judged.labelled))
    assert {words: found[2] for words, found in done.items() if found[0]} == {}
    with host.serving(tmp_path / "b") as url, urlopen(f"{url}/v2/health/ready") as answer:
        assert answer.status == 200
    assert host.refusals() == set()
    tried = {words.split()[0] for words in done} | {"serve"} | ({"build"} if not RTX else set())
    assert tried == set(COMMANDS)
    # The hook sees what does ask, and the refusal is one message.
    asks = ["export", "van_b0", "--output", str(tmp_path / "new")]
    code, _, stderr, _ = host.run([asks, ["list"]])[" ".join(asks)]
    assert (code, stderr[:7]) == (5, "error: ")
    assert re.search(r"offline|network|reach|connect", stderr, re.IGNORECASE)
    assert host.refusals() == {"huggingface.co"}
    assert not (tmp_path / "new").exists()


# --- without PyTorch: only what requirements-runtime.txt names -----------------------------------


def lacking() -> list[str]:
    """Return the top-level modules that a host with requirements-runtime.txt lacks."""
    lines = (ROOT / "requirements-runtime.txt").read_text().splitlines()
    wanted = [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]
    there = {"van-deploy"}
    while wanted:
        one = wanted.pop()
        name = str(canonicalize_name(one.name))
        if name in there or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        there.add(name)
        with contextlib.suppress(metadata.PackageNotFoundError):  # what lacks it will say so
            wanted += map(Requirement, metadata.requires(name) or ())
    modules = metadata.packages_distributions().items()
    return sorted(m for m, owners in modules if not there & set(map(canonicalize_name, owners)))


def test_a_host_without_pytorch_and_the_weights(judged: Subject, tmp_path: Path) -> None:
    blocked = lacking()
    assert {"torch", "timm", "torchvision"} <= set(blocked)
    path = Path(shutil.copytree(judged.bundle.path, tmp_path / "bundle"))
    enter_engine(path, "fp16-sm89")
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["weights"]["path"] = "/nowhere/weights.safetensors"
    (path / MANIFEST).write_text(json.dumps(manifest))
    host, place = Host(tmp_path, blocked), str(path)
    skip = ("--allow-skip", "engines", "--allow-skip", "runtimes")
    lines = [
        ["verify", place, "--json"],
        ["predict", place, f"{place}/golden/0.png", "--json"],
        ["inspect", f"{place}/model.onnx"],
        ["info", place],
        ["drift", place, "--against", "golden", "--level", "stage"],
        ["report", place],
        ["check", place, "--baseline", str(tmp_path / "base.json"), "--update", *skip],
        ["export", "van_digits", "--output", str(tmp_path / "out")],
    ]
    done = {words.split()[0]: found for words, found in host.run(lines).items()}
    verdicts = json.loads(done["verify"][1])["artefacts"]
    assert [verdicts[name]["outcome"] for name in ("fp32", "fp16", "int8")] == ["pass"] * 3
    assert verdicts["fp16-sm89"]["reason"] == "engine not executed: no GPU"
    codes = {name: found[0] for name, found in done.items() if found[0]}
    assert codes == {"verify": 1, "export": 3}, "an engine that nobody allowed to skip"
    assert done["export"][2].startswith("error: This needs ")
    answer = str(int(judged.samples.logits[0].argmax()))
    assert str(json.loads(done["predict"][1])["predictions"][0]["top"][0]["index"]) == answer
    with host.serving(path) as url:
        image = (path / "golden/0.png").read_bytes()
        request = Request(f"{url}/predict", image, {"Content-Type": "image/png"})
        with urlopen(request, timeout=60) as response:
            assert answer in json.dumps(json.load(response))
