"""Fixtures for every test: the shared data, the command line, and whether there is a GPU."""

from __future__ import annotations

import json
import os

# One thread a test process: the networks are small, and pytest-xdist runs several processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.artifacts import (
    SMALL_SIZE,
    ArtifactCache,
    Copy,
    Subject,
    digits_graph,
    export_network,
    export_precisions,
    export_uint8_graph,
    load_subject,
)
from tests.json_documents import validate_json_output
from van_deploy.bundle import Bundle
from van_deploy.cli.app import app
from van_deploy.environment.hardware import nvidia_driver

ROOT = Path(__file__).parent.parent

Cli = Callable[..., Result]


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real weights and images that lies beside the checkout."""
    folder = ROOT.parent / "shared"
    if not (folder / "checkpoints").is_dir():
        pytest.skip("there is no folder of real weights and images (shared/) beside the checkout")
    return folder


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Return a function that runs ``van-deploy`` in this process, 100 columns wide.

    Its result has ``exit_code``, ``stdout`` and ``stderr``; a fault of the program
    is raised. What it prints with ``--json`` is held against the command's JSON Schema.
    """
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: str | Path, stdin: bytes | None = None) -> Result:
        words = [str(argument) for argument in arguments]
        result = CliRunner().invoke(app, words, input=stdin, catch_exceptions=False)
        if "--json" in words and result.stdout:
            validate_json_output(json.loads(result.stdout), words[0])
        return result

    return run


@pytest.fixture(scope="session")
def artifact_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ArtifactCache]:
    """Return what makes a file or folder once for all processes of this run.

    The fixtures below lend what it made. A test that writes takes a copy (``copy_bundle``);
    the run fails at its end if one did not.
    """
    made = ArtifactCache.beside(tmp_path_factory.getbasetemp())
    yield made
    assert made.changed() == [], "a test changed what all tests share; let it take a copy"


@pytest.fixture
def copy_bundle(tmp_path: Path) -> Copy:
    """Return a function that copies a bundle into ``tmp_path``, so that a test may write."""

    def copied(whole: Bundle | Subject | Path, name: str = "bundle") -> Path:
        bundle = whole.bundle if isinstance(whole, Subject) else whole
        path = bundle.path if isinstance(bundle, Bundle) else bundle
        return Path(shutil.copytree(path, tmp_path / name))

    return copied


@pytest.fixture(scope="session")
def wheel(artifact_cache: ArtifactCache) -> zipfile.ZipFile:
    """Return the wheel, built from a copy of the tree, so that no stale build/ joins in."""

    def build(out: Path) -> None:
        source = out / "source"
        for name in ("van_deploy", "export", "calibration"):
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        words = ("pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir")
        command = [sys.executable, "-m", *words, str(out), str(source)]
        subprocess.run(command, check=True, capture_output=True)

    return zipfile.ZipFile(next(artifact_cache("wheel", build).glob("*.whl")))


@pytest.fixture(scope="session")
def digits_bundle(artifact_cache: ArtifactCache) -> Bundle:
    """Return van_digits as export leaves it, batches 1 to 8; not to be changed."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    return Bundle.open(artifact_cache("van_digits", export_network))


@pytest.fixture(scope="session")
def uint8_bundle(artifact_cache: ArtifactCache, digits_bundle: Bundle) -> Bundle:
    """Return ``digits_bundle`` with a byte graph that gives every output; not to be changed."""
    made = artifact_cache(
        "export_uint8_graph", lambda path: export_uint8_graph(path, digits_bundle.path)
    )
    return Bundle.open(made)


@pytest.fixture(scope="session")
def heldout_200(artifact_cache: ArtifactCache) -> Path:
    """Return a folder of 200 labelled held-out digits, a folder a class; not to be changed."""
    return _heldout(artifact_cache, 200)


@pytest.fixture(scope="session")
def precisions_bundle(
    artifact_cache: ArtifactCache, digits_bundle: Bundle, heldout_200: Path
) -> Path:
    """Return ``digits_bundle`` with FP16 and INT8 graphs; not to be changed."""
    return artifact_cache(
        "export_precisions", lambda path: export_precisions(path, digits_bundle.path, heldout_200)
    )


@pytest.fixture(scope="session")
def digits(artifact_cache: ArtifactCache, precisions_bundle: Path) -> Subject:
    """Return the digits in FP32, FP16 and INT8 with 60 labelled images; not to be changed."""
    return load_subject(precisions_bundle, _heldout(artifact_cache, 60))


@pytest.fixture(scope="session")
def shared_checkpoint(shared: Path) -> Path:
    """Return a really trained van_b0 in the official format (CIFAR-10 at 64 x 64)."""
    return shared / "checkpoints" / "van_b0_cifar10.pth.tar"


@pytest.fixture(scope="session")
def cifar_bundle(artifact_cache: ArtifactCache, shared_checkpoint: Path, shared: Path) -> Bundle:
    """Return the bundle of the shared van_b0 as export leaves it; not to be changed."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    images = shared / "data" / "cifar10" / "calib"
    return Bundle.open(
        artifact_cache("cifar", lambda path: export_network(path, str(shared_checkpoint), images))
    )


@pytest.fixture(scope="session")
def cifar(artifact_cache: ArtifactCache, cifar_bundle: Bundle, shared: Path) -> Subject:
    """Return the shared van_b0 in FP32, FP16 and INT8, with its images; not to be changed."""
    labelled = shared / "data" / "cifar10" / "eval"
    made = artifact_cache(
        "cifar_with_precisions", lambda path: export_precisions(path, cifar_bundle.path, labelled)
    )
    return load_subject(made, labelled)


@pytest.fixture(scope="session")
def digits_onnx(artifact_cache: ArtifactCache) -> Path:
    """Return the embedded network as an ONNX file, 32 pixels, dynamic batch; not to be changed."""
    return artifact_cache("digits32.onnx", lambda path: digits_graph(path, SMALL_SIZE))


def _heldout(artifact_cache: ArtifactCache, count: int) -> Path:
    from van_deploy.model.embedded import write_digits_folder

    return artifact_cache(
        f"heldout{count}", lambda path: write_digits_folder(path, "heldout", count)
    )


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Skip what needs a GPU, with the reason, where there is none."""
    driver = nvidia_driver()
    if driver is not None and driver.gpus:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and none answers here"))
