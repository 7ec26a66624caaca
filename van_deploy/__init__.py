"""Exports Visual Attention Networks to verified ONNX files and engines.

::

    import van_deploy as vd

    bundle = vd.export("van_b1", output="dist/b1")
    bundle.quantize(precision="fp16")
    if not bundle.verify():
        raise SystemExit("an artifact differs from the network")

Importing this package is fast: each name is imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from van_deploy.api import Bundle, Exported, export, open_bundle, run_recipe
    from van_deploy.config import Recipe
    from van_deploy.documents import plain
    from van_deploy.errors import VanDeployError
    from van_deploy.model.checkpoint import LoadedVan, load_van
    from van_deploy.recipe import read_recipe

__all__ = [
    "Bundle",
    "Exported",
    "LoadedVan",
    "Recipe",
    "VanDeployError",
    "__version__",
    "export",
    "load_van",
    "open_bundle",
    "plain",
    "read_recipe",
    "run_recipe",
]
__version__ = "0.1.0"

_MODULES = ("errors", "documents", "config", "recipe", "api", "model.checkpoint")  # fast first


if not TYPE_CHECKING:  # a type checker would accept every name

    def __getattr__(name: str) -> Any:
        """Import and return a public name."""
        if name in __all__:
            for module_name in _MODULES:
                module = importlib.import_module(f"van_deploy.{module_name}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module 'van_deploy' has no attribute '{name}'")


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
