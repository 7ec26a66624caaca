"""A bundle with everything in it that a report can show, measured for real once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.artifacts import MadeOnce
from van_deploy.bench.benchmark import benchmark_bundle
from van_deploy.bench.store import save_report
from van_deploy.bundle import Bundle
from van_deploy.bundle.original import original_network
from van_deploy.checks.drift import drift_of_bundle
from van_deploy.checks.record import record_check
from van_deploy.config import BenchSettings, Budget
from van_deploy.data import check_images


@pytest.fixture(scope="session")
def bare(digits_bundle: Bundle) -> Bundle:
    """Return a bundle of van_digits as export leaves it."""
    return digits_bundle


@pytest.fixture(scope="session")
def full(made_once: MadeOnce, bare: Bundle) -> Bundle:
    """Return the same with drift, accuracy and a benchmark."""

    def make(folder: Path) -> None:
        shutil.copytree(bare.path, folder)
        bundle = Bundle.open(folder)
        loaded = original_network(bundle)
        checked = check_images(bundle.name, loaded.preprocessing, 2)
        images, described = checked.inputs, checked.description
        drift = drift_of_bundle(bundle, loaded, images, level="stage", described=described)
        record_check(bundle, "drift", drift.as_dict())
        record_check(bundle, "evaluate", accuracy_of_digits(bundle))
        budget = Budget(seconds=0.05, calls=2, limit_s=0.2, rounds=2, warmup_s=0.0)
        settings = BenchSettings(
            batches=(1, 2), threads=1, runners=("ort-*", "openvino"), budget=budget
        )
        save_report(benchmark_bundle(Bundle.open(folder), settings), bundle, None)

    return Bundle.open(made_once("full_report", make))


def accuracy_of_digits(bundle: Bundle) -> dict[str, object]:
    """Return what `evaluate` keeps, of the held-out digits through the FP32 graph."""
    from dataclasses import asdict

    import numpy as np
    from PIL import Image
    from van_deploy.checks.contestants import Answers

    from van_deploy.checks.accuracy import accuracy_of, paired_drift
    from van_deploy.model.embedded import digits_images
    from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

    pictures, labels = digits_images("heldout")
    transform = bundle.manifest.preprocessing.transform()
    chosen = [Image.fromarray(np.ascontiguousarray(p)).convert("RGB") for p in pictures[:60]]
    inputs = np.stack([np.asarray(transform(p), np.float32) for p in chosen])
    with OnnxRuntimeRunner(bundle.verified("fp32")) as runner:
        logits = runner.run(inputs)
    answers = Answers.of(logits)
    accuracy = accuracy_of(answers, labels[:60].astype(np.int64))
    drift = paired_drift(answers, answers, labels[:60].astype(np.int64), 0.1)
    return {
        "images": "60 held-out digits",
        "accuracy": {
            "pytorch": {"runner": "pytorch", **asdict(accuracy)},
            "fp32": {"runner": "ort-cpu", **asdict(accuracy)},
        },
        "drift": {"fp32": drift.as_dict()},
        "skipped": [],
    }
