"""Plan which layers are quantised with which scales, and simulate the plan in PyTorch.

The plan is complete before any file is written. To measure and to correct the quantisation error,
the network runs as a PyTorch module with fake quantisation: in float32, with a Q/DQ pair before
every quantised layer and, where the target quantises outputs, after it, and with weights replaced
by their integers times their scales.
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
from van_deploy.graph.fold import RewrittenVan
from van_deploy.precision import scales

SCOPES = ("pointwise", "deep", "all")
# GELU of any smaller value is within 1.3e-4 of zero, so the unsigned range starts here.
GELU_LOWEST = -4.0

_SHALLOW = re.compile(r"(patch_embed1|block1)\.")
_IN_HEAD = re.compile(r"head\b")  # a linear layer, or several ones
_BEFORE_ADD = re.compile(r"(patch_embed\d\.proj|proj_2|fc2)$")
_BEFORE_GELU = re.compile(r"(proj_1|dwconv\.dwconv)$")


@dataclass(frozen=True)
class LayerPlan:
    """Quantisation of one module.

    Attributes:
        input: quantiser of its input.
        weight_scales: ``(O,)``, one per output channel; None for the gate, a multiplication.
        output: quantiser of its output, or None.
    """

    input: scales.Quantizer
    weight_scales: scales.Images | None = None
    output: scales.Quantizer | None = None


@dataclass(frozen=True)
class QuantizationPlan:
    """A network and the quantisation of its layers.

    Attributes:
        network: equalised and bias-corrected, in float32.
        layers: by module path, in execution order.
        inserted: by module, the affine (a Mul and an Add) before its input that ``network`` has in
            addition to the graph it was rebuilt from.
        affines: by tensor, its difference from the tensor of that graph.
    """

    network: RebuiltVan
    layers: Mapping[str, LayerPlan] = field(default_factory=dict)
    inserted: dict[str, scales.ChannelAffine] = field(default_factory=dict)
    affines: dict[str, scales.ChannelAffine] = field(default_factory=dict)

    @property
    def convolutions(self) -> tuple[str, ...]:
        """Paths of the layers with weights."""
        return tuple(n for n, plan in self.layers.items() if plan.weight_scales is not None)

    def without(self, names: Collection[str]) -> QuantizationPlan:
        """Return the plan without some convolutions and the gates next to them."""
        convolutions = [name for name in self.convolutions if name not in names]
        remaining = {*convolutions, *_gates(convolutions)}
        return replace(self, layers={n: p for n, p in self.layers.items() if n in remaining})


# --- layer selection -------------------------------------------------------------------------


def layers_in_scope(
    model: nn.Module, scope: Sequence[str], kept: Collection[str] = ()
) -> tuple[str, ...]:
    """Return the convolutions (and the head, if a regular expression matches it) to quantise.

    Args:
        model: the network.
        scope: ``pointwise`` (the 1x1 convolutions), ``all`` (every convolution, not the
            head), ``deep`` (every convolution except those of the stem and of the
            first stage), or regular expressions searched for in module paths.
        kept: modules to exclude.

    Raises:
        UsageError: an expression is invalid or matches nothing, or no layer remains.
    """
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    convs = {n: m for n, m in modules.items() if isinstance(m, nn.Conv2d)}
    presets = {
        "pointwise": {n for n, m in convs.items() if m.kernel_size == (1, 1) and m.groups == 1},
        "deep": {name for name in convs if not _SHALLOW.match(name)},
        "all": set(convs),
    }
    selected: set[str] = set()
    for entry in scope:
        matched, invalid = presets.get(entry, set()), ""
        try:
            matched = matched or {name for name in modules if re.search(entry, name)}
        except re.error as error:
            invalid = f" ({error})"
        if not matched:
            raise UsageError(
                f"The scope '{entry}' is none of {', '.join(SCOPES)}, and as a regular expression "
                f"it matches no convolution of this network{invalid}.",
                f"Use for instance --scope 'block[34].*fc1': names look like '{[*modules][1]}', "
                "and `van-deploy inspect` lists them.",
            )
        selected |= matched
    layers = tuple(name for name in modules if name in selected and name not in kept)
    if not layers:
        raise UsageError(
            f"All layers of the scope '{', '.join(scope)}' are kept in higher precision.",
            "Use a larger scope, such as --scope all, or fewer modules in --keep.",
        )
    return layers


@torch.inference_mode()
def multiply_adds(model: RewrittenVan, size: ImageSize) -> dict[str, int]:
    """Return the multiply-adds of each convolution and of the head, for one image."""
    counts: dict[str, int] = {}
    handles = [
        module.register_forward_hook(
            lambda m, _a, y, name=name: counts.update({name: m.weight[0].numel() * y[0].numel()})
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    model(torch.zeros(1, model.config.in_chans, *height_width(size)))
    for handle in handles:
        handle.remove()
    return counts


# --- scales ----------------------------------------------------------------------------------


def histogram_tensors(network: RebuiltVan, layers: Collection[str], target: str) -> set[str]:
    """Return the tensors whose histograms determine the scales of ``layers``."""
    tensors = {network.reads[name] for name in layers}
    if target == "cpu":
        tensors |= {n for n in layers if not (_IN_HEAD.match(n) or _BEFORE_ADD.search(n))}
        tensors |= {network.reads[f"{gate}.conv0"] for gate in _gates(layers)}
    return tensors


def make_plan(
    equalized: QuantizationPlan,
    ranges: Mapping[str, scales.ChannelRange],
    layers: Sequence[str],
    *,
    target: str = "tensorrt",
    method: scales.Method = "mse",
) -> QuantizationPlan:
    """Return ``equalized`` with ``layers`` quantised, and scales chosen by ``method``.

    Args:
        equalized: the network, and how its tensors differ from those of ``ranges``.
        ranges: of the original network, with histograms of :func:`histogram_tensors`.
        layers: to quantise, from :func:`layers_in_scope`.
        target: ``tensorrt``, or ``cpu``: ONNX Runtime's integer kernels also need quantised
            outputs, and quantised gates between quantised convolutions.
        method: for activation scales.
    """
    network, affines = equalized.network, equalized.affines

    @functools.cache
    def quantizer(tensor: str) -> scales.Quantizer:
        lowest = GELU_LOWEST if _BEFORE_GELU.search(tensor) else -np.inf
        return scales.unsigned_quantizer(
            ranges[tensor], method, affines.get(tensor, scales.IDENTITY), lowest
        )

    plans: dict[str, LayerPlan] = {}
    for name in layers:
        tensor, (weight, bias) = network.reads[name], parameters(network, name)
        if target == "tensorrt":
            affine = equalized.inserted.get(name) or affines.get(tensor, scales.IDENTITY)
            source = scales.symmetric_quantizer(ranges[tensor], method, affine)
            plans[name] = LayerPlan(source, scales.weight_scales(weight))
            continue
        source, output = quantizer(tensor), None
        if _BEFORE_ADD.search(name):
            output = scales.per_channel_quantizer(ranges[name], affines.get(name, scales.IDENTITY))
        elif not _IN_HEAD.match(name):
            output = quantizer(name)
        depthwise = getattr(network.model.get_submodule(name), "groups", 1) > 1
        weights = scales.cpu_weight_scales(weight, bias, source.scale, depthwise=depthwise)
        plans[name] = LayerPlan(source, weights, output)
    if target == "cpu":
        gates = _gates(layers)
        plans |= {gate: LayerPlan(quantizer(network.reads[f"{gate}.conv0"])) for gate in gates}
    return replace(equalized, layers=plans)


def parameters(network: RebuiltVan, name: str) -> tuple[scales.Images, scales.Images]:
    """Return a convolution's weight ``(O, ...)`` and bias ``(O,)``, zeros without a bias."""
    module = cast("nn.Conv2d", network.model.get_submodule(name))
    bias = torch.zeros(len(module.weight)) if module.bias is None else module.bias
    return module.weight.detach().contiguous().numpy(), bias.detach().numpy()


def _gates(layers: Collection[str]) -> list[str]:
    """Return the gates (multiplications) between two quantised convolutions."""
    attentions = [name.removesuffix(".proj_2") for name in layers if name.endswith(".proj_2")]
    gates = [f"{attention}.spatial_gating_unit" for attention in attentions]
    return [gate for gate in gates if f"{gate}.conv1" in layers]


# --- simulation ------------------------------------------------------------------------------


@contextlib.contextmanager
def fake_quantized(plan: QuantizationPlan, *only: str) -> Iterator[nn.Module]:
    """Yield the plan's network with fake quantisation, which is removed on exit.

    Args:
        plan: contains the network.
        only: layers to quantise (default: all).
    """
    with contextlib.ExitStack() as stack:
        for name in only or plan.layers:
            layer, module = plan.layers[name], plan.network.model.get_submodule(name)
            before = lambda _m, args, q=layer.input: _fake_quantize(args[0], q)  # noqa: E731
            stack.callback(module.register_forward_pre_hook(before).remove)
            if layer.output is not None:
                after = lambda _m, _a, y, q=layer.output: _fake_quantize(y, q)  # noqa: E731
                stack.callback(module.register_forward_hook(after).remove)
            if layer.weight_scales is not None:
                weight = cast("nn.Parameter", module.weight)
                integers = torch.from_numpy(
                    scales.quantize_weight(weight.numpy(), layer.weight_scales)
                )
                shape = (-1, *(1,) * (weight.ndim - 1))
                factors = torch.from_numpy(layer.weight_scales).reshape(shape)
                stack.callback(setattr, module, "weight", weight)
                module.weight = nn.Parameter(integers * factors, False)
        yield plan.network.model


def logits(plan: QuantizationPlan, images: scales.Images, *only: str) -> scales.Images:
    """Return the logits ``(N, K)`` of ``images (N, C, H, W)`` with ``only`` some layers quantised.

    A backbone returns the sketches of its feature maps.
    """
    config, (height, width) = plan.network.model.config, images.shape[2:]
    outputs = OutputLayout.of(config, (height, width))
    batches = []
    with fake_quantized(plan, *only) as model, torch.inference_mode():
        for inputs in _channels_last(images).split(16):
            results = model(inputs)
            results = results if isinstance(results, tuple) else (results,)
            named = {n: y.numpy() for n, y in zip(config.output_names, results, strict=True)}
            batches.append(outputs.rows(named))
    return np.concatenate(batches)


@torch.no_grad()
def correct_biases(plan: QuantizationPlan, images: scales.Images) -> QuantizationPlan:
    """Return ``plan`` with the mean error of each layer's output subtracted from its bias.

    Empirical bias correction (arXiv 1906.04721, section 4.2) in execution order, so that each
    layer also compensates for the remaining error of the layers before it.

    Args:
        plan: stays unchanged.
        images: ``(N, C, S, S)``, normalised; all in memory at once.
    """
    inputs = _channels_last(images)
    model = copy.deepcopy(plan.network.model)
    plan = replace(plan, network=replace(plan.network, model=model))
    means: dict[str, Tensor] = {}

    def record(name: str, _conv: nn.Conv2d, output: Tensor) -> None:
        means[name] = _channel_mean(output)

    def correct(name: str, conv: nn.Conv2d, output: Tensor) -> Tensor:
        error = (means[name] - _channel_mean(output)).float()
        bias = error if conv.bias is None else conv.bias + error
        conv.bias = nn.Parameter(bias, False)
        return output + error.reshape(1, -1, *(1,) * (output.ndim - 2))

    for step, context in ((record, contextlib.nullcontext()), (correct, fake_quantized(plan))):
        with contextlib.ExitStack() as stack:
            for name in plan.convolutions:
                hook = lambda conv, _a, y, n=name, step=step: step(n, conv, y)  # noqa: E731
                stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
            with context:  # its hooks run after these, so outputs are quantised after correction
                model(inputs)
    return plan


def _channel_mean(output: Tensor) -> Tensor:
    return output.transpose(0, 1).flatten(1).double().mean(dim=1)


def _channels_last(images: scales.Images) -> Tensor:
    return torch.from_numpy(images).contiguous(memory_format=torch.channels_last)


def _fake_quantize(x: Tensor, quantizer: scales.Quantizer) -> Tensor:
    """Return ``x (N, C, ...)`` quantised and dequantised."""
    scale = torch.from_numpy(np.array(quantizer.scale, np.float32))
    if scale.ndim:
        scale = scale.reshape(1, -1, *(1,) * (x.ndim - 2))
    return (x / scale).round_().clamp_(*quantizer.limits).mul_(scale)
