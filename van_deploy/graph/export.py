"""Export a network to ONNX, and rebuild the network from its graph.

The exporter is ``torch.onnx.export(dynamo=True)``. This module renames every value after the
PyTorch module that computes it (``block3.4.attn.proj_1``), removes paths of source files, and adds
deployment metadata. A bundle contains no checkpoint: its FP32 graph has all weights, and each Conv,
Gemm and LayerNormalization has the name of its module, so a network can be loaded by name.
"""

# PyTorch types every attribute of a module as `Tensor | Module`; the tests run all of this.
# mypy: disable-error-code="assignment,union-attr"

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

DEFAULT_OPSET = 20  # the first with a GELU operator; older opsets need five operators
# Height and width for tracing graphs with dynamic sizes. No feature map has a side of 1 at this
# size, because PyTorch specialises dimensions of size 1.
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
        batch: a static batch size; None for a dynamic batch.
        sizes: makes height and width dynamic; the graph accepts any size from
            :data:`~van_deploy.config.sizes.MIN_IMAGE_SIZE` on.
        opset: ONNX operator set, 17 (the first with LayerNormalization) to 23 (the newest tested).
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
        with _silence_exporter():
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
    _remove_source_paths_(program.model)
    program.model.metadata_props.update(metadata or {})
    return _set_opset(program.model_proto, opset)


def _set_opset(proto: ModelProto, opset: int) -> ModelProto:
    """Return the exported model with the requested opset and names for dynamic sides."""
    if opset == 17:
        _lower_to_opset_17_(proto)
    actual = proto.opset_import[0].version
    if actual != opset:
        raise ConversionError(
            f"Opset {opset} was requested, and the exporter wrote opset {actual}.",
            f"Use --opset {actual}.",
        )
    for value in proto.graph.output:  # the exporter names dynamic sides by their formulas
        for side, dimension in zip(
            ("height", "width"), value.type.tensor_type.shape.dim[2:], strict=False
        ):
            if dimension.dim_param:
                dimension.dim_param = f"{value.name}_{side}"
    proto.ir_version = find_min_ir_version_for(proto.opset_import)
    return proto


def _lower_to_opset_17_(proto: ModelProto) -> None:
    """Convert an opset-18 VAN graph to opset 17.

    The exporter writes opset 18 or newer. Of the operators of a VAN, only
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
    """Name every node and its first output after the path of its module.

    The last node of a module has the module's name, because it computes the
    module's output; the nodes before it append their operator (``norm1.transpose``).
    """
    graph = model.graph
    scopes = []
    for node in graph:  # '' for the root module
        path = ast.literal_eval(node.metadata_props.get(_SCOPES, "['']"))
        scopes.append(str(path[-2]) if len(path) > 1 else "")
    remaining = Counter(scopes)
    used = {value.name for value in (*graph.inputs, *graph.outputs)} | set(graph.initializers)
    results = set(graph.outputs)
    for node, scope in zip(graph, scopes, strict=True):
        remaining[scope] -= 1
        last = scope and not remaining[scope]
        stem = name = scope if last else f"{scope}.{node.op_type.lower()}".lstrip(".")
        number = 0
        while name in used:
            number += 1
            name = f"{stem}_{number}"
        used.add(name)
        node.name = name
        for index, output in enumerate(node.outputs):
            if output not in results:
                output.name = name if index == 0 else f"{name}.{index}"
    for index, (name, value) in enumerate(list(graph.initializers.items())):
        if "." not in (name or ""):  # a constant of the exporter, such as an axis
            value.name = f"constant.{index}"


def _remove_source_paths_(model: ir.Model) -> None:
    """Remove stack traces and exporter metadata, which contain paths of this machine."""
    graph = model.graph
    outputs = [output for node in graph for output in node.outputs]
    values = (*graph.inputs, *graph.outputs, *graph.initializers.values(), *outputs)
    for element in (model, graph, *graph, *values):
        element.metadata_props.clear()
    for documented in (graph, *graph):
        documented.doc_string = None
    graph.name = "van"
    model.producer_name, model.producer_version = "van-deploy", ""


@contextlib.contextmanager
def _silence_exporter() -> Iterator[None]:
    """Suppress the exporter's messages and warnings; errors are still raised."""
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


# --- network from the graph ------------------------------------------------------------------


@dataclass(frozen=True)
class RebuiltVan:
    """A folded network rebuilt from a graph, with the graph's tensor names.

    Attributes:
        model: float32, eval mode, channels-last weights, no gradients.
        tensors: position of each tensor of the graph in ``model``, by the tensor's name:
            a module's path, and whether it is its output (otherwise its input).
        reads: name of the input tensor of each convolution and the head, by module path.
    """

    model: RewrittenVan
    tensors: Mapping[str, tuple[str, bool]]
    reads: Mapping[str, str]


def van_from_onnx(graph: ModelProto, config: VanConfig) -> RebuiltVan:
    """Return the network that :func:`onnx_from_van` exported to ``graph``.

    Args:
        graph: FP32, exported from a network with every rewrite of
            :mod:`van_deploy.graph.fold`, including weights.
        config: its architecture.

    Raises:
        ConversionError: the graph is not a folded network of this architecture.
    """
    with torch.device("meta"):
        model = RewrittenVan(VAN(config)).eval()
    for stage in config.stages:  # modules that folding removes
        model.get_submodule(f"patch_embed{stage}").norm = nn.Identity()
    for _, block in model.named_blocks():
        block.norm1 = block.norm2 = block.layer_scale_1 = block.layer_scale_2 = None
    nodes = {node.name: node for node in graph.graph.node}
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}

    def constant(node: NodeProto, index: int) -> Tensor | None:
        name = node.input[index] if len(node.input) > index else ""
        return torch.from_numpy(np.array(to_array(constants[name]))) if name in constants else None

    problem = ""
    norms = [node.name for node in graph.graph.node if node.op_type == "BatchNormalization"]
    if any(not name.startswith("head.") for name in norms):
        problem = "it still has BatchNorms"
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm1d) and name not in norms:  # folded
            model.set_submodule(name, nn.Identity())
        elif isinstance(module, nn.Conv2d | nn.Linear | StageNorm | nn.BatchNorm1d) and not problem:
            suffix = ".layernormalization" if isinstance(module, StageNorm) else ""
            if (node := nodes.get(name + suffix)) is None:
                problem = f"it has no node '{name}'"
                continue
            for index, key in enumerate(("weight", "bias"), 1):
                values = constant(node, index)
                setattr(module, key, None if values is None else nn.Parameter(values, False))
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean, module.running_var = constant(node, 3), constant(node, 4)
    if problem:
        raise ConversionError(
            f"The graph is not a folded VAN of this architecture: {problem}.",
            "FP16 and INT8 need the folded network: export it again without --no-fold.",
        )
    for name, block in model.named_blocks():
        if (multiply := nodes.get(f"{name}.mul")) is not None:
            factors = [constant(multiply, index) for index in (0, 1)]
            block.skip_gain = next(f for f in factors if f is not None).reshape(-1)
    reads = {n.name: n.input[0] for n in graph.graph.node if n.op_type in {"Conv", "Gemm"}}
    tensors = {tensor: (name, False) for name, tensor in reads.items()}
    modules = {name for name, _ in model.named_modules()}
    tensors |= {n.output[0]: (n.name, True) for n in graph.graph.node if n.name in modules}
    return RebuiltVan(model.to(memory_format=torch.channels_last), tensors, reads)
