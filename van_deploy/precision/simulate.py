"""The quantised network as a PyTorch module: to look at what rounding does, and to correct it.

Rounding is done in float32, as an engine or an integer kernel would do it: a Q/DQ pair
before every quantised layer, behind it too where the target rounds outputs, and weights
that are their integers times their scales.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from van_deploy.checks.samples import Outputs
from van_deploy.precision.plan import QuantizationPlan
from van_deploy.precision.scales import Quantizer, rounded

CORRECTION_PIXELS = 2**20
"""Biases are corrected on images of so many pixels together, held in memory at once: 20 of
224 x 224; at most :data:`CORRECTION_IMAGES`."""

CORRECTION_IMAGES = 128

Images = npt.NDArray[np.float32]


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
                stack.callback(setattr, module, "weight", weight)
                module.weight = nn.Parameter(_dequantized(weight, layer.weight_scales), False)
        yield plan.network.model


def logits(plan: QuantizationPlan, images: Images, *only: str, batch: int = 16) -> Images:
    """Return the logits ``(N, K)`` of ``images (N, C, H, W)``, rounding ``only`` those layers.

    Of a backbone, the sketches of its maps.
    """
    config, (height, width) = plan.network.model.config, images.shape[2:]
    outputs = Outputs.of(config, (height, width))
    pieces = []
    with quantizing(plan, *only) as model, torch.inference_mode():
        for start in range(0, len(images), batch):
            found = model(_channels_last(images[start : start + batch]))
            found = found if isinstance(found, tuple) else (found,)
            named = {n: y.numpy() for n, y in zip(config.output_names, found, strict=True)}
            pieces.append(outputs.rows(named))
    return np.concatenate(pieces)


@torch.no_grad()
def bias_corrected(plan: QuantizationPlan, images: Images) -> QuantizationPlan:
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
    convs = {name: cast("nn.Conv2d", model.get_submodule(name)) for name in plan.convolutions}
    wanted: dict[str, Tensor] = {}

    def remember(name: str, output: Tensor) -> None:
        wanted[name] = _mean(output)

    def correct(name: str, output: Tensor) -> Tensor:
        missing = (wanted[name] - _mean(output)).float()
        bias = convs[name].bias
        convs[name].bias = nn.Parameter(missing if bias is None else bias + missing, False)
        return output + missing.reshape(1, -1, *(1,) * (output.ndim - 2))

    for hook, running in ((remember, contextlib.nullcontext()), (correct, quantizing(plan))):
        handles = [
            conv.register_forward_hook(lambda _m, _a, y, name=name, hook=hook: hook(name, y))
            for name, conv in convs.items()
        ]
        with running:  # whose own hooks come after these: what is rounded is corrected already
            model(given)
        for handle in handles:
            handle.remove()
    return plan


def _mean(output: Tensor) -> Tensor:
    return output.transpose(0, 1).flatten(1).double().mean(dim=1)


def _channels_last(images: Images) -> Tensor:
    return torch.from_numpy(images).contiguous(memory_format=torch.channels_last)


def _dequantized(weight: Tensor, scales: npt.NDArray[np.float32]) -> Tensor:
    integers = torch.from_numpy(rounded(weight.numpy(), scales))
    return integers * torch.from_numpy(scales).reshape(-1, *(1,) * (weight.ndim - 1))


def _rounded(x: Tensor, quantizer: Quantizer) -> Tensor:
    """Return ``x (N, C, ...)`` through the integers and back."""
    scale = torch.from_numpy(np.array(quantizer.scale, np.float32))
    if scale.ndim:
        scale = scale.reshape(1, -1, *(1,) * (x.ndim - 2))
    return (x / scale).round_().clamp_(*quantizer.limits).mul_(scale)
