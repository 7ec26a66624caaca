"""Operations and bytes counted from the shapes, and what they come to on a device."""

from __future__ import annotations

import pytest

from tests.each import each
from van_deploy.bench.ceilings import DEVICES, Ceilings, paper_ceilings
from van_deploy.bench.roofline import Work, limit_of, work_of
from van_deploy.errors import UsageError
from van_deploy.model.variants import VARIANTS

CEILINGS = Ceilings({"fp32": 1e12, "int8": 4e12}, 1e11, "measured", {})


@each("name", ["van_b0", "van_b2", "van_b5"])
def test_the_count_of_a_whole_van_is_the_variants_own(name: str) -> None:
    config = VARIANTS[name].config
    work = work_of(config, 224, batch=3)
    assert work.operations == 2 * 3 * config.mac_count(224)
    assert work.operations == work.matrix_ops + work.vector_ops
    int8 = work_of(config, 224, batch=3, int8=True)
    assert int8.quantized_ops + int8.matrix_ops == work.matrix_ops
    assert int8.vector_ops == work.vector_ops


def test_what_the_1x1_and_depthwise_convolutions_are_of_van_b0() -> None:
    work = work_of(VARIANTS["van_b0"].config, 224, 1, int8=True)
    assert work.quantized_ops / work.operations == pytest.approx(0.82, abs=0.01)
    assert work.vector_ops / work.operations == pytest.approx(0.10, abs=0.01)


def test_work_grows_with_the_square_of_the_image() -> None:
    config = VARIANTS["van_b1"].config
    assert work_of(config, 448, 1).vector_ops == 4 * work_of(config, 224, 1).vector_ops


def made_up(**changes: int) -> Work:
    names = ("matrix_ops", "quantized_ops", "vector_ops", "weights", "ends", "traffic")
    values = dict.fromkeys(names, 0) | changes
    return Work(batch=1, operations=sum(values[name] for name in names[:3]), **values)


def test_the_limit_is_the_slower_of_arithmetic_and_memory() -> None:
    limit = limit_of(made_up(matrix_ops=10**9), CEILINGS, "fp32")
    assert limit is not None
    assert limit.ms == pytest.approx(1.0)
    assert limit.bound == "compute"
    limit = limit_of(made_up(weights=10**8), CEILINGS, "fp32")
    assert limit is not None
    assert limit.ms == pytest.approx(4.0)
    assert limit.bound == "memory"


def test_quantized_work_has_its_own_rate() -> None:
    work = made_up(quantized_ops=4 * 10**9, weights=25 * 10**6)
    limit = limit_of(work, CEILINGS, "int8")
    assert limit is not None
    assert limit.compute_ms == pytest.approx(1.0)
    assert limit.memory_ms == pytest.approx(1.0)


def test_without_a_rate_there_is_no_limit() -> None:
    assert limit_of(made_up(matrix_ops=1), CEILINGS, "bf16") is None


def test_paper_figures_name_their_source_and_an_unknown_device_is_refused() -> None:
    assert all("NVIDIA" in device.source for device in DEVICES.values())
    assert paper_ceilings("RTX 4090") is DEVICES["rtx4090"]
    with pytest.raises(UsageError, match="There are no figures for the device 'tpu'"):
        paper_ceilings("tpu")


@each("name", DEVICES)
def test_paper_figures_are_in_a_sane_order(name: str) -> None:
    ops = DEVICES[name].ops_per_s
    assert ops["fp32"] < ops["fp16"] < ops["int8"]
    assert 1e11 < DEVICES[name].bytes_per_s < 1e13
