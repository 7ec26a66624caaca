"""Operations counted from the graph, against arithmetic by hand and the variants' own table."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.each import each
from van_deploy.bench.ceilings import DEVICES, Ceilings, paper_ceilings
from van_deploy.bench.roofline import Work, limit_of, work_of, work_of_file
from van_deploy.bundle import Bundle
from van_deploy.errors import UsageError
from van_deploy.model.embedded import EMBEDDED_NAME
from van_deploy.runners.original import original_network

CEILINGS = Ceilings({"fp32": 1e12, "int8": 4e12}, 1e11, "measured", {})


def small_graph(*, quantized: bool) -> ModelProto:
    """Return conv 3 -> 8 (3x3, padded) and a depth-wise 3x3, both 8 x 8, batch free."""
    weight = np.ones((8, 3, 3, 3), np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Conv", ["y", "d"], ["z"], kernel_shape=[3, 3], pads=[1] * 4, group=8),
    ]
    constants = [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(np.ones((8, 1, 3, 3), np.float32), "d"),
    ]
    if quantized:
        nodes[0] = helper.make_node("Conv", ["xd", "wd"], ["y"], kernel_shape=[3, 3], pads=[1] * 4)
        nodes[:0] = [
            helper.make_node("QuantizeLinear", ["x", "s"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "s"], ["xd"]),
            helper.make_node("DequantizeLinear", ["w", "s"], ["wd"]),
        ]
        constants[0] = numpy_helper.from_array(weight.astype(np.uint8), "w")
        constants.append(numpy_helper.from_array(np.array(0.1, np.float32), "s"))
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", 3, 8, 8))],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ("batch", 8, 8, 8))],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_a_convolution_is_two_operations_a_multiply_add() -> None:
    work = work_of(small_graph(quantized=False), batch=2)
    assert work.matrix_ops == 2 * 2 * 8 * 8 * 8 * 27
    assert work.depthwise_ops == 2 * 2 * 8 * 8 * 8 * 9
    assert (work.quantized_ops, work.other_ops) == (0, 0)
    assert work.weights == 8 * 27 + 8 * 9
    assert (work.input_values, work.output_values) == (2 * 3 * 64, 2 * 8 * 64)


def test_a_product_of_two_dequantized_factors_counts_as_int8() -> None:
    work = work_of(small_graph(quantized=True), batch=1)
    assert work.quantized_ops == 2 * 8 * 64 * 27
    assert work.matrix_ops == 0
    assert work.quantized_weights == 8 * 27


def test_the_count_of_a_whole_van_is_the_variants_own(digits: Bundle) -> None:
    config = original_network(digits).config
    size = digits.manifest.preprocessing.image_size
    work = work_of_file(digits.verified("fp32"), batch=3)
    multiply_adds = config.mac_count(size)
    assert digits.name == EMBEDDED_NAME
    assert work.matrix_ops + work.depthwise_ops == 2 * 3 * multiply_adds


def test_work_grows_with_the_square_of_the_image(digits: Bundle) -> None:
    path = digits.verified("fp32")
    once, twice = work_of_file(path, 1, 64), work_of_file(path, 1, 128)
    assert twice.depthwise_ops == 4 * once.depthwise_ops


def made_up(**changes: int) -> Work:
    values = {
        "batch": 1,
        "matrix_ops": 0,
        "quantized_ops": 0,
        "depthwise_ops": 0,
        "other_ops": 0,
        "weights": 0,
        "quantized_weights": 0,
        "input_values": 0,
        "output_values": 0,
        "operator_values": 0,
    }
    values |= changes
    kinds = ("matrix_ops", "quantized_ops", "depthwise_ops", "other_ops")
    return Work(**values, operations=sum(values[kind] for kind in kinds))


def test_the_limit_is_the_slower_of_arithmetic_and_memory() -> None:
    limit = limit_of(made_up(matrix_ops=10**9), CEILINGS, "fp32")
    assert limit is not None
    assert limit.ms == pytest.approx(1.0)
    assert limit.bound == "compute"
    limit = limit_of(made_up(weights=10**8), CEILINGS, "fp32")
    assert limit is not None
    assert limit.ms == pytest.approx(4.0)
    assert limit.bound == "memory"


def test_quantized_work_has_its_own_rate_and_its_own_bytes() -> None:
    work = made_up(quantized_ops=4 * 10**9, weights=10**8, quantized_weights=10**8)
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
