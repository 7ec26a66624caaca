"""The kernels' functions in plain PyTorch: the fallback, and the reference in tests.

Shapes, layouts and arguments are those of the kernels, on any device and in any float type.
"""

from torch import Tensor
from torch.nn import functional


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, dilation: int = 1, gelu: bool = False
) -> Tensor:
    """Return the result of :func:`van_deploy.kernels.convolutions.depthwise`."""
    side, channels = weight.shape[0], x.shape[-1]
    y = functional.conv2d(
        x.permute(0, 3, 1, 2),
        weight.to(x.dtype).permute(2, 0, 1)[:, None],
        bias.to(x.dtype),
        padding=dilation * (side // 2),
        dilation=dilation,
        groups=channels,
    ).permute(0, 2, 3, 1)
    return (functional.gelu(y) if gelu else y).contiguous()


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor, epilogue: str = "none", other: Tensor | None = None
) -> Tensor:
    """Return the result of :func:`van_deploy.kernels.convolutions.pointwise`."""
    y = functional.linear(x, weight, bias.to(x.dtype))
    if other is not None:
        return y * other if epilogue == "multiply" else y + other
    return functional.gelu(y) if epilogue == "gelu" else y


def patches(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """Return the result of :func:`van_deploy.kernels.convolutions.patches`."""
    y = functional.conv2d(
        x.to(weight.dtype),
        weight.permute(3, 2, 0, 1),
        bias.to(weight.dtype),
        stride=stride,
        padding=weight.shape[0] // 2,
    )
    return y.permute(0, 2, 3, 1).contiguous()


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """Return the result of :func:`van_deploy.kernels.norm.layer_norm`."""
    return functional.layer_norm(x, scale.shape, scale.to(x.dtype), shift.to(x.dtype), eps)
