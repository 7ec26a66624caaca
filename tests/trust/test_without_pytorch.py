"""A host without PyTorch, timm and the weights: only what requirements-runtime.txt names."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.artifacts import Subject, enter_engine
from van_deploy.bundle import MANIFEST

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements-runtime.txt"
WITHIN_S = 120

# Every finder is asked as usual, and what may not be there is not found by any. Then the
# commands run one after the other; a lone one (serve) is the process's own.
HOST = """
import json, sys

class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            return None
        return self.finder.find_spec(name, path, target)

BLOCKED, commands = json.loads(sys.argv[1])
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
    done[words[0]] = [result.exit_code, result.stdout, result.stderr, repr(result.exception)]
found = {name.partition(".")[0] for name in set(sys.modules) - before}
done["imported"] = sorted(found & set(BLOCKED))
print(json.dumps(done))
"""


def named() -> set[str]:
    """Return the distributions that requirements-runtime.txt brings, with what they need."""
    lines = (line.partition("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines())
    wanted = [Requirement(line) for line in lines if line]
    found: set[str] = set()
    while wanted:
        one = wanted.pop()
        name = canonicalize_name(one.name)
        if name in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        try:
            wanted += map(Requirement, metadata.requires(name) or ())
        except metadata.PackageNotFoundError:
            continue  # the tests of what it does say that it is missing
    return found


@pytest.fixture(scope="module")
def blocked() -> list[str]:
    """Return the top-level modules that such a host lacks."""
    there = named() | {"van-deploy"}
    lacking = {
        module
        for module, owners in metadata.packages_distributions().items()
        if not there & set(map(canonicalize_name, owners))
    }
    assert {"torch", "timm", "torchvision"} <= lacking
    return sorted(lacking)


@pytest.fixture(scope="module")
def bundle(judged: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the digits in three precisions with an engine of another GPU, without the weights."""
    folder = tmp_path_factory.mktemp("host")
    path = Path(shutil.copytree(judged.bundle.path, folder / "bundle"))
    enter_engine(path, "fp16-sm89")
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["weights"]["path"] = "/nowhere/weights.safetensors"
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


def host(blocked: list[str], commands: list[list[str]]) -> list[str]:
    return [sys.executable, "-c", HOST, json.dumps([blocked, commands])]


@pytest.fixture(scope="module")
def ran(blocked: list[str], bundle: Path) -> dict[str, Any]:
    """Return the exit code, both outputs and the exception of every command, by its name."""
    place, other = str(bundle), str(bundle.parent)
    skip = ("--allow-skip", "engines", "--allow-skip", "runtimes")
    commands = [
        ["verify", place, "--json"],
        ["predict", place, f"{place}/golden/0.png", "--json"],
        ["inspect", f"{place}/model.onnx"],
        ["info", place],
        ["drift", place, "--against", "golden", "--level", "stage"],
        ["report", place],
        ["check", place, "--baseline", f"{other}/baseline.json", "--update", *skip],
        ["export", "van_digits", "--output", f"{other}/out"],
    ]
    done = subprocess.run(
        host(blocked, commands),
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100"},
    )
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("imported") == []
    return found


def test_verify_judges_every_artifact_and_says_why_the_engine_does_not_load(
    ran: dict[str, Any],
) -> None:
    code, stdout, _, _ = ran["verify"]
    found = json.loads(stdout)["artefacts"]
    assert [found[name]["outcome"] for name in ("fp32", "fp16", "int8")] == ["pass"] * 3
    assert found["fp16-sm89"]["outcome"] == "skipped"
    assert found["fp16-sm89"]["reason"] == "engine not executed: no GPU"
    assert code == 1, "an engine that nobody allowed to skip"


def test_every_command_that_needs_no_network_runs(ran: dict[str, Any], judged: Subject) -> None:
    others = {name: answer for name, answer in ran.items() if name not in {"verify", "export"}}
    assert {name: answer for name, answer in others.items() if answer[0]} == {}
    top = json.loads(ran["predict"][1])["predictions"][0]["top"]
    assert top[0]["index"] == int(judged.samples.logits[0].argmax())


def test_a_command_that_needs_pytorch_says_so(ran: dict[str, Any]) -> None:
    code, _, stderr, _ = ran["export"]
    assert code == 3
    assert stderr.startswith("error: This needs ")


def test_serve_answers_a_request(blocked: list[str], bundle: Path, judged: Subject) -> None:
    command = host(blocked, [["serve", str(bundle), "--port", "0", "--json"]])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            text, limit = "", time.monotonic() + WITHIN_S
            while not text.rstrip().endswith("}") and time.monotonic() < limit:
                text += process.stdout.readline()
            request = urllib.request.Request(
                f"{json.loads(text)['url']}/predict",
                data=(bundle / "golden" / "0.png").read_bytes(),
                headers={"Content-Type": "image/png"},
            )
            with urllib.request.urlopen(request, timeout=WITHIN_S) as response:
                answer = json.load(response)
        finally:
            process.terminate()
    assert str(int(judged.samples.logits[0].argmax())) in json.dumps(answer)
