"""Visual Attention Network checkpoints, turned into checked ONNX files and engines.

Importing this package imports nothing heavy: PyTorch and the run times are
loaded by the modules that use them.
"""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
