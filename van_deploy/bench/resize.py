"""The same graph at another image size.

After the rewrites nothing in a VAN's graph depends on the size of its input
but the input's own declaration, so changing that is enough. A graph exported
without them may hold reshapes of fixed size; it then fails to run, and says so.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from van_deploy.bench.contender import Contender
from van_deploy.config.sizes import ImageSize, sides_of, size_text

__all__ = ["resized_file"]


def resized_file(contender: Contender, image_size: ImageSize, folder: Path) -> Contender:
    """Return ``contender`` with its file declared for ``image_size``, written into ``folder``.

    What is no ONNX file is returned as it is: PyTorch takes any size, and an
    engine refuses what is outside its profile.
    """
    if not contender.file.endswith(".onnx"):
        return contender
    import onnx

    from van_deploy.graph.files import save_onnx

    source = Path(contender.file)
    target = folder / f"{source.stem}-{size_text(image_size)}.onnx"
    if not target.exists():
        model = onnx.load_model(source)
        dims = model.graph.input[0].type.tensor_type.shape.dim
        axes = (1, 2) if contender.embedded == "uint8" else (2, 3)
        for axis, side in zip(axes, sides_of(image_size), strict=True):
            dims[axis].dim_value = side
        del model.graph.value_info[:]  # shapes inferred for the old size
        save_onnx(model, target)
    return replace(contender, file=str(target))
