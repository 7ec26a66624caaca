"""Ranges recorded in one pass, and their files."""

from __future__ import annotations

import errno
import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from tests.precision.conftest import Digits
from van_deploy.errors import ConversionError, ImageError
from van_deploy.precision import observer
from van_deploy.precision.histogram import Histogram
from van_deploy.precision.observer import Observer, float_tensors, with_outputs
from van_deploy.precision.plan import weighted_nodes
from van_deploy.precision.ranges import lean_batch, record_ranges
from van_deploy.precision.ranges_file import ranges_from_file, ranges_summary, write_ranges
from van_deploy.precision.tensor_range import TensorRange


def test_every_tensor_is_recorded_and_agrees_with_onnxruntime(
    digits_graph: ModelProto, calibration_digits: Digits
) -> None:
    import onnxruntime as ort

    images = calibration_digits.images[:12]
    ranges = record_ranges(digits_graph, [images[:5], images[5:]])
    names = float_tensors(digits_graph)
    assert tuple(ranges.tensors) == names
    assert ranges.images == 12
    session = ort.InferenceSession(
        with_outputs(digits_graph, names[1:]).SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    for name, values in zip(names[1:], session.run(None, {"images": images}), strict=True):
        record = ranges.tensors[name]
        assert record.minimum == pytest.approx(values.min(), rel=1e-4, abs=1e-5)
        assert record.maximum == pytest.approx(values.max(), rel=1e-4, abs=1e-5)
        assert record.count == values.size
        rows = values.reshape(len(values), -1)
        assert record.mean_maximum == pytest.approx(rows.max(axis=1).mean(), rel=1e-3, abs=1e-5)


def test_the_inputs_of_all_weighted_nodes_have_histograms(
    digits_graph: ModelProto, calibration_digits: Digits
) -> None:
    ranges = record_ranges(digits_graph, [calibration_digits.images[:4]])
    inputs = {node.input[0] for node in weighted_nodes(digits_graph).values()}
    with_histogram = {n for n, r in ranges.tensors.items() if r.histogram is not None}
    assert with_histogram == inputs
    for name in inputs:
        histogram = ranges.tensors[name].histogram
        assert histogram is not None
        assert histogram.count == ranges.tensors[name].count


def test_batches_do_not_change_what_is_recorded(
    digits_graph: ModelProto, calibration_digits: Digits
) -> None:
    images = calibration_digits.images[:8]
    together = record_ranges(digits_graph, [images])
    apart = record_ranges(digits_graph, [images[i : i + 1] for i in range(8)])
    for name, record in together.tensors.items():
        other = apart.tensors[name]
        assert record.mean_maximum == pytest.approx(other.mean_maximum, rel=1e-4, abs=1e-5)
        assert record.maximum == pytest.approx(other.maximum, rel=1e-4, abs=1e-5)


def test_memory_does_not_grow_with_the_number_of_images(
    digits_graph: ModelProto, calibration_digits: Digits
) -> None:
    def peak(rounds: int) -> int:
        tracemalloc.start()
        record_ranges(digits_graph, (calibration_digits.images[:4] for _ in range(rounds)))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(2), peak(10)
    assert many < 1.1 * few


def test_small_magnitudes_are_counted_against_fp16() -> None:
    record = TensorRange()
    record.add_(np.array([[0.0, 1.0, 1e-5, -1e-9, -3.0]], np.float32))
    assert (record.subnormal, record.vanishing) == (2, 1)
    assert record.smallest == pytest.approx(1e-9)
    assert record.largest == 3.0


def test_small_magnitudes_of_a_histogram_are_those_without_one() -> None:
    values = np.array([[0.0, 1.0, 1e-5, -1e-9, -3.0, 6.2e-5, -6.0e-5]], np.float32)
    plain, counted = TensorRange(), TensorRange(histogram=Histogram())
    for record in (plain, counted):
        assert record.add_(values)
        record.close_()
    assert (plain.subnormal, plain.vanishing) == (counted.subnormal, counted.vanishing) == (3, 1)
    assert counted.histogram is not None
    assert (counted.histogram.tiny, counted.histogram.zeros) == (2, 1)
    assert counted.histogram.count == values.size


def test_the_smallest_magnitude_is_seen_beside_zeros() -> None:
    record = TensorRange()
    record.add_(np.array([[0.0, 0.5, -0.25]], np.float32))
    assert record.smallest == 0.25


@pytest.mark.parametrize("where", [0, 70_000, 802_815])
@pytest.mark.parametrize("histogram", [None, Histogram()])
def test_nan_is_found_wherever_it_is(where: int, histogram: Histogram | None) -> None:
    values = np.zeros((2, 256, 56, 56), np.float32)
    values[1].reshape(-1)[where] = np.nan
    assert not TensorRange(histogram=histogram).add_(values)


def test_two_records_put_together_are_one(calibration_digits: Digits) -> None:
    images = calibration_digits.images[:7]
    whole, first, second = (TensorRange(histogram=Histogram(), channels=True) for _ in range(3))
    whole.add_(images)
    first.add_(images[:5])
    second.add_(images[5:])
    both = first.merged(second)
    assert whole.histogram is not None
    assert both.histogram is not None
    assert np.array_equal(both.histogram.positive, whole.histogram.positive)
    assert np.array_equal(both.histogram.negative, whole.histogram.negative)
    assert (both.minimum, both.maximum, both.count) == (whole.minimum, whole.maximum, whole.count)
    assert both.mean_maximum == pytest.approx(whole.mean_maximum)
    assert np.array_equal(both.channel_maximum, whole.channel_maximum)
    nothing = TensorRange(histogram=Histogram(), channels=True)
    alone = whole.merged(nothing)
    assert (alone.images, alone.mean_minimum) == (7, whole.mean_minimum)
    assert np.array_equal(alone.channel_minimum, whole.channel_minimum)


@pytest.mark.parametrize(("free", "is_full"), [(0, True), (2**40, False)])
def test_a_disk_too_full_for_the_optimised_graph_is_one_error_of_the_system(
    digits_graph: ModelProto,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    is_full: bool,
) -> None:
    (tmp_path / "optimized.onnx").mkdir()  # ONNX Runtime cannot write there
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(Exception, match=r".") as caught:
        observer._session(digits_graph, 1, tmp_path / "optimized.onnx")
    assert (getattr(caught.value, "errno", None) == errno.ENOSPC) is is_full


def test_values_are_given_as_they_lie_unless_their_order_matters(
    digits_graph: ModelProto, calibration_digits: Digits
) -> None:
    """The same values of each image; of the tensors asked for, in the same places."""
    images = calibration_digits.images[:3]
    names = float_tensors(digits_graph)[1:]
    whole = [name for name in names if name.endswith("fc1")]
    lying = Observer(digits_graph, names, 1, whole).run_in_own_memory()(images)
    usual = Observer(digits_graph, names, 1, names).run_in_own_memory()(images)
    for name, found, wanted in zip(names, lying, usual, strict=True):
        assert found.shape == wanted.shape
        if name in whole:
            assert np.allclose(found, wanted, atol=1e-5)
        rows, expected = (np.sort(v.reshape(3, -1), axis=1) for v in (found, wanted))
        assert np.allclose(rows, expected, atol=1e-5)


def test_which_worker_sees_a_batch_is_always_the_same(
    digits_graph: ModelProto, calibration_digits: Digits
) -> None:
    parts = [calibration_digits.images[i : i + 2] for i in range(0, 10, 2)]
    first, second = (record_ranges(digits_graph, parts, threads=2) for _ in range(2))
    for name, record in first.tensors.items():
        other = second.tensors[name]
        assert (record.mean_minimum, record.mean_maximum) == (
            other.mean_minimum,
            other.mean_maximum,
        )
        if record.histogram is not None and other.histogram is not None:
            assert np.array_equal(record.histogram.positive, other.histogram.positive)


def test_no_images_is_an_error(digits_graph: ModelProto) -> None:
    with pytest.raises(ImageError, match="There is no image to record ranges on"):
        record_ranges(digits_graph, [])


def test_a_tensor_that_is_not_finite_is_named() -> None:
    graph = helper.make_graph(
        [helper.make_node("Log", ["images"], ["block1.0"], "block1.0")],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("block1.0", TensorProto.FLOAT, ["n", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    with pytest.raises(ConversionError) as caught:
        record_ranges(model, [np.array([[1.0, -1.0, 2.0]], np.float32)], histograms=())
    assert caught.value.message == (
        "The tensor 'block1.0' is infinite or NaN on the calibration images "
        "(33.3 % of its values in one batch)."
    )


def test_the_whole_record_comes_back_from_its_file(
    digits_graph: ModelProto, calibration_digits: Digits, tmp_path: Path
) -> None:
    ranges = record_ranges(digits_graph, [calibration_digits.images[:4]])
    write_ranges(tmp_path / "ranges.npz", ranges)
    back = ranges_from_file(tmp_path / "ranges.npz")
    assert back.images == 4
    assert list(back.tensors) == list(ranges.tensors)
    for name, record in ranges.tensors.items():
        other = back.tensors[name]
        assert (other.minimum, other.maximum, other.smallest) == (
            record.minimum,
            record.maximum,
            record.smallest,
        )
        if record.histogram is not None:
            assert other.histogram is not None
            assert np.array_equal(other.histogram.positive, record.histogram.positive)
            assert np.array_equal(other.histogram.negative, record.histogram.negative)
            assert other.histogram.tiny == record.histogram.tiny


def test_the_summary_is_short_and_plain(
    digits_graph: ModelProto, calibration_digits: Digits
) -> None:
    summary = ranges_summary(record_ranges(digits_graph, [calibration_digits.images[:4]]))
    text = json.dumps(summary, allow_nan=False)
    assert summary["images"] == 4
    entry = summary["tensors"]["block1.0.mlp.act"]
    assert -0.18 < entry["minimum"] < 0 < entry["maximum"]
    assert entry["magnitude_at"]["50%"] <= entry["magnitude_at"]["99.9%"] <= entry["maximum"]
    assert len(text) < 120_000


def test_the_batch_follows_the_size_of_the_tensors(digits_graph: ModelProto) -> None:
    assert lean_batch(digits_graph) == 32
    assert lean_batch(digits_graph, budget_bytes=1) == 1
    assert 1 < lean_batch(digits_graph, budget_bytes=40 << 20) < 32


def test_every_batch_is_counted_though_its_memory_is_used_again(
    digits_graph: ModelProto, calibration_digits: Digits
) -> None:
    """Four batches and a smaller last one give what one batch gives."""
    images = calibration_digits.images[:18]
    name = "block1.0.mlp.fc2"
    parts = [images[i : i + 4] for i in range(0, 18, 4)]
    several = record_ranges(digits_graph, parts, channels=[name], threads=1)
    once = record_ranges(digits_graph, [images], channels=[name], threads=1)
    for tensor, record in once.tensors.items():
        other = several.tensors[tensor]
        assert other.count == record.count
        assert other.minimum == pytest.approx(record.minimum, rel=1e-4, abs=1e-4)
        assert other.mean_maximum == pytest.approx(record.mean_maximum, rel=1e-4, abs=1e-4)
    assert several.tensors[name].channels
    assert not several.tensors["images"].channels
    ends = several.tensors[name]
    assert ends.channel_maximum.shape == (16,)
    assert ends.channel_maximum.max() == pytest.approx(ends.maximum)
    assert ends.channel_minimum.min() == pytest.approx(ends.minimum)
