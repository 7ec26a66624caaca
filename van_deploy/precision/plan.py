"""Which modules are quantised, and with which numbers: decided before any file is written."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from van_deploy.config.sizes import ImageSize, sides_of
from van_deploy.errors import UsageError
from van_deploy.graph.rebuilt import RebuiltVan
from van_deploy.precision.equalize import Equalization
from van_deploy.precision.observers import ChannelRange
from van_deploy.precision.scales import (
    DEFAULT_PERCENTILE,
    UNCHANGED,
    ChannelAffine,
    Method,
    Quantizer,
    by_channel,
    cpu_weight_scales,
    symmetric,
    unsigned,
    weight_scales,
)

SCOPES = ("pointwise", "deep", "all")

GELU_ENDS = -4.0
"""GELU of anything smaller is within 1.3e-4 of zero: no unsigned integers are spent on it."""

Floats = npt.NDArray[np.float32]

_SHALLOW = re.compile(r"(patch_embed1|block1)\.")
_ADDED = re.compile(r"(patch_embed\d\.proj|proj_2|fc2)$")  # what an addition reads
_BEFORE_GELU = re.compile(r"(proj_1|dwconv\.dwconv)$")


@dataclass(frozen=True)
class LayerPlan:
    """How one module is quantised.

    Attributes:
        input: rounding of what it reads.
        weight_scales: ``(O,)`` of each output channel; None for the gate, a multiplication.
        output: rounding of what it gives, or None.
    """

    input: Quantizer
    weight_scales: npt.NDArray[np.float32] | None = None
    output: Quantizer | None = None


@dataclass(frozen=True)
class QuantizationPlan:
    """A network, and which of its modules are quantised, with which numbers.

    Attributes:
        network: equalised and corrected, in float32.
        layers: by module path, in the order they run.
        inserted: by module, what its input goes through in ``network`` and not in the graph
            that it was rebuilt from.
        affines: by tensor, how it differs from that graph's.
    """

    network: RebuiltVan
    layers: Mapping[str, LayerPlan] = field(default_factory=dict)
    inserted: Mapping[str, ChannelAffine] = field(default_factory=dict)
    affines: Mapping[str, ChannelAffine] = field(default_factory=dict)

    @property
    def convolutions(self) -> tuple[str, ...]:
        """The layers with weights."""
        return tuple(n for n, plan in self.layers.items() if plan.weight_scales is not None)

    def without(self, names: Collection[str]) -> QuantizationPlan:
        """Return the plan with fewer convolutions, and without gates that lost a neighbour."""
        left = [name for name in self.convolutions if name not in names]
        stay = {*left, *_gates(left)}
        return replace(self, layers={n: p for n, p in self.layers.items() if n in stay})


# --- which modules -------------------------------------------------------------------------


def layers_in_scope(
    model: nn.Module, scope: Sequence[str], kept: Collection[str] = ()
) -> tuple[str, ...]:
    """Return the convolutions (and the head, where it is named) that are to be quantised.

    Args:
        model: the network.
        scope: ``pointwise`` (the 1x1 convolutions), ``all`` (every convolution; the head
            stays as it is), ``deep`` (every convolution but those of the stem and of the
            first stage), or regular expressions searched for in module paths.
        kept: modules that must not be.

    Raises:
        UsageError: an expression is wrong or matches nothing, or nothing is left.
    """
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    convs = {n: m for n, m in modules.items() if isinstance(m, nn.Conv2d)}
    named = {
        "pointwise": {n for n, m in convs.items() if m.kernel_size == (1, 1) and m.groups == 1},
        "deep": {name for name in convs if not _SHALLOW.match(name)},
        "all": set(convs),
    }
    found: set[str] = set()
    for entry in scope:
        found |= named[entry] if entry in named else _matching(entry, list(modules))
    layers = tuple(name for name in modules if name in found and name not in kept)
    if not layers:
        raise UsageError(
            f"The scope '{', '.join(scope)}' holds nothing that is not kept in higher precision.",
            "Ask for a larger scope, such as --scope all, or name less with --keep.",
        )
    return layers


def _matching(expression: str, names: Sequence[str]) -> set[str]:
    try:
        found, wrong = {name for name in names if re.search(expression, name)}, ""
    except re.error as error:
        found, wrong = set(), f" ({error})"
    if not found:
        raise UsageError(
            f"The scope '{expression}' is neither {' nor '.join(SCOPES)} nor a regular expression "
            f"for a convolution of this network{wrong}.",
            f"Write for instance --scope 'block[34].*fc1': names are like '{names[1]}', and "
            "`van-deploy inspect` lists them.",
        )
    return found


@torch.inference_mode()
def multiply_adds(model: nn.Module, channels: int, size: ImageSize) -> dict[str, int]:
    """Return the multiply-adds of each convolution and of the head, for one image."""
    found: dict[str, int] = {}
    handles = [
        module.register_forward_hook(
            lambda m, _a, y, name=name: found.update({name: m.weight[0].numel() * y[0].numel()})
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    model(torch.zeros(1, channels, *sides_of(size)))
    for handle in handles:
        handle.remove()
    return found


# --- with which numbers --------------------------------------------------------------------


def counted_tensors(network: RebuiltVan, layers: Collection[str], target: str) -> set[str]:
    """Return the tensors whose histograms decide the scales of ``layers``."""
    read = {network.reads[name] for name in layers}
    if target == "cpu":
        read |= {name for name in layers if name != "head" and not _ADDED.search(name)}
        read |= {network.reads[f"{gate}.conv0"] for gate in _gates(layers)}
    return read


def make_plan(
    equalized: Equalization,
    ranges: Mapping[str, ChannelRange],
    layers: Sequence[str],
    *,
    target: str = "tensorrt",
    method: Method = "mse",
    percentile: float = DEFAULT_PERCENTILE,
) -> QuantizationPlan:
    """Return the plan with every scale by ``method``.

    Args:
        equalized: the network, and how its tensors differ from those of ``ranges``.
        ranges: of the network before, with :func:`counted_tensors` counted.
        layers: what is quantised, from :func:`layers_in_scope`.
        target: ``tensorrt``, or ``cpu``: ONNX Runtime's integer kernels want the outputs
            rounded, too, and the gates between quantised convolutions.
        method: how activation scales are read from the ranges.
        percentile: for that method, in percent.
    """
    network, affines = equalized.network, equalized.affines

    @functools.cache
    def scale_of(tensor: str) -> Quantizer:
        lowest = GELU_ENDS if _BEFORE_GELU.search(tensor) else -np.inf
        affine = affines.get(tensor, UNCHANGED)
        return unsigned(ranges[tensor], method, percentile, affine, lowest)

    chosen: dict[str, LayerPlan] = {}
    for name in layers:
        tensor, (weight, bias) = network.reads[name], parameters(network, name)
        if target == "tensorrt":
            affine = equalized.inserted.get(name) or affines.get(tensor, UNCHANGED)
            scale = symmetric(ranges[tensor], method, percentile, affine)
            chosen[name] = LayerPlan(scale, weight_scales(weight))
            continue
        scale, output = scale_of(tensor), None
        if _ADDED.search(name):
            output = by_channel(ranges[name], affines.get(name, UNCHANGED))
        elif name != "head":
            output = scale_of(name)
        chosen[name] = LayerPlan(scale, cpu_weight_scales(weight, bias, scale.scale), output)
    if target == "cpu":
        gates = _gates(layers)
        chosen |= {gate: LayerPlan(scale_of(network.reads[f"{gate}.conv0"])) for gate in gates}
    return QuantizationPlan(network, chosen, equalized.inserted, affines)


def parameters(network: RebuiltVan, name: str) -> tuple[Floats, Floats]:
    """Return a convolution's weight ``(O, ...)`` and bias ``(O,)``, 0 where it has none."""
    module = cast("nn.Conv2d", network.model.get_submodule(name))
    bias = torch.zeros(len(module.weight)) if module.bias is None else module.bias
    return module.weight.detach().contiguous().numpy(), bias.detach().numpy()


def _gates(layers: Collection[str]) -> list[str]:
    """Return the multiplications between two quantised convolutions."""
    attentions = [name.removesuffix(".proj_2") for name in layers if name.endswith(".proj_2")]
    gates = [f"{attention}.spatial_gating_unit" for attention in attentions]
    return [gate for gate in gates if f"{gate}.conv1" in layers]
