"""Which settings are tried, and which of them is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.each import each
from van_deploy import tuning
from van_deploy.bundle import Bundle
from van_deploy.config import BatchRange, BuildSettings
from van_deploy.engine.host import Host
from van_deploy.errors import ConversionError, MissingDependency
from van_deploy.results import Tuned
from van_deploy.tuning import Candidate, candidates_of, require_timing, tuned


def described(bundle: Path, **asked: Any) -> list[str]:
    settings = BuildSettings(tune=True, **asked)
    return [one.described for one in candidates_of(Bundle.open(bundle), settings)]


def test_tensorrt_is_tried_in_every_precision_level_and_tiling(precisions_bundle: Path) -> None:
    found = described(precisions_bundle)
    assert len(found) == len(set(found)) == 3 * 2 * 2
    assert found[0] == "fp32, level 3, tiling none"
    assert found[-1] == "int8, level 5, tiling full"


def test_int8_scopes_are_tried_where_there_are_images(
    precisions_bundle: Path, heldout_200: Path
) -> None:
    found = described(
        precisions_bundle, precisions=("int8",), images=heldout_200, optimization_level=4
    )
    assert found == [
        f"int8 {scope}, level 4, tiling {tiling}"
        for scope in ("pointwise", "deep", "all")
        for tiling in ("none", "full")
    ]


@each(
    ("device", "batch", "expected"),
    [
        ("cpu", (1, 4, 8), ["fp32", "fp16", "bf16"]),
        (
            "cuda:0",
            (1, 4, 8),
            [f"{p}{t}" for p in ("fp32", "fp16", "bf16") for t in ("", ", max-autotune")],
        ),
        (
            "cuda:0",
            (8, 8, 8),
            [
                *("fp32", "fp32, max-autotune"),
                *("fp16", "fp16, max-autotune", "fp16, fused kernels"),
                *("bf16", "bf16, max-autotune", "bf16, fused kernels"),
            ],
        ),
    ],
)
def test_what_is_tried_with_inductor(
    precisions_bundle: Path, device: str, batch: tuple[int, int, int], expected: list[str]
) -> None:
    found = described(
        precisions_bundle, backend="inductor", device=device, profiles=(BatchRange(*batch),)
    )
    assert found == expected


def test_the_fastest_that_holds_its_gate_is_kept(
    precisions_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fastest of all fails its gate; one cannot be built."""
    times = {"fp32": (3.0, True), "fp16": (2.0, True), "int8": (1.0, False)}

    def tried(copy: Path, candidate: Candidate, batch: BatchRange, build: Any) -> Tuned:
        assert copy != precisions_bundle, "candidates are built in a copy"
        precision = candidate.settings.precisions[0]
        if candidate.settings.optimization_level == 5:
            raise ConversionError("TensorRT built no plan")
        milliseconds, passed = times[precision]
        return Tuned(candidate.described, precision, 8, milliseconds, 1.0, 50.0, passed)

    monkeypatch.setattr(tuning, "_tried", tried)
    bundle, settings = Bundle.open(precisions_bundle), BuildSettings(tune=True)
    rows, best = tuned(bundle, settings, lambda *_: "", lambda _: None)
    assert best.described == "fp16, level 3, tiling none"
    assert [row.candidate for row in rows if row.kept] == ["fp16, level 3, tiling none"]
    assert {row.error for row in rows if "level 5" in row.candidate} == {"TensorRT built no plan"}
    times.clear()
    times.update(dict.fromkeys(("fp32", "fp16", "int8"), (1.0, False)))
    with pytest.raises(ConversionError, match="No candidate holds its gate"):
        tuned(bundle, settings, lambda *_: "", lambda _: None)


def test_nothing_is_timed_without_a_gpu() -> None:
    with pytest.raises(MissingDependency) as caught:
        require_timing(BuildSettings(tune=True), Host())
    assert caught.value.message == "--tune cannot time anything here: no NVIDIA GPU answers."
    require_timing(BuildSettings(tune=True, backend="inductor", device="cpu"), Host())
    require_timing(BuildSettings(tune=True), Host("a GPU", "sm_90"))
