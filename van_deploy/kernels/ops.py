"""The kernels, with the same names as their PyTorch versions in :mod:`.reference`."""

from van_deploy.kernels.convolutions import depthwise, patches, pointwise
from van_deploy.kernels.norm import layer_norm

__all__ = ["depthwise", "layer_norm", "patches", "pointwise"]
