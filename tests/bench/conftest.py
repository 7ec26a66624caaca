"""A bundle of the embedded network, settings that take a second, and a scripted contender."""

from __future__ import annotations

from pathlib import Path

import pytest

from van_deploy.bench.contender import Contender
from van_deploy.bench.lane import Lane, Loading
from van_deploy.bench.process import WorkerError
from van_deploy.bench.race import Race
from van_deploy.bundle import Bundle
from van_deploy.config import BenchSettings, Budget


class Scripted(Lane):
    """A contender whose slices take what a clock that drifts says, in place of a process."""

    clock = 0
    drift = 1.1  # 10 % slower from each slice to the next

    def __init__(self, name: str, ms: float, fails_at: int = -1) -> None:
        super().__init__(Contender(name, "onnxruntime", "fp32"), loaded=Loading(0.0, 0.0, 0, 0, 1))
        self.ms, self.fails_at, self.slices = ms, fails_at, 0

    def feed(self, images: Path, batch: int, preprocessing: object, warmup_s: float) -> None:
        self.failure, self.call_s = None, self.ms / 1e3

    def time_slice(self, seconds: float) -> float | None:
        self.slices += 1
        Scripted.clock += 1
        if self.slices == self.fails_at:
            self.failure = WorkerError("killed", "killed by SIGKILL")
            return None
        took = self.ms * self.drift**Scripted.clock
        self.latencies.append(took)
        self.timed_s += seconds
        self.calls += 1
        return took


class ScriptedRace(Race):
    """A race of scripted contenders, on a machine that is quiet unless ``product`` says more."""

    def __init__(self, *lanes: Lane) -> None:
        super().__init__([], threads=1)
        self.lanes = list(lanes)

    def product(self) -> float:
        """Return what the product of two matrices takes now, in ms."""
        return 1.0

    def look(self) -> float:
        self.looks.append(self.product())
        return self.looks[-1]


@pytest.fixture(scope="session")
def digits(digits_bundle: Bundle) -> Bundle:
    """Return the bundle of van_digits; tests that write take a copy."""
    return digits_bundle


@pytest.fixture
def quick() -> BenchSettings:
    """Return settings for a race of a second with ONNX Runtime alone."""
    return BenchSettings(
        batches=(1, 2),
        device="cpu",
        threads=1,
        runners=("ort-cpu",),
        budget=Budget(seconds=0.1, calls=4, limit_s=0.5, rounds=2, warmup_s=0.02),
        roofline=False,
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a file of eight inputs for van_digits, noise of natural size."""
    import numpy as np

    path = tmp_path / "images.npy"
    values = np.random.default_rng(0).standard_normal((8, 3, 64, 64)).astype(np.float32)
    np.save(path, values)
    return path
