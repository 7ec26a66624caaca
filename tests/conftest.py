"""Fixtures for every test: the shared data, the command line, and whether there is a GPU."""

from __future__ import annotations

import os

# One thread a test process: the networks are small, and pytest-xdist runs several processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

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
    is raised.
    """
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: str | Path) -> Result:
        words = [str(argument) for argument in arguments]
        return CliRunner().invoke(app, words, catch_exceptions=False)

    return run


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Skip what needs a GPU, with the reason, where there is none."""
    driver = nvidia_driver()
    if driver is not None and driver.gpus:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and none answers here"))
