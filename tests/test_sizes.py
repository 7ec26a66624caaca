"""Every combination of batch, size, outputs and precision, from the network to its graphs."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import van_deploy as vd
from tests.artifacts import int8_graph
from tests.conftest import Cli
from van_deploy.bundle import Bundle
from van_deploy.checks.outputs import batch_sizes
from van_deploy.config import BatchRange
from van_deploy.config.sizes import ImageSize, SizeRange, height_width
from van_deploy.graph.export import onnx_from_van
from van_deploy.graph.files import operator_counts
from van_deploy.graph.fold import fold_van
from van_deploy.metrics import sqnr_db
from van_deploy.model.checkpoint import network_from_state
from van_deploy.model.van import VAN, random_van, smooth_images
from van_deploy.model.variants import VanConfig
from van_deploy.precision.fp16 import bf16_from_fp32, default_fp32_nodes, fp16_from_fp32
from van_deploy.runners.onnxruntime import onnxruntime_outputs
from van_deploy.schema import validate

CONFIG = VanConfig((8, 12, 16, 24), (1, 1, 2, 1), (4, 4, 2, 2), num_classes=5)
OPERATORS = {"Conv", "Gelu", "Add", "Mul", "Transpose", "LayerNormalization", "ReduceMean", "Gemm"}
SIZES: dict[str, tuple[ImageSize, SizeRange | None]] = {
    "square": (64, None),
    "64x96": ((64, 96), None),
    "dynamic size": ((64, 96), SizeRange(32, (64, 96), (96, 128))),
}
MIN_DB = {"fp32": 105.0, "fp16": 50.0, "bf16": 34.0, "int8": 20.0}
STAGES = (0, 2)
ALL = list(itertools.product((None, 2), SIZES, ((), STAGES)))
FAST = (
    *((None, "64x96", STAGES), (None, "dynamic size", ())),
    *((2, "square", STAGES), (2, "dynamic size", STAGES)),
)


@pytest.fixture(scope="module")
def original() -> VAN:
    return random_van(CONFIG, seed=5)


@pytest.mark.parametrize(
    ("batch", "size", "indices"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in ALL],
)
def test_every_combination_agrees_with_pytorch(
    original: VAN, batch: int | None, size: str, indices: tuple[int, ...]
) -> None:
    native, sizes = SIZES[size]
    config = CONFIG.backbone(indices) if indices else CONFIG
    network = network_from_state(original.state_dict(), config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images = smooth_images(8, 3, 128)
    height, width = height_width(native)
    folded = fold_van(network, images[:1, :, :height, :width]).model
    fp32 = onnx_from_van(folded, native, batch=batch, sizes=sizes)
    operators = operator_counts(fp32)
    assert set(operators) <= OPERATORS
    assert operators["Gelu"] == 2 * (sum(CONFIG.depths[:3]) if indices else sum(CONFIG.depths))
    dims = [d.dim_param or d.dim_value for d in fp32.graph.input[0].type.tensor_type.shape.dim]
    assert dims == [batch or "batch", 3, *(("height", "width") if sizes else (height, width))]
    kept = default_fp32_nodes(fp32)
    graphs = {
        "fp32": fp32,
        "fp16": fp16_from_fp32(fp32, kept),
        "bf16": bf16_from_fp32(fp32, kept),
        "int8": int8_graph(fp32, config, [images[:, :, :height, :width].numpy()]),
    }
    for graph in graphs.values():
        onnx.checker.check_model(graph, full_check=True)
    network = network.double()
    for at in sizes.sample_sizes() if sizes else (native,):
        rows, columns = height_width(at)
        crops = images[:2, :, :rows, :columns].contiguous()
        with torch.no_grad():
            outputs = network(crops.double())
        expected = outputs if isinstance(outputs, tuple) else (outputs,)
        for name, graph in graphs.items():
            actual = onnxruntime_outputs(graph, crops.numpy())
            assert list(actual) == list(config.output_names)
            for stage, value in zip(expected, actual.values(), strict=True):
                assert sqnr_db(stage.numpy(), value) >= MIN_DB[name], (name, at)


def test_ranges_of_sizes_and_batches() -> None:
    sizes = SizeRange(64, (64, 96), (96, 128))
    assert (sizes.contains((96, 64)), sizes.contains((97, 64))) == (True, False)
    assert str(sizes) == "64:64x96:96x128"
    assert SizeRange(64, 64, 64).sample_sizes() == (64,)
    sizes = SizeRange((64, 32), (64, 48), (64, 64))
    assert sizes.sample_sizes() == ((64, 32), (64, 48), (64, 49), 64)
    eight, rising = validate(BatchRange, "8"), validate(BatchRange, "1:8:8")
    assert (batch_sizes(eight), eight.fixed, rising.fixed) == ((8,), 8, None)
    assert batch_sizes(BatchRange()) == (1, 2, 3, 5, 8, 32)
    assert batch_sizes(BatchRange(1, 2, 2)) == (1, 2)


@pytest.fixture(scope="module")
def dynamic_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return the digits at 64x96 in batches of 3, sizes dynamic."""
    path = tmp_path_factory.mktemp("sizes") / "b"
    options: Any = {"batch": "3", "image_size": "64x96", "dynamic_size": "64:64x96:96x128"}
    vd.export("van_digits", path, **options)
    return Bundle.open(path)


def test_bundle_is_checked_at_its_batch_and_every_size(dynamic_bundle: Bundle) -> None:
    agreement = dynamic_bundle.manifest.checks["agreement"]
    assert [row["batch"] for row in agreement["batches"]] == [3]
    rules = [finding["rule"] for finding in agreement["findings"]]
    assert rules.count("SQNR") == 1 + 3  # at its own size and the others
    assert agreement["outcome"] == "pass"
    with np.load(dynamic_bundle.path / "golden.npz") as arrays:
        sizes = {name.split()[1] for name in arrays.files if " " in name}
    assert sizes == {"64x64", "81x97", "96x128"}


def test_precisions_and_engines_of_dynamic_sizes(
    dynamic_bundle: Bundle, digits_bundle: Bundle, cli: Cli
) -> None:
    for precision in ("fp16", "bf16"):
        cli.passes(f"quantize --precision {precision}", dynamic_bundle.path)
    cli.passes("verify", dynamic_bundle.path)  # 16 images in batches of 3
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    cli.passes("build --precision fp16 --target sm_89", dynamic_bundle.path)
    (file,) = dynamic_bundle.path.glob("engines/*.json")
    assert json.loads(file.read_text())["inputs"][0]["shape"] == [3, 3, -1, -1]
    for bundle, code, option, message in (
        (dynamic_bundle, 5, "--batch 1:2:4", "has a fixed batch of 3, so it cannot serve 1:2:4"),
        (dynamic_bundle, 2, "--dynamic-size 64:32:96", "is not min <= opt <= max"),
        (digits_bundle, 5, "--dynamic-size 64:64:96", "size, so it cannot serve 64:64:96"),
    ):
        assert message in cli.fails(code, f"build --target sm_89 {option}", bundle.path)
