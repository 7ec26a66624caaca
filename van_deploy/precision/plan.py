"""Which modules are quantised, and with which numbers; and the network that rounds as planned.

The plan is decided before any file is written. To look at what rounding does, and to correct
it, the network runs as a PyTorch module: rounding is done in float32, as an engine or an integer
kernel would do it, with a Q/DQ pair before every quantised layer, behind it too where the target
rounds outputs, and weights that are their integers times their scales.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from van_deploy.checks.golden import OutputLayout
from van_deploy.config.sizes import ImageSize, height_width
from van_deploy.errors import UsageError
from van_deploy.graph.export import RebuiltVan
from van_deploy.precision.equalize import Equalization
from van_deploy.precision.scales import (
    UNCHANGED,
    ChannelAffine,
    ChannelRange,
    Images,
    Method,
    Quantizer,
    by_channel,
    cpu_weight_scales,
    rounded,
    symmetric,
    unsigned,
    weight_scales,
)

SCOPES = ("pointwise", "deep", "all")
# GELU of anything smaller is within 1.3e-4 of zero: no unsigned integers are spent on it.
GELU_ENDS = -4.0
# Biases are corrected on images of so many pixels together, held in memory at once: 20 of
# 224 x 224; and at most on so many images.
CORRECTION_PIXELS, CORRECTION_IMAGES = 2**20, 128

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
    weight_scales: Images | None = None
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


# --- which modules ---------------------------------------------------------------------------


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
        matched, wrong = named.get(entry, set()), ""
        try:
            matched = matched or {name for name in modules if re.search(entry, name)}
        except re.error as error:
            wrong = f" ({error})"
        if not matched:
            raise UsageError(
                f"The scope '{entry}' is neither {' nor '.join(SCOPES)} nor a regular expression "
                f"for a convolution of this network{wrong}.",
                f"Write for instance --scope 'block[34].*fc1': names are like '{[*modules][1]}', "
                "and `van-deploy inspect` lists them.",
            )
        found |= matched
    layers = tuple(name for name in modules if name in found and name not in kept)
    if not layers:
        raise UsageError(
            f"The scope '{', '.join(scope)}' holds nothing that is not kept in higher precision.",
            "Ask for a larger scope, such as --scope all, or name less with --keep.",
        )
    return layers


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
    model(torch.zeros(1, channels, *height_width(size)))
    for handle in handles:
        handle.remove()
    return found


# --- with which numbers ----------------------------------------------------------------------


def histogram_tensors(network: RebuiltVan, layers: Collection[str], target: str) -> set[str]:
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
) -> QuantizationPlan:
    """Return the plan with every scale by ``method``.

    Args:
        equalized: the network, and how its tensors differ from those of ``ranges``.
        ranges: of the network before, with :func:`histogram_tensors` counted.
        layers: what is quantised, from :func:`layers_in_scope`.
        target: ``tensorrt``, or ``cpu``: ONNX Runtime's integer kernels want the outputs
            rounded, too, and the gates between quantised convolutions.
        method: how activation scales are read from the ranges.
    """
    network, affines = equalized.network, equalized.affines

    @functools.cache
    def scale_of(tensor: str) -> Quantizer:
        lowest = GELU_ENDS if _BEFORE_GELU.search(tensor) else -np.inf
        return unsigned(ranges[tensor], method, affines.get(tensor, UNCHANGED), lowest)

    chosen: dict[str, LayerPlan] = {}
    for name in layers:
        tensor, (weight, bias) = network.reads[name], parameters(network, name)
        if target == "tensorrt":
            affine = equalized.inserted.get(name) or affines.get(tensor, UNCHANGED)
            scale = symmetric(ranges[tensor], method, affine)
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


def parameters(network: RebuiltVan, name: str) -> tuple[Images, Images]:
    """Return a convolution's weight ``(O, ...)`` and bias ``(O,)``, 0 where it has none."""
    module = cast("nn.Conv2d", network.model.get_submodule(name))
    bias = torch.zeros(len(module.weight)) if module.bias is None else module.bias
    return module.weight.detach().contiguous().numpy(), bias.detach().numpy()


def _gates(layers: Collection[str]) -> list[str]:
    """Return the multiplications between two quantised convolutions."""
    attentions = [name.removesuffix(".proj_2") for name in layers if name.endswith(".proj_2")]
    gates = [f"{attention}.spatial_gating_unit" for attention in attentions]
    return [gate for gate in gates if f"{gate}.conv1" in layers]


# --- the network as planned ------------------------------------------------------------------


@contextlib.contextmanager
def quantizing(plan: QuantizationPlan, *only: str) -> Iterator[nn.Module]:
    """Give the plan's network while its layers round; afterwards it is as before.

    Args:
        plan: whose network runs.
        only: of its layers; all by default.
    """
    with contextlib.ExitStack() as stack:
        for name in only or plan.layers:
            layer, module = plan.layers[name], plan.network.model.get_submodule(name)
            before = lambda _m, args, q=layer.input: _rounded(args[0], q)  # noqa: E731
            stack.callback(module.register_forward_pre_hook(before).remove)
            if layer.output is not None:
                after = lambda _m, _a, y, q=layer.output: _rounded(y, q)  # noqa: E731
                stack.callback(module.register_forward_hook(after).remove)
            if layer.weight_scales is not None:
                weight = cast("nn.Parameter", module.weight)
                integers = torch.from_numpy(rounded(weight.numpy(), layer.weight_scales))
                shape = (-1, *(1,) * (weight.ndim - 1))
                scales = torch.from_numpy(layer.weight_scales).reshape(shape)
                stack.callback(setattr, module, "weight", weight)
                module.weight = nn.Parameter(integers * scales, False)
        yield plan.network.model


def logits(plan: QuantizationPlan, images: Images, *only: str, batch: int = 16) -> Images:
    """Return the logits ``(N, K)`` of ``images (N, C, H, W)``, rounding ``only`` those layers.

    Of a backbone, the sketches of its maps.
    """
    config, (height, width) = plan.network.model.config, images.shape[2:]
    outputs = OutputLayout.of(config, (height, width))
    pieces = []
    with quantizing(plan, *only) as model, torch.inference_mode():
        for start in range(0, len(images), batch):
            found = model(_channels_last(images[start : start + batch]))
            found = found if isinstance(found, tuple) else (found,)
            named = {n: y.numpy() for n, y in zip(config.output_names, found, strict=True)}
            pieces.append(outputs.rows(named))
    return np.concatenate(pieces)


@torch.no_grad()
def correct_biases(plan: QuantizationPlan, images: Images) -> QuantizationPlan:
    """Return ``plan`` with the mean error of each layer's output taken out in its bias.

    Empirical bias correction (arXiv 1906.04721, section 4.2): layer after layer, so that
    each also answers for what the ones before it still get wrong.

    Args:
        plan: it is not changed.
        images: ``(N, C, S, S)``, normalised; see :data:`CORRECTION_PIXELS`.
    """
    count = max(min(CORRECTION_IMAGES, CORRECTION_PIXELS // images[0, 0].size), 1)
    given = _channels_last(images[:count])
    model = copy.deepcopy(plan.network.model)
    plan = replace(plan, network=replace(plan.network, model=model))
    wanted: dict[str, Tensor] = {}

    def remember(name: str, _conv: nn.Conv2d, output: Tensor) -> None:
        wanted[name] = _mean(output)

    def correct(name: str, conv: nn.Conv2d, output: Tensor) -> Tensor:
        missing = (wanted[name] - _mean(output)).float()
        bias = missing if conv.bias is None else conv.bias + missing
        conv.bias = nn.Parameter(bias, False)
        return output + missing.reshape(1, -1, *(1,) * (output.ndim - 2))

    for step, running in ((remember, contextlib.nullcontext()), (correct, quantizing(plan))):
        with contextlib.ExitStack() as stack:
            for name in plan.convolutions:
                hook = lambda conv, _a, y, n=name, step=step: step(n, conv, y)  # noqa: E731
                stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
            with running:  # whose own hooks come after these: what is rounded is corrected already
                model(given)
    return plan


def _mean(output: Tensor) -> Tensor:
    return output.transpose(0, 1).flatten(1).double().mean(dim=1)


def _channels_last(images: Images) -> Tensor:
    return torch.from_numpy(images).contiguous(memory_format=torch.channels_last)


def _rounded(x: Tensor, quantizer: Quantizer) -> Tensor:
    """Return ``x (N, C, ...)`` through the integers and back."""
    scale = torch.from_numpy(np.array(quantizer.scale, np.float32))
    if scale.ndim:
        scale = scale.reshape(1, -1, *(1,) * (x.ndim - 2))
    return (x / scale).round_().clamp_(*quantizer.limits).mul_(scale)
