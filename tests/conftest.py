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
    Copy,
    MadeOnce,
    Subject,
    digits_graph,
    export_network,
    subject_of,
    with_byte_graph,
    with_precisions,
)
from tests.json_documents import require_valid
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
            require_valid(json.loads(result.stdout), words[0])
        return result

    return run


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MadeOnce]:
    """Return what makes a file or folder once for all processes of this run.

    The fixtures below lend what it made. A test that writes takes a copy (``copy_of``);
    the run fails at its end if one did not.
    """
    made = MadeOnce.beside(tmp_path_factory.getbasetemp())
    yield made
    assert made.changed() == [], "a test changed what all tests share; let it take a copy"


@pytest.fixture
def copy_of(tmp_path: Path) -> Copy:
    """Return a function that copies a bundle into ``tmp_path``, so that a test may write."""

    def copied(whole: Bundle | Subject | Path, name: str = "bundle") -> Path:
        bundle = whole.bundle if isinstance(whole, Subject) else whole
        path = bundle.path if isinstance(bundle, Bundle) else bundle
        return Path(shutil.copytree(path, tmp_path / name))

    return copied


@pytest.fixture(scope="session")
def wheel(made_once: MadeOnce) -> zipfile.ZipFile:
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

    return zipfile.ZipFile(next(made_once("wheel", build).glob("*.whl")))


@pytest.fixture(scope="session")
def digits_bundle(made_once: MadeOnce) -> Bundle:
    """Return van_digits as export leaves it, batches 1 to 8; not to be changed."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    return Bundle.open(made_once("van_digits", export_network))


@pytest.fixture(scope="session")
def byte_bundle(made_once: MadeOnce, digits_bundle: Bundle) -> Bundle:
    """Return ``digits_bundle`` with a byte graph that gives every output; not to be changed."""
    made = made_once("with_byte_graph", lambda path: with_byte_graph(path, digits_bundle.path))
    return Bundle.open(made)


@pytest.fixture(scope="session")
def heldout_200(made_once: MadeOnce) -> Path:
    """Return a folder of 200 labelled held-out digits, a folder a class; not to be changed."""
    return _heldout(made_once, 200)


@pytest.fixture(scope="session")
def precisions_bundle(made_once: MadeOnce, digits_bundle: Bundle, heldout_200: Path) -> Path:
    """Return ``digits_bundle`` with FP16 and INT8 graphs; not to be changed."""
    return made_once(
        "with_precisions", lambda path: with_precisions(path, digits_bundle.path, heldout_200)
    )


@pytest.fixture(scope="session")
def judged(made_once: MadeOnce, precisions_bundle: Path) -> Subject:
    """Return the digits in FP32, FP16 and INT8 with 60 labelled images; not to be changed."""
    return subject_of(precisions_bundle, _heldout(made_once, 60))


@pytest.fixture(scope="session")
def shared_checkpoint(shared: Path) -> Path:
    """Return a really trained van_b0 in the official format (CIFAR-10 at 64 x 64)."""
    return shared / "checkpoints" / "van_b0_cifar10.pth.tar"


@pytest.fixture(scope="session")
def cifar_bundle(made_once: MadeOnce, shared_checkpoint: Path, shared: Path) -> Bundle:
    """Return the bundle of the shared van_b0 as export leaves it; not to be changed."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    images = shared / "data" / "cifar10" / "calib"
    return Bundle.open(
        made_once("cifar", lambda path: export_network(path, str(shared_checkpoint), images))
    )


@pytest.fixture(scope="session")
def cifar(made_once: MadeOnce, cifar_bundle: Bundle, shared: Path) -> Subject:
    """Return the shared van_b0 in FP32, FP16 and INT8, with its images; not to be changed."""
    labelled = shared / "data" / "cifar10" / "eval"
    made = made_once(
        "cifar_with_precisions", lambda path: with_precisions(path, cifar_bundle.path, labelled)
    )
    return subject_of(made, labelled)


@pytest.fixture(scope="session")
def digits_onnx(made_once: MadeOnce) -> Path:
    """Return the embedded network as an ONNX file, 32 pixels, dynamic batch; not to be changed."""
    return made_once("digits32.onnx", lambda path: digits_graph(path, SMALL_SIZE))


def _heldout(made_once: MadeOnce, count: int) -> Path:
    from van_deploy.model.embedded import write_digits_folder

    return made_once(f"heldout{count}", lambda path: write_digits_folder(path, "heldout", count))


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Skip what needs a GPU, with the reason, where there is none."""
    driver = nvidia_driver()
    if driver is not None and driver.gpus:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and none answers here"))
