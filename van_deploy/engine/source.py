"""A look at the ONNX file before TensorRT sees it.

TensorRT's parser reports what it cannot do, but takes some files without a word
and builds something else (measured with TensorRT for RTX 1.7.1): an opset newer
than any it knows, a file that is no ONNX at all (an empty network), float64
(narrowed to float32), and UINT8 zero-points (read as INT8). Those are refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from van_deploy.config import BuildOptions
from van_deploy.errors import InputError
from van_deploy.files import external_files_of, file_sha256, require_beside

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

MIN_OPSET = 9
MAX_OPSET = 25
"""What TensorRT 11's parser supports: NVIDIA's ONNX opset guide."""

IMAGE_CHANNELS = {1, 3, 4}
SILENT = {
    "DOUBLE": "float64, which TensorRT would narrow to float32",
    "STRING": "text, which TensorRT does not have",
    "COMPLEX64": "complex numbers, which TensorRT does not have",
    "COMPLEX128": "complex numbers, which TensorRT does not have",
}
EXPORT_AGAIN = "Export the model again, for instance with `van-deploy export`."


@dataclass(frozen=True)
class OnnxSource:
    """An ONNX file that TensorRT can be given.

    Attributes:
        path: where it is.
        sha256: of the file; external weights are not in it.
        input_shape: with -1 for the batch if that is dynamic, and for height and width.
        has_external_weights: whether some weights are in a file beside it.
    """

    path: Path
    sha256: str
    input_shape: tuple[int, ...]
    has_external_weights: bool

    def refuse(self, options: BuildOptions) -> None:
        """Return if the graph can be run at every batch and image size that is asked for.

        Raises:
            InputError: its batch or size is fixed at another; or its size is dynamic and none
                are given.
        """
        fixed, sizes = self.input_shape[0], options.dynamic_size
        for profile in options.profiles if fixed != -1 else ():
            if {profile.min, profile.opt, profile.max} != {fixed}:
                raise InputError(
                    f"'{self.path}' has a fixed batch of {fixed}, so it cannot serve {profile}.",
                    f"Use --batch {fixed}:{fixed}:{fixed}, or export it with a dynamic batch.",
                )
        dynamic = len(self.input_shape) == 4 and -1 in self.input_shape[1:]
        if dynamic and sizes is None:
            raise InputError(
                f"'{self.path}' has dynamic height and width, and no sizes to build for are given.",
                "Give them, such as --dynamic-size 192:224:512.",
            )
        if sizes is not None and not dynamic:
            raise InputError(
                f"'{self.path}' takes one image size, so it cannot serve {sizes}.",
                "Leave --dynamic-size out, or export it with --dynamic-size.",
            )


def read_source(path: Path) -> OnnxSource:
    """Return what is in an ONNX file, having found nothing TensorRT would misread.

    Raises:
        InputError: it is not ONNX, is damaged, or holds something TensorRT would
            take without a word and change.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise InputError(f"There is no ONNX file '{path}'.", "Make it with `van-deploy export`.")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise InputError(
            f"'{path}' is not an ONNX file, or it is damaged.", EXPORT_AGAIN
        ) from error
    others = external_files_of(model)
    require_beside(path, others, None)
    for problem in _problems(model):
        raise InputError(f"'{path}' {problem}.", EXPORT_AGAIN)
    dims = _inputs(model)[0].type.tensor_type.shape.dim
    shape = tuple(int(d.dim_value) if d.HasField("dim_value") else -1 for d in dims)
    return OnnxSource(path, file_sha256(path), shape, bool(others))


def _inputs(model: ModelProto) -> list[ValueInfoProto]:
    """Return the inputs that are not weights (old files list both)."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def _problems(model: ModelProto) -> Iterator[str]:
    """Yield what TensorRT would misread, each the end of a sentence about the file."""
    from onnx import TensorProto

    graph, inputs = model.graph, _inputs(model)
    if not graph.node:
        yield "is not an ONNX file: it holds no operator"
    versions = {entry.domain: entry.version for entry in model.opset_import}
    opset = int(versions.get("", versions.get("ai.onnx", 0)))
    if not MIN_OPSET <= opset <= MAX_OPSET:
        yield (
            f"uses ONNX opset {opset}; TensorRT's parser knows {MIN_OPSET} to {MAX_OPSET} and "
            "would read its operators as those it knows (--opset 20 exports one of them)"
        )
    if len(inputs) != 1:
        yield f"has {len(inputs)} inputs; a VAN has one, the images"
        return
    dims = inputs[0].type.tensor_type.shape.dim
    if not dims:
        yield f"has an input '{inputs[0].name}' without a shape"
        return
    free = {axis for axis, dim in enumerate(dims) if axis and not dim.HasField("dim_value")}
    sides = {1, 2} if dims[-1].dim_value in IMAGE_CHANNELS else {2, 3}  # of bytes, or behind them
    if free and free != sides:
        yield (
            f"has an input '{inputs[0].name}' that is dynamic along axis "
            f"{', '.join(map(str, sorted(free)))}; engines here have a dynamic batch (axis 0), and "
            "height and width together"
        )
    types = {v.name: v.type.tensor_type.elem_type for v in (*inputs, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    silent = {TensorProto.DataType.Value(name): words for name, words in SILENT.items()}
    for name, kind in types.items():
        if kind in silent:
            yield f"holds in '{name}' {silent[kind]}"
    for node in graph.node:
        quantises = node.op_type in {"QuantizeLinear", "DequantizeLinear"}
        if quantises and types.get("".join(node.input[2:])) == TensorProto.UINT8:
            yield (
                f"has a UINT8 zero-point in '{node.name or node.output[0]}', which TensorRT would "
                "read as INT8: that graph is made for CPUs"
            )
