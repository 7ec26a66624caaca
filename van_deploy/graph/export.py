"""An ONNX graph from a network, and the network back from its graph.

The exporter is ``torch.onnx.export(dynamo=True)``. What is added here: every value is renamed
after the PyTorch module that made it (``block3.4.attn.proj_1``), notes about source files are
removed, and what a deployer needs to know travels in the model's metadata. A bundle holds no
checkpoint: its FP32 graph has every weight, and each Conv, Gemm and LayerNormalization is named
after the module it came from, so a network can be filled by name.
"""

# PyTorch types every attribute of a module as `Tensor | Module`; the tests run all of this.
# mypy: disable-error-code="assignment,union-attr"

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx import ModelProto, NodeProto
from onnx.helper import find_min_ir_version_for, make_attribute
from onnx.numpy_helper import to_array
from torch import Tensor, nn

from van_deploy.config.sizes import (
    MAX_IMAGE_SIZE,
    MIN_IMAGE_SIZE,
    ImageSize,
    SizeRange,
    height_width,
)
from van_deploy.errors import ConversionError
from van_deploy.graph.fold import RewrittenVan, StageNorm
from van_deploy.graph.names import INPUT_NAME
from van_deploy.model.van import VAN
from van_deploy.model.variants import VanConfig

DEFAULT_OPSET = 20  # the first in which GELU is one operator; below it, it is five
# Height and width that a graph with dynamic sizes is recorded at. No stage's map has a side of 1
# there: PyTorch takes a side that is 1 for one that is always 1.
DYNAMIC_EXAMPLE = (160, 192)
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
    sides = height_width(image_size) if sizes is None else DYNAMIC_EXAMPLE
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
    return _finished(program.model_proto, opset)


def _finished(proto: ModelProto, opset: int) -> ModelProto:
    """Return what the exporter wrote, at the opset asked for and with names for dynamic sides."""
    if opset == 17:
        _lower_to_opset_17_(proto)
    written = proto.opset_import[0].version
    if written != opset:
        raise ConversionError(
            f"The exporter was asked for opset {opset} and wrote opset {written}.",
            f"Use --opset {written}.",
        )
    for value in proto.graph.output:  # dynamic sides, which the exporter calls by their formulas
        for side, dimension in zip(
            ("height", "width"), value.type.tensor_type.shape.dim[2:], strict=False
        ):
            if dimension.dim_param:
                dimension.dim_param = f"{value.name}_{side}"
    proto.ir_version = find_min_ir_version_for(proto.opset_import)
    return proto


def _lower_to_opset_17_(proto: ModelProto) -> None:
    """Turn an opset-18 VAN graph into opset 17.

    The exporter writes 18 at the least. Of the operators a VAN uses, only
    ReduceMean differs: its axes are an attribute up to 17, an input from 18 on.
    """
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in (node for node in graph.node if node.op_type == "ReduceMean"):
        axes = constants[node.input.pop()]
        graph.initializer.remove(axes)
        keep = [attribute for attribute in node.attribute if attribute.name == "keepdims"]
        node.ClearField("attribute")
        node.attribute.extend([*keep, make_attribute("axes", to_array(axes).tolist())])
    proto.opset_import[0].version = 17


def _name_after_modules_(model: ir.Model) -> None:
    """Give every node and its first output the path of the module that made it.

    The last node of a module skip_gains the module's own name, since it makes the
    module's result; the ones before add their operator (``norm1.transpose``).
    """
    graph = model.graph
    scopes = []
    for node in graph:  # '' for the network itself
        path = ast.literal_eval(node.metadata_props.get(_SCOPES, "['']"))
        scopes.append(str(path[-2]) if len(path) > 1 else "")
    remaining = Counter(scopes)
    taken = {value.name for value in (*graph.inputs, *graph.outputs)} | set(graph.initializers)
    results = set(graph.outputs)
    for node, scope in zip(graph, scopes, strict=True):
        remaining[scope] -= 1
        last = scope and not remaining[scope]
        wanted = name = scope if last else f"{scope}.{node.op_type.lower()}".lstrip(".")
        number = 0
        while name in taken:
            number += 1
            name = f"{wanted}_{number}"
        taken.add(name)
        node.name = name
        for index, output in enumerate(node.outputs):
            if output not in results:
                output.name = name if index == 0 else f"{name}.{index}"
    for index, (stored, value) in enumerate(list(graph.initializers.items())):
        if "." not in (stored or ""):  # a constant the exporter made up, such as an axis
            value.name = f"constant.{index}"


def _drop_provenance_(model: ir.Model) -> None:
    """Remove stack traces and exporter notes: they name the paths of one machine."""
    graph = model.graph
    outputs = [output for node in graph for output in node.outputs]
    values = (*graph.inputs, *graph.outputs, *graph.initializers.values(), *outputs)
    for noted in (model, graph, *graph, *values):
        noted.metadata_props.clear()
    for described in (graph, *graph):
        described.doc_string = None
    graph.name = "van"
    model.producer_name, model.producer_version = "van-deploy", ""


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


# --- back from the graph ---------------------------------------------------------------------


@dataclass(frozen=True)
class RebuiltVan:
    """A folded network, and what the graph it came from calls its tensors.

    Attributes:
        model: float32, eval mode, channels-last weights, no gradients.
        tensors: where each tensor of the graph passes in ``model``, by the tensor's name:
            a module's path, and whether it is its output (else its input).
        reads: the tensor that each convolution and the head reads, by the module's path.
    """

    model: RewrittenVan
    tensors: Mapping[str, tuple[str, bool]]
    reads: Mapping[str, str]


def van_from_onnx(graph: ModelProto, config: VanConfig) -> RebuiltVan:
    """Return the network that :func:`onnx_from_van` made ``graph`` of.

    Args:
        graph: FP32, exported from a network with every rewrite of
            :mod:`van_deploy.graph.fold`, with its weights.
        config: its architecture.

    Raises:
        ConversionError: the graph does not hold that network.
    """
    with torch.device("meta"):
        model = RewrittenVan(VAN(config), channels_last=True).eval()
    for stage in config.stages:  # folding leaves nothing of these
        model.get_submodule(f"patch_embed{stage}").norm = nn.Identity()
        for block in model.stage_blocks(stage):
            block.norm1 = block.norm2 = block.layer_scale_1 = block.layer_scale_2 = None
    nodes = {node.name: node for node in graph.graph.node}
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}

    def stored(node: NodeProto, place: int) -> Tensor | None:
        name = node.input[place] if len(node.input) > place else ""
        return torch.from_numpy(np.array(to_array(constants[name]))) if name in constants else None

    why = ""
    if any(node.op_type == "BatchNormalization" for node in graph.graph.node):
        why = "it still has BatchNorms"
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | StageNorm) and not why:
            called = f"{name}.layernormalization" if isinstance(module, StageNorm) else name
            if called not in nodes:
                why = f"it has no node '{name}'"
                continue
            for place, key in enumerate(("weight", "bias"), 1):
                values = stored(nodes[called], place)
                setattr(module, key, None if values is None else nn.Parameter(values, False))
    if why:
        raise ConversionError(
            f"The graph is not a folded VAN of this architecture: {why}.",
            "FP16 and INT8 are made from the folded network: export it again without --no-fold.",
        )
    for stage in config.stages:
        for index, block in enumerate(model.stage_blocks(stage)):
            multiply = nodes.get(f"block{stage}.{index}.mul")
            if multiply is not None:
                factors = [stored(multiply, place) for place in (0, 1)]
                block.skip_gain = next(f for f in factors if f is not None).reshape(-1)
    reads = {n.name: n.input[0] for n in graph.graph.node if n.op_type in {"Conv", "Gemm"}}
    tensors = {tensor: (name, False) for name, tensor in reads.items()}
    modules = {name for name, _ in model.named_modules()}
    tensors |= {n.output[0]: (n.name, True) for n in graph.graph.node if n.name in modules}
    return RebuiltVan(model.to(memory_format=torch.channels_last), tensors, reads)
