"""The files that other exporters and quantisers make of the same network and weights."""

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxsim
import torch

from van_deploy.model.van import VAN, random_van
from van_deploy.model.variants import get_variant

SIZE = 224  # pixels
NAMES: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}


def random_network(variant: str) -> tuple[VAN, torch.Tensor]:
    """Return the network that ``van-deploy export --weights random`` exports, and an input."""
    return random_van(get_variant(variant).config), torch.zeros(2, 3, SIZE, SIZE)


def export_with_torch(variant: str, folder: Path | str) -> tuple[Path, Path]:
    """Return the file of torch.onnx.export(dynamo=True) at opset 20, and the simplified one."""
    model, example = random_network(variant)
    source, target = Path(folder, "export.onnx"), Path(folder, "export-sim.onnx")
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    options = {"opset_version": 20, "verbose": False, "dynamic_shapes": shapes, **NAMES}
    program: Any = torch.onnx.export(model, (example,), dynamo=True, **options)
    program.save(source)
    onnx.save(onnxsim.simplify(onnx.load(source))[0], target)
    return source, target


def export_all(variant: str, folder: Path) -> tuple[Path, ...]:
    """Create the files of all other exporters."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    warnings.simplefilter("ignore")
    export, simplified = export_with_torch(variant, folder)
    model, example = random_network(variant)
    names = ("torchscript", "torchscript-sim", "prepared", "quantize_static")
    script, script_sim, prepared, quantized = (folder / f"{name}.onnx" for name in names)
    options: dict[str, Any] = {
        "opset_version": 17,
        "dynamic_axes": {n: {0: "batch"} for n in ("images", "logits")},
    }
    torch.onnx.export(model, (example,), script, dynamo=False, **options, **NAMES)
    onnx.save(onnxsim.simplify(onnx.load(script))[0], script_sim)
    images = np.random.default_rng(1).standard_normal((8, 3, SIZE, SIZE), np.float32)
    quant_pre_process(simplified, prepared, skip_symbolic_shape=True)
    quantize_static(prepared, quantized, images, "QUInt8")
    return export, simplified, script_sim, quantized


def quantize_static(
    source: Path, target: Path, images: Iterable[npt.NDArray[Any]], activations: str, **options: Any
) -> None:
    """Quantise a file with ONNX Runtime's own quantiser, with int8 weights per channel.

    Args:
        source: FP32 file.
        target: Q/DQ file to write.
        images: calibration images ``(C, H, W)``.
        activations: name of a ``QuantType``.
        options: of ``quantize_static``.
    """
    from onnxruntime.quantization import QuantType, quantize_static

    logging.getLogger().setLevel(logging.ERROR)  # it recommends preprocessing that was done
    inputs = ({"images": image[None]} for image in images)
    reader = SimpleNamespace(get_next=lambda: next(inputs, None))
    types = {"activation_type": QuantType[activations], "weight_type": QuantType.QInt8}
    quantize_static(source, target, reader, per_channel=True, **types, **options)
