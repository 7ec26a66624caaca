"""An ONNX graph from a network: its dynamic dimensions, and names a person can follow.

The exporter is ``torch.onnx.export(dynamo=True)``. What is added here: every
value is renamed after the PyTorch module that made it
(``block3.4.attn.proj_1``), notes about source files are removed, and what a
deployer needs to know travels in the model's metadata.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from onnx import ModelProto
from onnx.helper import find_min_ir_version_for, make_attribute
from onnx.numpy_helper import to_array

from van_deploy.config.sizes import (
    MAX_IMAGE_SIZE,
    MIN_IMAGE_SIZE,
    ImageSize,
    SizeRange,
    sides_of,
)
from van_deploy.errors import ConversionError
from van_deploy.graph.names import INPUT_NAME
from van_deploy.graph.rewritten import RewrittenVan
from van_deploy.model.van import VAN

if TYPE_CHECKING:
    import onnx_ir as ir

DEFAULT_OPSET = 20
"""The first opset in which GELU is one operator; below it, it is five."""

DYNAMIC_EXAMPLE = (160, 192)
"""Height and width that a graph with dynamic sizes is recorded at. No stage's map has a side of 1
there: PyTorch takes a side that is 1 for one that is always 1."""

_SCOPES = "pkg.torch.onnx.name_scopes"


def onnx_from_van(
    model: VAN | RewrittenVan,
    image_size: ImageSize,
    in_chans: int = 3,
    *,
    batch: int | None = None,
    sizes: SizeRange | None = None,
    opset: int = DEFAULT_OPSET,
    metadata: Mapping[str, str] | None = None,
) -> ModelProto:
    """Return ``model`` as an ONNX graph ``images (batch, C, H, W)`` -> ``logits (batch, K)``.

    A backbone's outputs are ``stage1`` to ``stage4``, ``(batch, C, h, w)`` each. All tensors
    are float32.

    Args:
        model: a VAN, original or rewritten, in eval mode.
        image_size: of the input in pixels.
        in_chans: channels ``C`` of the input.
        batch: the one batch size; None leaves it dynamic.
        sizes: makes height and width dynamic; the graph itself takes any from
            :data:`~van_deploy.config.sizes.MIN_IMAGE_SIZE` on.
        opset: ONNX operator set, 17 (the first with LayerNormalization) to 23 (the newest tried).
        metadata: written into the file as ``metadata_props``.

    Raises:
        ConversionError: the exporter failed.
    """
    sides = sides_of(image_size) if sizes is None else DYNAMIC_EXAMPLE
    example = torch.zeros(batch or 2, in_chans, *sides)
    dynamic = {} if batch else {0: torch.export.Dim("batch", min=1)}
    if sizes is not None:
        ends = {"min": MIN_IMAGE_SIZE, "max": MAX_IMAGE_SIZE}
        dynamic |= {i: torch.export.Dim(n, **ends) for i, n in ((2, "height"), (3, "width"))}
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT_NAME],
                output_names=list(model.config.output_names),
                dynamic_shapes=(dynamic,),
                verbose=False,
            )
    except Exception as error:
        raise ConversionError(
            f"The ONNX exporter failed at opset {opset}: {error}",
            f"Try --opset {DEFAULT_OPSET}, or --no-fold to see whether a rewrite is the cause.",
        ) from error
    _name_after_modules_(program.model)
    _drop_provenance_(program.model)
    program.model.metadata_props.update(metadata or {})
    proto = program.model_proto
    if opset == 17:
        _lower_to_opset_17_(proto)
    written = proto.opset_import[0].version
    if written != opset:
        raise ConversionError(
            f"The exporter was asked for opset {opset} and wrote opset {written}.",
            f"Use --opset {written}.",
        )
    _name_dimensions_(proto)
    proto.ir_version = find_min_ir_version_for(proto.opset_import)
    return proto


def _name_dimensions_(proto: ModelProto) -> None:
    """Name the dynamic sides of the outputs, which the exporter calls by their formulas."""
    for value in proto.graph.output:
        for dimension, side in zip(
            value.type.tensor_type.shape.dim[2:], ("height", "width"), strict=False
        ):
            if dimension.dim_param:
                dimension.dim_param = f"{value.name}_{side}"


def _lower_to_opset_17_(proto: ModelProto) -> None:
    """Turn an opset-18 VAN graph into opset 17.

    The exporter writes 18 at the least. Of the operators a VAN uses, only
    ReduceMean differs: its axes are an attribute up to 17, an input from 18 on.
    """
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "ReduceMean":
            continue
        axes = to_array(constants[node.input[1]]).tolist()
        graph.initializer.remove(constants[node.input[1]])
        keep = [attribute for attribute in node.attribute if attribute.name == "keepdims"]
        node.input.pop()
        node.ClearField("attribute")
        node.attribute.extend([*keep, make_attribute("axes", axes)])
    proto.opset_import[0].version = 17


def _name_after_modules_(model: ir.Model) -> None:
    """Give every node and its first output the path of the module that made it.

    The last node of a module carries the module's own name, since it makes the
    module's result; the ones before add their operator (``norm1.transpose``).
    """
    graph = model.graph
    scopes = [_scope(node) for node in graph]
    remaining = Counter(scopes)
    taken = {value.name for value in (*graph.inputs, *graph.outputs)} | set(graph.initializers)
    results = set(graph.outputs)
    for node, scope in zip(graph, scopes, strict=True):
        remaining[scope] -= 1
        last = scope and not remaining[scope]
        name = _free(scope if last else f"{scope}.{node.op_type.lower()}".lstrip("."), taken)
        taken.add(name)
        node.name = name
        for index, output in enumerate(node.outputs):
            if output not in results:
                output.name = name if index == 0 else f"{name}.{index}"
    for index, (name, value) in enumerate(list(graph.initializers.items())):
        if "." not in (name or ""):  # a constant the exporter made up, such as an axis
            value.name = f"constant.{index}"


def _scope(node: ir.Node) -> str:
    """Return the path of the PyTorch module a node came from ('' for the network itself)."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "['']"))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _free(name: str, taken: set[str | None]) -> str:
    """Return ``name``, numbered if it is taken."""
    if name not in taken:
        return name
    return next(c for i in range(1, len(taken) + 2) if (c := f"{name}_{i}") not in taken)


def _drop_provenance_(model: ir.Model) -> None:
    """Remove stack traces and exporter notes: they name the paths of one machine."""
    graph = model.graph
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    graph.name = "van"
    graph.doc_string = None
    model.producer_name = "van-deploy"
    model.producer_version = ""
    model.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own chatter off the user's screen; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
