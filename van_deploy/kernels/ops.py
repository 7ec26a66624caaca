"""The kernels, under the names that :mod:`van_deploy.kernels.reference` has them in PyTorch."""

from van_deploy.kernels.depthwise import depthwise
from van_deploy.kernels.norm import layer_norm
from van_deploy.kernels.patch import patches
from van_deploy.kernels.pointwise import pointwise

__all__ = ["depthwise", "layer_norm", "patches", "pointwise"]
