"""The same graph at another image size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from van_deploy.bench.contender import Contender
from van_deploy.config.sizes import ImageSize, sides_of, size_text

__all__ = ["resized"]


def resized(contender: Contender, size: ImageSize, folder: Path) -> Contender:
    """Return a contender whose ONNX file is declared for another image size.

    After the rewrites nothing in a VAN's graph depends on the size of its input but the input's
    own declaration. PyTorch takes any size, and an engine refuses what is outside its profile.
    """
    source = Path(contender.file)
    if source.suffix != ".onnx":
        return contender
    import onnx

    from van_deploy.graph.files import save_onnx

    target = folder / f"{source.stem}-{size_text(size)}.onnx"
    if not target.exists():
        model = onnx.load_model(source)
        dims = model.graph.input[0].type.tensor_type.shape.dim
        axes = (1, 2) if contender.embedded == "uint8" else (2, 3)
        for axis, side in zip(axes, sides_of(size), strict=True):
            dims[axis].dim_value = side
        for value in model.graph.output:  # a backbone's maps have other sides then
            value.type.tensor_type.ClearField("shape")
        del model.graph.value_info[:]  # shapes inferred for the old size
        save_onnx(model, target)
    return replace(contender, file=str(target))
