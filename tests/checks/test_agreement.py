"""Agreement passes what is the same and fails what is not."""

from __future__ import annotations

from types import TracebackType

import numpy as np
import pytest

from van_deploy.checks.agreement import FP32, check_agreement
from van_deploy.runners.base import Images, Logits


class Linear:
    """A network of one matrix, wrong in one chosen way."""

    name = "linear"

    def __init__(self, fault: str = "") -> None:
        self.matrix = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
        self.fault = fault

    def __enter__(self) -> Linear:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def run(self, images: Images) -> Logits:
        logits = images.reshape(len(images), -1) @ self.matrix
        if self.fault == "noise":
            logits += 1e-3 * np.random.default_rng(len(images)).normal(size=logits.shape)
        if self.fault == "batch" and len(images) > 1:
            logits[1] = logits[0]
        if self.fault == "batch 3" and len(images) == 3:
            logits[2] += 0.01
        if self.fault == "nan":
            logits[0, 0] = np.nan
        if self.fault == "frozen":
            logits = logits[:1]
        if self.fault == "classes":
            logits = logits[:, ::-1]
        return logits.astype(np.float32)


@pytest.fixture
def images() -> Images:
    return np.random.default_rng(1).normal(size=(8, 3, 2, 2)).astype(np.float32)


def test_the_same_network_passes_at_every_batch(images: Images) -> None:
    report = check_agreement(Linear().run(images), Linear(), images, (1, 2, 3, 8))
    assert report
    assert [entry.batch for entry in report.batches] == [1, 2, 3, 8]
    assert all(entry.comparison.images == entry.batch for entry in report.batches)
    assert report.failures == []
    assert all(entry.comparison.sqnr_db > FP32.sqnr_db for entry in report.batches)


@pytest.mark.parametrize(
    ("fault", "batches", "says"),
    [
        ("noise", {1, 2, 8}, "SQNR"),
        ("batch", {2, 8}, "an image alone and in the batch differ by"),
        ("batch 3", {3}, "an image alone and in the batch differ by"),
        ("nan", {1, 2, 3, 8}, "SQNR -inf dB is below 90 dB"),
        ("frozen", {2, 3, 8}, "the output has shape (1, 5) where PyTorch's has (8, 5)"),
        ("classes", {1, 2, 8}, "predictions changed"),
    ],
)
def test_every_fault_fails_and_is_told_at_its_batch(
    images: Images, fault: str, batches: set[int], says: str
) -> None:
    report = check_agreement(Linear().run(images), Linear(fault), images, (1, 2, 3, 8))
    assert not report
    assert batches <= {entry.batch for entry in report.batches if not entry.passed}
    assert any(says in failure for failure in report.failures), report.failures


def test_no_batch_at_all_is_no_pass(images: Images) -> None:
    assert not check_agreement(Linear().run(images), Linear(), images, ())
