"""``van-deploy info``: one model or bundle in full."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from van_deploy.cli.console import AsJson, emit

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["info", "informed"]

MOST_PROBLEMS = 20  # told one by one; --json has them all


def info(
    model: Annotated[
        str, typer.Argument(help="A variant, a checkpoint, van_digits, or a bundle's folder.")
    ],
    image_size: Annotated[
        int | None, typer.Option(help="Side of the input the work is counted for, in pixels.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show one model or bundle in full. Nothing is downloaded.

    Example: van-deploy info ./mine.pth
    """
    emit(informed(model, image_size), as_json, _table)


def informed(model: str, image_size: int | None = None) -> dict[str, Any]:
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


def _table(result: dict[str, Any]) -> RenderableType:
    return _bundle_table(result) if result["kind"] == "bundle" else _model_table(result)


def _bundle_table(result: dict[str, Any]) -> RenderableType:
    from van_deploy.report.bundle_view import (
        agreement_table,
        artefacts_table,
        model_facts,
        proofs_table,
    )
    from van_deploy.report.tables import facts_table, notes, stack

    manifest = result["manifest"]
    found = result["problems"]
    more = [f"and {len(found) - MOST_PROBLEMS:,} more"] if len(found) > MOST_PROBLEMS else []
    problems = [*found[:MOST_PROBLEMS], *more]
    return stack(
        facts_table({"bundle": result["path"], "written": manifest.written}),
        model_facts(manifest),
        proofs_table(manifest.checks),
        agreement_table(manifest.checks["agreement"]),
        artefacts_table(manifest, result["sizes"]),
        notes(problems, "FAIL") if problems else notes(["every file is the manifest's"], "PASS"),
        notes(manifest.weights.notes, "NOTE") if manifest.weights.notes else None,
        facts_table(manifest.versions, "Made with"),
    )


def _model_table(result: dict[str, Any]) -> RenderableType:
    from van_deploy.report.bundle_view import preprocessing_text
    from van_deploy.report.tables import count_text, facts_table, notes, stack

    config, preprocessing = result["architecture"], result["preprocessing"]
    k0, k1 = config["lka_kernels"]
    facts: dict[str, object] = {
        "model": result["name"],
        "variant": result.get("variant", result["name"]) or "none of the published ones",
        "widths": " ".join(map(str, config["embed_dims"])),
        "depths": " ".join(map(str, config["depths"])),
        "MLP ratios": " ".join(f"{ratio:g}" for ratio in config["mlp_ratios"]),
        "kernels": f"{k0}x{k0}, then {k1}x{k1} with dilation {config['lka_dilation']}",
        "classes": config["num_classes"],
        "parameters": f"{result['parameters']:,}",
        "multiply-adds": f"{count_text(result['multiply_adds'])} "
        f"at {result['multiply_adds_at']} x {result['multiply_adds_at']}",
        "preprocessing": preprocessing_text(preprocessing),
        "": f"from {preprocessing.source}",
    }
    if result["kind"] == "variant":
        facts["top-1"] = (
            f"{result['top1_percent']} % (published)" if result["top1_percent"] else None
        )
        facts["weights"] = result["weights"] or result["weights_note"]
        facts["on this machine"] = result["here"]
        return facts_table(facts)
    source = result["source"]
    facts["weights"] = f"{source['path']} ({source['format']}, under {source['container']})"
    facts["sha256"] = source["sha256"]
    names = result["class_names"]
    facts["class names"] = ", ".join([*names[:8], "..."][: len(names)]) if names else None
    return stack(facts_table(facts), notes(source["notes"], "NOTE") if source["notes"] else None)
