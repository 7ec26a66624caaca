"""Models, bundles and artefacts described without being run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

__all__ = ["artefacts_described", "model_described"]

ENGINES = (".plan", ".engine", ".trt")


def model_described(model: str, image_size: int | None = None) -> dict[str, Any]:
    """Return everything known of a bundle, of a variant, or of a checkpoint's weights.

    Raises:
        UsageError: there is no such variant.
        InputError: the checkpoint or the bundle cannot be read.
    """
    from van_deploy.bundle import MANIFEST, Bundle
    from van_deploy.model.variants import VARIANTS

    if Path(model).is_dir() and (Path(model) / MANIFEST).exists():
        bundle = Bundle.open(model)
        return {
            "kind": "bundle",
            "path": str(bundle.path),
            "problems": bundle.problems(),
            "sizes": bundle.sizes(),
            "manifest": bundle.manifest,
        }
    named = [v for v in VARIANTS.values() if model in (v.name, *v.aliases)]
    return _variant(named[0].name, image_size) if named else _weights(model, image_size)


def _variant(name: str, image_size: int | None) -> dict[str, Any]:
    from van_deploy.model.hub import locate_weights
    from van_deploy.model.preprocess import OFFICIAL
    from van_deploy.model.variants import VARIANTS

    variant = VARIANTS[name]
    size = image_size or OFFICIAL.image_size
    here = locate_weights(variant)
    return {
        "kind": "variant",
        "name": variant.name,
        "also called": list(variant.aliases),
        **_counted(variant.config, size),
        "preprocessing": OFFICIAL,
        "top1_percent": variant.top1,
        "weights": str(variant.weights) if variant.weights else None,
        "weights_note": variant.weights_note,
        "here": str(here) if here else None,
    }


def _weights(spec: str, image_size: int | None) -> dict[str, Any]:
    from van_deploy.model.architecture import variant_of
    from van_deploy.model.checkpoint import load_van

    loaded = load_van(spec, offline=True)
    return {
        "kind": "weights",
        "name": loaded.name,
        "variant": variant_of(loaded.config),
        **_counted(loaded.config, image_size or loaded.preprocessing.image_size),
        "preprocessing": loaded.preprocessing,
        "source": asdict(loaded.source),
        "class_names": list(loaded.class_names) if loaded.class_names else None,
    }


def _counted(config: Any, size: int) -> dict[str, Any]:
    return {
        "architecture": {**asdict(config), "lka_dilation": config.lka_dilation},
        "parameters": config.parameter_count(),
        "multiply_adds": config.mac_count(size),
        "multiply_adds_at": size,
    }


def artefacts_described(artefact: Path, *, trust_engine: bool = False) -> list[dict[str, Any]]:
    """Return the description of one file, or of everything in a bundle that can be run.

    ``trust_engine`` is that of :func:`~van_deploy.engine.inspect.describe_engine`.

    Raises:
        InputError: there is nothing to describe, or it cannot be read.
    """
    from van_deploy.bundle import Bundle
    from van_deploy.errors import InputError
    from van_deploy.graph.inspect import describe_onnx

    if artefact.is_dir():
        bundle = Bundle.open(artefact)
        files = [bundle.path / artefact.file for artefact in bundle.artefacts.values()]
        return [
            one for file in files for one in artefacts_described(file, trust_engine=trust_engine)
        ]
    if not artefact.exists():
        raise InputError(f"There is no file '{artefact}'.", "Check the path.")
    if artefact.suffix in ENGINES:
        from van_deploy.engine.inspect import describe_engine

        return [describe_engine(artefact, trust_engine=trust_engine)]
    if artefact.suffix == ".onnx":
        return [describe_onnx(artefact)]
    raise InputError(
        f"'{artefact}' is neither an ONNX file nor an engine.",
        f"Give a .onnx or {', '.join(ENGINES)} file or a bundle; "
        f"a checkpoint is shown by `van-deploy info {artefact}`.",
    )
