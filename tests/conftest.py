"""Fixtures of all tests: shared artifacts, the command line, and skips without a GPU."""

import json
import os

# One thread a test process: the networks are small, and pytest-xdist runs several processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.artifacts import (
    ArtifactCache,
    Copy,
    Subject,
    export_network,
    export_precisions,
    load_subject,
)
from tests.json_documents import validate_json_output
from tests.plans import PlanMaker, add_plan
from van_deploy.bundle import Bundle
from van_deploy.cli.app import app
from van_deploy.environment.hardware import nvidia_driver
from van_deploy.model.embedded import write_digits_folder

ROOT = Path(__file__).parent.parent


class Cli:
    """Runs ``van-deploy`` in this process; a bug in the program is raised.

    Output with ``--json`` is validated with the command's JSON Schema.
    """

    def __call__(self, command: object, *arguments: object, stdin: bytes | None = None) -> Result:
        """Run a command; the result has ``exit_code``, ``stdout`` and ``stderr``.

        ``command`` is one or more words; each of ``arguments`` is one more word.
        """
        words = [*str(command).split(), *map(str, arguments)]
        result = CliRunner().invoke(app, words, input=stdin, catch_exceptions=False)
        if "--json" in words and result.stdout:
            validate_json_output(json.loads(result.stdout), words[0])
        return result

    def passes(self, command: object, *arguments: object, code: int = 0) -> str:
        """Run a command that must end with ``code``, and return its standard output."""
        result = self(command, *arguments)
        assert result.exit_code == code, (command, arguments, result.output)
        return result.stdout

    def document(self, command: object, *arguments: object, code: int = 0) -> Any:
        """Run a command with ``--json`` that must end with ``code``, and return the document."""
        return json.loads(self.passes(command, *arguments, "--json", code=code))

    def fails(self, code: int, command: object, *arguments: object) -> str:
        """Run a command that must end with ``code``, and return all its output in one line.

        A command that measured nothing (codes other than 1) must leave its standard output empty.
        """
        result = self(command, *arguments)
        assert result.exit_code == code, (command, arguments, result.output)
        assert code == 1 or not result.stdout, result.stdout
        return " ".join(result.output.split())


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real weights and images next to the checkout."""
    folder = ROOT.parent / "shared"
    if not (folder / "checkpoints").is_dir():
        pytest.skip("there is no folder of real weights and images (shared/) next to the checkout")
    return folder


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Return a runner of ``van-deploy`` whose output is 100 columns wide, without colours."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    return Cli()


@pytest.fixture(scope="session")
def artifact_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ArtifactCache]:
    """Return the cache of files and folders that all processes of this run share.

    The fixtures below return cached artifacts. A test that writes needs a copy (``copy_bundle``);
    otherwise the run fails at its end.
    """
    cache = ArtifactCache.in_folder(tmp_path_factory.getbasetemp())
    yield cache
    assert cache.changed() == [], "a test changed a shared artifact; use copy_bundle"


@pytest.fixture
def copy_bundle(tmp_path: Path) -> Copy:
    """Return a function that copies a bundle into ``tmp_path``, so that a test may write."""

    def copy(source: Bundle | Subject | Path, name: str = "bundle") -> Path:
        bundle = source.bundle if isinstance(source, Subject) else source
        path = bundle.path if isinstance(bundle, Bundle) else bundle
        return Path(shutil.copytree(path, tmp_path / name))

    return copy


@pytest.fixture(scope="session")
def dynamic_size(artifact_cache: ArtifactCache) -> Bundle:
    """Return a bundle whose graphs take any height and width; do not change it."""
    sizes = {"image_size": "64x96", "dynamic_size": "64:64x96:96x128"}
    options = {"embed_preprocess": "uint8", "outputs": ["logits"], **sizes}
    return Bundle.open(artifact_cache("dynamic_size", export_network, **options))


@pytest.fixture
def with_plans(uint8_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> PlanMaker:
    """Return a function that adds stand-ins for plans to a new copy of ``uint8_bundle``.

    Its arguments are the targets, by default ``sm_89``, and keywords of ``add_plan``.
    """

    def add_plans(*targets: str, **changes: Any) -> Bundle:
        folder = tmp_path_factory.mktemp("with_plans") / "bundle"
        bundle = Bundle.open(shutil.copytree(uint8_bundle.path, folder))
        for target in targets or ["sm_89"]:
            bundle = add_plan(bundle, target, **changes)
        return bundle

    return add_plans


@pytest.fixture(scope="session")
def wheel(artifact_cache: ArtifactCache) -> zipfile.ZipFile:
    """Return the wheel, built from a copy of the tree, without a stale build/."""

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
    """Return van_digits after the export, batches 1 to 8; read-only."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    return Bundle.open(artifact_cache("van_digits", export_network))


@pytest.fixture(scope="session")
def uint8_bundle(artifact_cache: ArtifactCache, digits_bundle: Bundle) -> Bundle:
    """Return ``digits_bundle`` with a uint8 graph that has every output; read-only."""
    outputs = ["logits", "probabilities", "top5"]
    options = {"embed_preprocess": "uint8", "outputs": outputs}
    return Bundle.open(artifact_cache("uint8", export_network, **options))


@pytest.fixture(scope="session")
def heldout_200(artifact_cache: ArtifactCache) -> Path:
    """Return a folder of 200 labelled held-out digits, a folder a class; read-only."""
    return artifact_cache("heldout_200", write_digits_folder, "heldout", 200)


@pytest.fixture(scope="session")
def precisions_bundle(
    artifact_cache: ArtifactCache, digits_bundle: Bundle, heldout_200: Path
) -> Path:
    """Return ``digits_bundle`` with FP16 and INT8 graphs; read-only."""
    return artifact_cache("precisions", export_precisions, digits_bundle.path, heldout_200)


@pytest.fixture(scope="session")
def digits(artifact_cache: ArtifactCache, precisions_bundle: Path) -> Subject:
    """Return the digits in FP32, FP16 and INT8 with 60 labelled images; read-only."""
    labelled = artifact_cache("heldout_60", write_digits_folder, "heldout", 60)
    return load_subject(precisions_bundle, labelled)


@pytest.fixture(scope="session")
def shared_checkpoint(shared: Path) -> Path:
    """Return a trained van_b0 in the official format (CIFAR-10 at 64 x 64)."""
    return shared / "checkpoints" / "van_b0_cifar10.pth.tar"


@pytest.fixture(scope="session")
def cifar_bundle(artifact_cache: ArtifactCache, shared_checkpoint: Path, shared: Path) -> Bundle:
    """Return the bundle of the shared van_b0 as export leaves it; read-only."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    images = shared / "data" / "cifar10" / "calib"
    return Bundle.open(artifact_cache("cifar", export_network, shared_checkpoint, images))


@pytest.fixture(scope="session")
def cifar(artifact_cache: ArtifactCache, cifar_bundle: Bundle, shared: Path) -> Subject:
    """Return the shared van_b0 in FP32, FP16 and INT8, with its images; read-only."""
    labelled = shared / "data" / "cifar10" / "eval"
    path = artifact_cache("cifar_precisions", export_precisions, cifar_bundle.path, labelled)
    return load_subject(path, labelled)


@pytest.fixture(scope="session")
def digits_onnx(artifact_cache: ArtifactCache) -> Path:
    """Return the embedded network as an ONNX file, 32 pixels, dynamic batch; read-only."""
    return artifact_cache("van_digits32", export_network, image_size=32) / "model.onnx"


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Skip tests that need a GPU if there is none."""
    driver = nvidia_driver()
    has_gpu = driver is not None and driver.gpus
    for item in items:
        if not has_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
