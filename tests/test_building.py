"""Candidates of ``--tune``, and the selection of the fastest."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest

import van_deploy
from tests.artifacts import Copy
from tests.each import each
from van_deploy import building
from van_deploy.bench.gpu import Timer
from van_deploy.building import Candidate, CandidateResult, tuning_candidates
from van_deploy.bundle import Bundle
from van_deploy.checks.golden import samples_for
from van_deploy.config import BatchRange, BuildSettings
from van_deploy.config.sizes import SizeRange
from van_deploy.engine.backend import Host
from van_deploy.errors import ConversionError
from van_deploy.runners.base import ResidentBatch
from van_deploy.runners.network import Network
from van_deploy.runners.pytorch import TorchRunner

LEVELS = [f", level {level}, tiling {tiling}" for level in (3, 5) for tiling in ("none", "full")]
FIXED: dict[str, Any] = {"backend": "inductor", "profiles": (BatchRange(8, 8, 8),)}
RANGE: dict[str, Any] = {"backend": "inductor", "profiles": (BatchRange(1, 4, 8),)}
PRECISIONS, MAX, FUSED = ("fp32", "fp16", "bf16"), ", max-autotune", ", fused kernels"


@each(
    ("options", "expected"),
    [
        ({}, [f"{precision}{level}" for precision in ("fp32", "fp16", "int8") for level in LEVELS]),
        (
            {"precisions": ("int8",), "optimization_level": 3, "images": Path("images")},
            [f"int8 {scope}{t}" for scope in ("pointwise", "deep", "all") for t in LEVELS[:2]],
        ),
        (
            {"precisions": ("fp16",), "tiling": "moderate"},
            [f"fp16, level {level}, tiling moderate" for level in (3, 5)],
        ),
        ({**RANGE, "device": "cpu"}, [*PRECISIONS]),
        ({**FIXED, "fused_kernels": True, "precisions": ("bf16",)}, [f"bf16{FUSED}"]),
        ({**RANGE, "max_autotune": True}, [p + MAX for p in PRECISIONS]),
        ({**RANGE, "device": "cuda:0"}, [p + t for p in PRECISIONS for t in ("", MAX)]),
        (
            {**FIXED, "device": "cuda:0"},
            ["fp32", f"fp32{MAX}", *(p + t for p in ("fp16", "bf16") for t in ("", MAX, FUSED))],
        ),
    ],
)
def test_candidates(precisions_bundle: Path, options: dict[str, Any], expected: list[str]) -> None:
    candidates = tuning_candidates(
        Bundle.open(precisions_bundle), BuildSettings(tune=True, **options)
    )
    assert [candidate.description for candidate in candidates] == expected


def test_fastest_passing_candidate_is_built(
    copy_bundle: Copy, precisions_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fastest candidate fails its gate, and another cannot be built."""
    times = {"fp16": (3.0, True), "deep": (2.0, True), "all": (1.0, False)}
    folder, kept = copy_bundle(precisions_bundle), list[Any]()

    def measure_candidate(copy: Path, candidate: Candidate) -> CandidateResult:
        assert copy != folder, "candidates are built in a copy"
        if candidate.scope == "pointwise":
            raise ConversionError("TensorRT built no plan.")
        precision = candidate.settings.precisions[0]
        milliseconds, passed = times[candidate.scope or precision]
        return CandidateResult(candidate.description, precision, 8, milliseconds, 1.0, 50.0, passed)

    def planned(bundle: Path, settings: BuildSettings, *_: object) -> list[Any]:
        kept.append((settings.precisions, settings.tiling, settings.tune))
        return []

    def build_cells(*_: object, force: bool, **more: object) -> list[Any]:
        kept.append(force)
        return []

    monkeypatch.setattr(building, "detect_host", lambda **_: Host("a GPU", "sm_90"))
    monkeypatch.setattr("van_deploy.engine.fleet.engine_cells", planned)
    monkeypatch.setattr("van_deploy.engine.fleet.build_cells", build_cells)
    monkeypatch.setattr(building, "quantize_bundle", lambda _, how, **__: kept.append(how.scope))
    monkeypatch.setattr(building, "measure_candidate", measure_candidate)
    options: Any = {"tune": True, "precisions": ["fp16", "int8"], "optimization_level": 3}
    monkeypatch.chdir(folder)
    rows = van_deploy.open_bundle(".").build(**options, images=folder, force=True).tuned
    assert [row.candidate for row in rows if row.selected] == ["int8 deep, level 3, tiling none"]
    assert {row.error for row in rows if "point" in row.candidate} == {"TensorRT built no plan."}
    assert kept == [("deep",), (("int8",), "none", False), True]
    times.update(dict.fromkeys(times, (1.0, False)))
    with pytest.raises(ConversionError, match=r"pointwise, .*: TensorRT built no plan; int8 deep"):
        van_deploy.open_bundle(folder).build(**options, images=folder)


def test_tuning_with_dynamic_sizes(
    dynamic_size: Bundle, copy_bundle: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every candidate is a real plan for the sizes of the bundle; only the timing needs a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    folder = copy_bundle(dynamic_size)
    sizes, latency_ms = list[Any](), iter((2.0, 1.0))

    def measure_candidate(copy: Path, candidate: Candidate) -> CandidateResult:
        (built,) = building._build_candidate(copy, candidate).outcomes
        bundle, plan = Bundle.open(copy), built.sidecar
        samples = samples_for(bundle, None, None)
        images = building._timed_images(Network(bundle, built.engine), samples, 4)
        assert plan is not None
        sizes.append((images.shape, plan.options.dynamic_size, plan.options.tiling))
        return CandidateResult(
            candidate.description, built.engine, 4, next(latency_ms), passed=True
        )

    monkeypatch.setattr(building, "detect_host", lambda **_: Host("a GPU", "sm_89"))
    monkeypatch.setattr(building, "measure_candidate", measure_candidate)
    target: Any = {"backend": "tensorrt-rtx", "targets": ["sm_89"], "optimization_level": 3}
    report = van_deploy.open_bundle(folder).build(tune=True, **target)
    expected = SizeRange(64, (64, 96), (96, 128))
    assert sizes == [((4, 3, 64, 96), expected, tiling) for tiling in ("none", "full")]
    assert [row.selected for row in report.tuned] == [False, True]
    (outcome,) = report.outcomes
    assert outcome.sidecar is not None
    assert (outcome.sidecar.options.dynamic_size, outcome.sidecar.options.tiling) == (
        expected,
        "full",
    )


def test_candidate_is_timed_on_golden_samples_in_its_input_format(uint8_bundle: Bundle) -> None:
    samples = samples_for(uint8_bundle, None, None)
    for name, kind, shape in (("fp32", "f4", (3, 64, 64)), ("fp32-uint8", "u1", (64, 64, 3))):
        images = building._timed_images(Network(uint8_bundle, name), samples, 9)
        assert (images.dtype, images.shape) == (np.dtype(kind), (9, *shape))


def test_candidate_on_a_gpu_is_timed_with_queued_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "MIN_S", 0.0)
    monkeypatch.setattr(building, "timer_for", lambda *_: Timer())
    runner, resident = Mock(spec=TorchRunner, on_gpu=True), Mock(spec=ResidentBatch)
    runner.resident_batch.return_value = resident
    images = np.zeros((2, 3, 8, 8), np.float32)
    assert building._call_seconds(runner, images, "cpu") > 0
    runner.resident_batch.assert_called_once_with(images)
    assert resident.launch.call_count > 2 * building.MIN_CALLS
    assert resident.method_calls[-1] == call.close()
