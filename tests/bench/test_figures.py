"""Percentiles, spread, paired ratios and rooflines, against NumPy and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.each import each
from van_deploy.bench.ceilings import DEVICES, Ceilings, paper_ceilings
from van_deploy.bench.roofline import Work, limit_of, work_of
from van_deploy.bench.timing import latency_of, percentile, ratio_of
from van_deploy.bench.worker import timed_calls
from van_deploy.model.variants import VARIANTS

CEILINGS = Ceilings({"fp32": 1e12, "int8": 4e12}, 1e11, "measured", {})


@each("count", [1, 2, 5, 99, 100, 101, 1000])
@each("share", [0.5, 0.9, 0.99, 1.0])
def test_percentile_is_numpys_inverted_cdf(count: int, share: float) -> None:
    values = np.random.default_rng(count).lognormal(size=count)
    expected = float(np.quantile(values, share, method="inverted_cdf"))
    assert percentile(list(values), share) == expected


def test_latency_of_known_calls() -> None:
    latency = latency_of([1.0, 2.0, 3.0, 4.0, 10.0])
    assert (latency.calls, latency.p50_ms, latency.p90_ms, latency.p99_ms) == (5, 3.0, 10.0, 10.0)
    assert latency.mean_ms == pytest.approx(4.0)
    assert latency.cv_percent == pytest.approx(100 * np.std([1, 2, 3, 4, 10]) / 4)


@each("count", [6, 9, 20, 41, 100])
def test_the_interval_holds_the_true_median_in_95_of_100_races(count: int) -> None:
    rng = np.random.default_rng(count)
    races = [ratio_of([*rng.lognormal(sigma=0.3, size=count)]) for _ in range(2000)]
    held = [ratio.low <= 1.0 <= ratio.high for ratio in races if ratio]
    assert 0.94 <= np.mean(held) <= 0.99
    assert len(held) == 2000


def test_the_interval_narrows_with_the_rounds_and_leaves_single_outliers_out() -> None:
    ratio = ratio_of([*(2.0 + 0.001 * i for i in range(29)), 9.0])
    assert ratio is not None
    assert (ratio.least, ratio.most, ratio.rounds) == (2.0, 9.0, 30)
    assert ratio.high < 2.03
    assert ratio.uncertainty_percent < 1.0
    assert ratio_of([]) is None


def test_calls_are_timed_until_time_and_count_are_both_reached() -> None:
    made: list[int] = []
    assert len(timed_calls(lambda: made.append(1), seconds=0.0, calls=7)) == len(made) == 7
    assert len(timed_calls(lambda: None, seconds=0.01, calls=1)) > 1


@each("name", ["van_b0", "van_b2", "van_b5"])
def test_the_work_of_a_van_is_the_variants_own_count(name: str) -> None:
    config = VARIANTS[name].config
    work, int8 = (work_of(config, 224, batch=3, int8=int8) for int8 in (False, True))
    assert work.operations == 2 * 3 * config.mac_count(224)
    assert work.operations == work.matrix_ops + work.vector_ops
    assert int8.quantized_ops + int8.matrix_ops == work.matrix_ops
    assert int8.vector_ops == work.vector_ops
    assert work_of(config, 448, 3).vector_ops == 4 * work.vector_ops


def test_what_the_1x1_and_depthwise_convolutions_are_of_van_b0() -> None:
    work = work_of(VARIANTS["van_b0"].config, 224, 1, int8=True)
    assert work.quantized_ops / work.operations == pytest.approx(0.82, abs=0.01)
    assert work.vector_ops / work.operations == pytest.approx(0.10, abs=0.01)


@each(
    ("counts", "precision", "ms", "bound"),
    [
        ({"matrix_ops": 10**9}, "fp32", 1.0, "compute"),
        ({"weights": 10**8}, "fp32", 4.0, "memory"),
        ({"quantized_ops": 8 * 10**9, "weights": 10**6}, "int8", 2.0, "compute"),
        ({"matrix_ops": 1}, "bf16", None, ""),
    ],
)
def test_the_limit_is_the_slower_of_arithmetic_and_memory(
    counts: dict[str, int], precision: str, ms: float | None, bound: str
) -> None:
    names = ("operations", "matrix_ops", "quantized_ops", "vector_ops", "weights", "ends")
    values = dict.fromkeys((*names, "traffic"), 0) | counts
    limit = limit_of(Work(batch=1, **values), CEILINGS, precision)
    assert (limit and limit.bound) == (bound or None)
    assert (limit and limit.ms) == (ms and pytest.approx(ms))


@each("name", DEVICES)
def test_paper_figures_name_their_source_and_are_in_a_sane_order(name: str) -> None:
    found = paper_ceilings(f"{name[:2]}-{name[2:].upper()}")
    assert "NVIDIA" in found.source
    assert found.ops_per_s["fp32"] < found.ops_per_s["fp16"] < found.ops_per_s["int8"]
    assert 1e11 < found.bytes_per_s < 1e13
