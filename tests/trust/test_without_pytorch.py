"""A host without PyTorch, timm and the weights: only what requirements-runtime.txt names."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.artifacts import Copy, Subject, enter_engine
from tests.each import each
from van_deploy.bundle import MANIFEST

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements-runtime.txt"
WITHIN_S = 120

# Every finder is asked as usual, and what may not be there is not found by any.
HOST = """
import json, sys

class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            return None
        return self.finder.find_spec(name, path, target)

BLOCKED = set(json.loads(sys.argv.pop(1)))
before = set(sys.modules)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
sys.path_importer_cache.clear()
from van_deploy.cli.app import main
sys.argv[0] = "van-deploy"
try:
    main()
finally:
    found = sorted(BLOCKED & {name.partition(".")[0] for name in set(sys.modules) - before})
    print(f"imported: {found}", file=sys.stderr)
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
def blocked() -> str:
    """Return the top-level modules that such a host lacks, as JSON."""
    there = named() | {"van-deploy"}
    lacking = {
        module
        for module, owners in metadata.packages_distributions().items()
        if not there & set(map(canonicalize_name, owners))
    }
    assert {"torch", "timm", "torchvision"} <= lacking
    return json.dumps(sorted(lacking | {"torch", "timm", "torchvision"}))


@pytest.fixture
def bundle(judged: Subject, copy_of: Copy) -> Path:
    """Return the digits in three precisions with an engine of another GPU, without the weights."""
    path = copy_of(judged)
    enter_engine(path, "fp16-sm89")
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["weights"]["path"] = "/nowhere/weights.safetensors"
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


def command(blocked: str, *words: str | Path) -> list[str]:
    return [sys.executable, "-c", HOST, blocked, *map(str, words)]


def run(blocked: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(blocked, *words),
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100"},
    )


def test_verify_judges_every_artifact_and_says_why_the_engine_does_not_load(
    blocked: str, bundle: Path
) -> None:
    result = run(blocked, "verify", bundle, "--json")
    found = json.loads(result.stdout)["artefacts"]
    assert {name: found[name]["outcome"] for name in ("fp32", "fp16", "int8")} == {
        **dict.fromkeys(("fp32", "fp16", "int8"), "pass")
    }
    assert found["fp16-sm89"]["outcome"] == "skipped"
    assert found["fp16-sm89"]["reason"] == "engine not executed: no GPU"
    assert result.returncode == 1, "an engine that nobody allowed to skip"
    assert result.stderr.endswith("imported: []\n")
    allowed = run(blocked, "verify", bundle, "--allow-skip", "engines")
    assert allowed.returncode == 0, allowed.stderr


def test_predict_gives_the_answers_that_it_gives_with_pytorch(
    blocked: str, bundle: Path, judged: Subject
) -> None:
    image = bundle / "golden" / "0.png"
    result = run(blocked, "predict", bundle, image, "--json")
    assert (result.returncode, result.stderr.splitlines()[-1]) == (0, "imported: []")
    top = json.loads(result.stdout)["predictions"][0]["top"]
    best = int(judged.samples.logits[0].argmax())
    assert top[0]["index"] == best


@each(
    "words",
    [
        ("inspect",),
        ("info",),
        ("drift", "--against", "golden", "--level", "stage"),
        ("report",),
        ("check", "--update", "--allow-skip", "engines", "--allow-skip", "runtimes"),
    ],
)
def test_every_command_that_needs_no_network_runs(
    blocked: str, bundle: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    more = ("--baseline", tmp_path / "baseline.json") if words[0] == "check" else ()
    place = bundle / "model.onnx" if words[0] == "inspect" else bundle
    result = run(blocked, words[0], place, *words[1:], *more)
    assert (result.returncode, result.stderr.splitlines()[-1]) == (0, "imported: []"), result.stderr


def test_a_command_that_needs_pytorch_says_so(blocked: str, tmp_path: Path) -> None:
    result = run(blocked, "export", "van_digits", "--output", tmp_path / "out")
    assert result.returncode == 3
    assert result.stderr.splitlines()[0].startswith("error: This needs ")
    assert "Traceback" not in result.stderr


@pytest.fixture
def served(blocked: str, bundle: Path) -> Iterator[str]:
    words = ("serve", bundle, "--port", "0", "--json")
    with subprocess.Popen(command(blocked, *words), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            text, limit = "", time.monotonic() + WITHIN_S
            while not text.rstrip().endswith("}") and time.monotonic() < limit:
                text += process.stdout.readline()
            yield str(json.loads(text)["url"])
        finally:
            process.terminate()


def test_serve_answers_a_request(served: str, bundle: Path, judged: Subject) -> None:
    request = urllib.request.Request(
        f"{served}/predict",
        data=(bundle / "golden" / "0.png").read_bytes(),
        headers={"Content-Type": "image/png"},
    )
    with urllib.request.urlopen(request, timeout=WITHIN_S) as response:
        answer = json.load(response)
    best = int(judged.samples.logits[0].argmax())
    assert str(best) in json.dumps(answer)
