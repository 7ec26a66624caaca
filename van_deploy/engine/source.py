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

from van_deploy.config import BatchRange
from van_deploy.config.sizes import SizeRange
from van_deploy.errors import InputError
from van_deploy.external_weights import external_files_of, require_beside
from van_deploy.files import file_sha256

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto

__all__ = ["MAX_OPSET", "MIN_OPSET", "OnnxSource", "read_source"]

MIN_OPSET = 9
MAX_OPSET = 25
"""What TensorRT 11's parser supports: NVIDIA's ONNX opset guide."""

IMAGE_CHANNELS = {1, 3, 4}
EXPORT_AGAIN = "Export the model again, for instance with `van-deploy export`."


@dataclass(frozen=True)
class OnnxSource:
    """An ONNX file that TensorRT can be given.

    Attributes:
        path: where it is.
        sha256: of the file; external weights are not in it.
        opset: of the standard operators.
        input_name: its one input.
        input_shape: with -1 for the batch if that is free, and for height and width.
        nodes: how many there are.
        has_external_weights: whether some weights are in a file beside it.
    """

    path: Path
    sha256: str
    opset: int
    input_name: str
    input_shape: tuple[int, ...]
    nodes: int
    has_external_weights: bool

    def refuse_profile(self, profile: BatchRange) -> None:
        """Return if the graph can be run at every batch size of ``profile``.

        Raises:
            InputError: its batch is fixed at another size.
        """
        fixed = self.input_shape[0]
        if fixed != -1 and {profile.min, profile.opt, profile.max} != {fixed}:
            raise InputError(
                f"'{self.path}' has a fixed batch of {fixed}, so it cannot serve {profile}.",
                f"Use --batch {fixed}:{fixed}:{fixed}, or export it with a free batch.",
            )

    @property
    def sides(self) -> tuple[int, int]:
        """The axes of height and width: behind the channels, or before those of bytes."""
        last = self.input_shape[-1]
        return (1, 2) if last in IMAGE_CHANNELS else (2, 3)

    def refuse_sizes(self, sizes: SizeRange | None) -> None:
        """Return if the graph can be run at every size of ``sizes``.

        Raises:
            InputError: its size is fixed, or is dynamic and none are given.
        """
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
    model = _load(path)
    others = external_files_of(model)
    require_beside(path, others, None)
    opset = _opset(model, path)
    for problem in (*_structure(model, path), *_types(model.graph)):
        raise InputError(f"'{path}': {problem}.", EXPORT_AGAIN)
    value = _inputs(model.graph)[0]
    shape = _shape(value)
    nodes = len(model.graph.node)
    source = OnnxSource(path, file_sha256(path), opset, value.name, shape, nodes, bool(others))
    free = {axis for axis, size in enumerate(shape) if size == -1 and axis > 0}
    if free - {*source.sides} or len(free) == 1:
        raise InputError(
            f"'{path}': the input '{value.name}' is free along axis "
            f"{', '.join(map(str, sorted(free)))}; engines here have a free batch (axis 0), and "
            "height and width together.",
            "Export it with a fixed image size, or with --dynamic-size.",
        )
    return source


def _load(path: Path) -> ModelProto:
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
    if not model.graph.node:
        raise InputError(f"'{path}' is not an ONNX file: it holds no operator.", EXPORT_AGAIN)
    return model


def _opset(model: ModelProto, path: Path) -> int:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    opset = int(versions.get("", versions.get("ai.onnx", 0)))
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise InputError(
            f"'{path}' uses ONNX opset {opset}; TensorRT's parser knows {MIN_OPSET} to "
            f"{MAX_OPSET} and would read its operators as those it knows.",
            "Export it again with `--opset 20`.",
        )
    return opset


def _structure(model: ModelProto, path: Path) -> Iterator[str]:
    inputs = _inputs(model.graph)
    if len(inputs) != 1:
        yield f"it has {len(inputs)} inputs; a VAN has one, the images"
    elif not _shape(inputs[0]):
        yield f"the input '{inputs[0].name}' has no shape"


def _types(graph: GraphProto) -> Iterator[str]:
    from onnx import TensorProto

    silent: dict[int, str] = {
        TensorProto.DOUBLE: "float64, which TensorRT would narrow to float32",
        TensorProto.STRING: "text, which TensorRT does not have",
        TensorProto.COMPLEX64: "complex numbers, which TensorRT does not have",
        TensorProto.COMPLEX128: "complex numbers, which TensorRT does not have",
    }
    for value in (*_inputs(graph), *graph.output):
        kind = value.type.tensor_type.elem_type
        if kind in silent:
            yield f"'{value.name}' holds {silent[kind]}"
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for tensor in constants.values():
        if tensor.data_type in silent:
            yield f"'{tensor.name}' holds {silent[tensor.data_type]}"
    yield from _zero_points(graph, constants)


def _zero_points(graph: GraphProto, constants: dict[str, TensorProto]) -> Iterator[str]:
    from onnx import TensorProto

    for node in graph.node:
        if node.op_type not in {"QuantizeLinear", "DequantizeLinear"} or len(node.input) < 3:
            continue
        zero_point = constants.get(node.input[2])
        if zero_point is not None and zero_point.data_type == TensorProto.UINT8:
            yield (
                f"'{node.name or node.output[0]}' has a UINT8 zero-point, which TensorRT would "
                "read as INT8: that graph is made for CPUs"
            )
            return


def _inputs(graph: GraphProto) -> list[ValueInfoProto]:
    """Return the inputs that are not weights (old files list both)."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def _shape(value: ValueInfoProto) -> tuple[int, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(int(d.dim_value) if d.HasField("dim_value") else -1 for d in dims)
