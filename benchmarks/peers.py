"""Makes the files that runtimes.py races against: what others would deploy.

    python benchmarks/peers.py van_b0 /tmp/peers [images.npy]

Each from the same random weights:

    export-today.onnx          torch.onnx.export(dynamo=True), opset 20
    export-today-sim.onnx      the same through onnxsim
    torchscript-17.onnx        the TorchScript exporter at opset 17, as timm's and Optimum's
                               scripts use it
    torchscript-17-sim.onnx    the same through onnxsim
    ort-int8.onnx              export-today-sim through ONNX Runtime's own quantiser (QDQ, uint8
                               activations, per channel, MinMax on the images given)
    openvino-direct.xml        OpenVINO's own conversion from the PyTorch module
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["make"]

SIZE = 224


def main() -> int:
    """Make every file and print its name, or why it could not be made."""
    variant, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    for name, outcome in make(variant, folder, Path(sys.argv[3]) if sys.argv[3:] else None):
        print(f"{name}: {outcome}", flush=True)
    return 0


def make(variant: str, folder: Path, images: Path | None) -> list[tuple[str, str]]:
    """Write the files into ``folder``; return each one's name and "made" or what went wrong."""
    import torch

    from van_deploy.model.random_weights import random_van
    from van_deploy.model.variants import variant_named

    warnings.simplefilter("ignore")
    model = random_van(variant_named(variant).config)
    example = torch.zeros(2, 3, SIZE, SIZE)
    today, script = folder / "export-today.onnx", folder / "torchscript-17.onnx"
    steps: dict[Path, Callable[[], None]] = {
        today: lambda: _export_today(model, example, today),
        folder / "export-today-sim.onnx": lambda: _simplified(today),
        script: lambda: _torchscript(model, example, script),
        folder / "torchscript-17-sim.onnx": lambda: _simplified(script),
        folder / "ort-int8.onnx": lambda: _quantised(folder, images),
        folder / "openvino-direct.xml": lambda: _openvino(model, example, folder),
    }
    outcomes = []
    for path, step in steps.items():
        try:
            step()
            outcomes.append((path.name, "made"))
        except Exception as error:  # noqa: PERF203 - a peer that fails is a row of its own, not the end
            words = str(error).strip().splitlines()
            outcomes.append((path.name, f"failed: {words[0][:200] if words else error!r}"))
    return outcomes


def _export_today(model: Any, example: Any, path: Path) -> None:
    import torch

    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        opset_version=20,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
    )
    program.save(path)


def _torchscript(model: Any, example: Any, path: Path) -> None:
    import torch

    torch.onnx.export(
        model,
        (example,),
        path,
        dynamo=False,
        opset_version=17,
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
    )


def _simplified(path: Path) -> None:
    import onnx
    import onnxsim

    simplified, _ = onnxsim.simplify(onnx.load(path))
    onnx.save(simplified, path.with_name(f"{path.stem}-sim.onnx"))


def _quantised(folder: Path, images: Path | None) -> None:
    import numpy as np
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if images is None:
        raise ValueError("no images to calibrate on were given")
    batches = np.load(images)[:8, None]

    class Reader(CalibrationDataReader):
        """One image at a time."""

        def __init__(self) -> None:
            self._rest = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            """Return the next image, or None at the end."""
            batch = next(self._rest, None)
            return None if batch is None else {"images": batch}

    prepared = folder / "prepared.onnx"
    quant_pre_process(folder / "export-today-sim.onnx", prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        folder / "ort-int8.onnx",
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _openvino(model: Any, example: Any, folder: Path) -> None:
    import openvino

    converted = openvino.convert_model(model, example_input=example, input=[-1, 3, SIZE, SIZE])
    openvino.save_model(converted, folder / "openvino-direct.xml", compress_to_fp16=False)


if __name__ == "__main__":
    raise SystemExit(main())
