"""What the commands that judge a bundle have in common: opening it and what it is judged by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from van_deploy.bundle import Bundle
    from van_deploy.checks.opened import Execution
    from van_deploy.checks.pictures import Pictures
    from van_deploy.model.checkpoint import LoadedVan
    from van_deploy.recipe import GateSettings

__all__ = [
    "ArtefactNames",
    "BundlePath",
    "RecipeName",
    "RequireSignature",
    "RunnerName",
    "TrustEngine",
    "WeightsPath",
    "execution_by",
    "gates_of",
    "open_bundle",
    "opened",
    "pictures_for",
]

BundlePath = Annotated[Path, typer.Argument(help="The bundle, made by `van-deploy export`.")]
WeightsPath = Annotated[
    Path | None,
    typer.Option(help="Where the original weights are now, if they have moved."),
]
RunnerName = Annotated[
    str,
    typer.Option(help="What runs ONNX artefacts: ort-cpu, ort-cuda or ort-tensorrt."),
]
TrustEngine = Annotated[
    bool,
    typer.Option(
        "--trust-engine",
        help="Run an engine whose sidecar is gone. An engine is code: only one you built yourself.",
    ),
]
ArtefactNames = Annotated[
    list[str] | None,
    typer.Option("--artefact", help="Which one; may be repeated. All by default."),
]
RequireSignature = Annotated[
    Path | None,
    typer.Option(
        metavar="PUBLICKEY",
        help="Refuse the bundle unless it is whole and signed with this key (a PEM file).",
    ),
]
RecipeName = Annotated[
    str, typer.Option(help="Recipe whose \\[gates] apply; the defaults without one.")
]


def open_bundle(path: Path, require_signature: Path | None = None) -> Bundle:
    """Return the bundle at ``path``, after checking its signature where one is required.

    Raises:
        SignatureError: it has none, one of another key, or was changed since.
        BundleError: there is no bundle.
    """
    from van_deploy.bundle import Bundle

    if require_signature is None:
        return Bundle.open(path)
    from van_deploy.signing import signed_bundle
    from van_deploy.signing_keys import public_key_from

    return signed_bundle(path, public_key_from(require_signature))[0]


def opened(
    bundle: Path, weights: Path | None, require_signature: Path | None = None
) -> tuple[Bundle, LoadedVan]:
    """Return the bundle and the PyTorch network it was made from."""
    found = open_bundle(bundle, require_signature)
    from van_deploy.bundle.original import original_network

    return found, original_network(found, weights)


def execution_by(runner: str, trust_engine: bool = False) -> Execution:
    """Return what runs the artefacts."""
    from van_deploy.checks.opened import Execution

    return Execution(runner, trust_engine)


def gates_of(recipe: str) -> GateSettings | None:
    """Return the gates of the recipe called that, or None for the defaults."""
    from van_deploy.recipe import recipe_named

    return recipe_named(recipe).gates if recipe else None


def pictures_for(
    bundle: Bundle, loaded: LoadedVan, images: Path | None, count: int | None, least: int = 32
) -> Pictures:
    """Return pictures to judge on: at least one of the bundle's largest batches of them.

    Raises:
        UsageError: fewer were asked for than the largest batch has.
    """
    from van_deploy.checks.pictures import pictures_to_check
    from van_deploy.errors import UsageError

    largest = bundle.manifest.batch.max
    if count is not None and count < largest:
        raise UsageError(
            f"{count} images are fewer than the bundle's largest batch, {largest}.",
            f"Give --count {largest} or more.",
        )
    wanted = count or max(least, largest)
    return pictures_to_check(loaded.name, loaded.preprocessing, wanted, images)
