"""From what a user asked for to a network in evaluation mode.

``load_van("van_b0")``, ``load_van("./mine.pth")``, ``load_van("owner/name")``:
the weights are found, read without running anything in them, renamed to the
official names, checked for sense, and loaded strictly into the architecture
their own shapes describe. What the user should know is in
:attr:`WeightsSource.notes`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from van_deploy.errors import CheckpointError, UsageError
from van_deploy.model.architecture import config_from_state_dict, variant_of
from van_deploy.model.contract import (
    class_names_from,
    is_official,
    layer_norm_eps_from,
    preprocessing_of,
)
from van_deploy.model.files import SUFFIXES, read_weights
from van_deploy.model.hub import Progress
from van_deploy.model.preprocess import OFFICIAL, Preprocessing
from van_deploy.model.random_weights import random_van, sha256_of_state
from van_deploy.model.sources import REPO, Found, find_weights, from_hub, on_disk
from van_deploy.model.state import network_from_state, official_state
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANTS, VanConfig, Variant, variant_named
from van_deploy.model.weights_source import WeightsSource

__all__ = ["EMBEDDED", "LoadedVan", "WeightsSource", "config_from_state_dict", "load_van"]

EMBEDDED = "van_digits"
"""Name of the small trained network inside the package."""

_RANDOM = "random weights: the outputs mean nothing"
_PLAIN_STEMS = {"model", "pytorch_model", "checkpoint", "model_best", "last", "best"}


@dataclass(frozen=True)
class LoadedVan:
    """A network ready to be deployed, and where everything about it came from.

    Attributes:
        name: what to call it and its bundle.
        model: evaluation mode, float32, no gradients.
        config: its architecture.
        source: its weights.
        preprocessing: what its input must have gone through.
        class_names: in the order of the logits, or None if nobody says.
    """

    name: str
    model: VAN
    config: VanConfig
    source: WeightsSource
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None


def load_van(
    spec: str,
    *,
    weights: str | None = None,
    expect_sha256: str | None = None,
    offline: bool = False,
    seed: int = 0,
    container: str | None = None,
    progress: Progress | None = None,
) -> LoadedVan:
    """Return the network a user asked for, its weights loaded strictly.

    Args:
        spec: a variant's name, ``van_digits``, a path to a checkpoint or to a
            folder saved by Transformers, or ``owner/name[:file]`` on the hub.
        weights: for a variant, where its weights come from instead: a path, a
            repository, or ``random``.
        expect_sha256: what the digest of the weights file must be.
        offline: never use the network.
        seed: of random weights.
        container: which state dict to take where a file holds several
            (``state_dict``, ``state_dict_ema``, ``model``, ``model_ema``).
        progress: told how much of a download is here.

    Raises:
        UsageError: the request makes no sense, or a variant has no public weights.
        CheckpointError: the weights cannot be used.
        DownloadError: the weights could not be fetched, or have another digest.

    >>> loaded = load_van("van_b0", weights="random", seed=1)
    >>> loaded.source.format, loaded.config.depths
    ('random', (3, 3, 5, 2))
    """
    expect_sha256 = _digest_asked_for(expect_sha256)
    variant = None if _is_place(spec) or spec == EMBEDDED else variant_named(spec)
    if variant is None and weights is not None:
        raise UsageError(
            f"'{spec}' already says which weights to use, and so does '{weights}'.",
            f"Give one of them; with a variant's name ({', '.join(VARIANTS)}) --weights is free.",
        )
    if spec == EMBEDDED:
        return _embedded(expect_sha256)
    if variant is not None and weights == "random":
        return _random(variant, spec, seed, expect_sha256)
    if variant is not None and weights is None:
        found = _public(variant, offline, expect_sha256, progress)
    else:
        found = find_weights(weights or spec, offline, expect_sha256, progress)
    return _load(spec, variant, found, container)


def _digest_asked_for(digest: str | None) -> str | None:
    if digest is None or re.fullmatch("[0-9a-fA-F]{64}", digest):
        return digest.lower() if digest else None
    raise UsageError(
        f"'{digest}' is no SHA-256.", "Give all 64 hexadecimal digits, as `sha256sum` prints them."
    )


def _is_place(word: str) -> bool:
    """Return whether a word is a path or a repository rather than a variant's name."""
    lowered = word.lower()
    if "/" in word or "\\" in word or lowered.endswith(SUFFIXES):
        return True
    known = {name for v in VARIANTS.values() for name in (v.name, *v.aliases)} | {EMBEDDED}
    return lowered.replace("-", "_") not in known and Path(word).exists()


# --- where the weights come from -----------------------------------------------------------


def _embedded(expect_sha256: str | None) -> LoadedVan:
    """Load the network inside the package, which says everything about itself."""
    from van_deploy.model.embedded import embedded_files

    found = on_disk(embedded_files().weights, expect_sha256)
    loaded = _load(EMBEDDED, None, found, None)
    source = replace(loaded.source, format="embedded")
    return replace(loaded, name=EMBEDDED, source=source)


def _random(variant: Variant, spec: str, seed: int, expect_sha256: str | None) -> LoadedVan:
    if expect_sha256 is not None:
        raise UsageError(
            "Random weights have no digest to expect.", "Leave out the digest, or the weights."
        )
    model = random_van(variant.config, seed)
    source = WeightsSource(
        spec=spec,
        path="",
        format="random",
        sha256=sha256_of_state(model.state_dict()),
        seed=seed,
        container="top level",
        notes=(_RANDOM,),
    )
    preprocessing = replace(OFFICIAL, source="the official VAN weights' (these ones are random)")
    return LoadedVan(variant.name, model, variant.config, source, preprocessing, None)


def _public(
    variant: Variant, offline: bool, expect_sha256: str | None, progress: Progress | None
) -> Found:
    if variant.weights is None:
        raise UsageError(
            f"{variant.name} has no public ImageNet-1K weights on the hub.",
            f"{variant.weights_note[:1].upper()}{variant.weights_note[1:]}.",
        )
    return from_hub(
        variant.weights.repo_id, variant.weights.filename, offline, expect_sha256, progress
    )


# --- from a file to a network --------------------------------------------------------------


def _load(spec: str, variant: Variant | None, found: Found, container: str | None) -> LoadedVan:
    file = read_weights(found.path, container=container)
    state = official_state(file.tensors)
    eps = layer_norm_eps_from(found.config)
    model, config = network_from_state(state.tensors, layer_norm_eps=eps)
    notes = [*found.notes, *state.notes]
    if file.others and container is None:
        averaged = " averaged" if file.container.endswith("_ema") else ""
        notes.append(
            f"the file also holds {', '.join(file.others)}: the{averaged} weights under "
            f"{file.container} were taken; choose with --container"
        )
    if variant is not None:
        notes += _compare_with_variant(variant, config)
    if config.lka_kernels != (5, 7):
        notes.append(
            f"kernels {config.lka_kernels[0]} and {config.lka_kernels[1]}: the dilation "
            f"{config.lka_dilation} is the paper's for the first, the weights do not say"
        )
    arguments = {**file.metadata, **file.arguments}
    preprocessing, more = preprocessing_of(
        config.in_chans, arguments=arguments, processor=found.processor, repo_id=found.repo_id
    )
    source = WeightsSource(
        spec=spec,
        path=str(found.path),
        format=state.format,
        sha256=found.sha256,
        seed=None,
        container=file.container,
        notes=(*notes, *more),
    )
    names = class_names_from(found.config, file.metadata, config.num_classes)
    if (
        names is None
        and found.repo_id
        and is_official(found.repo_id)
        and config.num_classes == 1000
    ):
        names = _imagenet_names()
    name = variant.name if variant else _name(spec)
    return LoadedVan(name, model, config, source, preprocessing, names)


def _compare_with_variant(variant: Variant, config: VanConfig) -> list[str]:
    """Refuse another architecture under a variant's name; report other ends."""
    wanted = variant.config
    body = ("embed_dims", "depths", "hidden_dims", "lka_kernels")
    differ = [
        f"{name} {getattr(config, name)} instead of {getattr(wanted, name)}"
        for name in body
        if getattr(config, name) != getattr(wanted, name)
    ]
    if differ:
        actual = variant_of(config)
        what = f"those of {actual}" if actual else "of another architecture"
        raise CheckpointError(
            f"The weights are not {variant.name}'s but {what}: {'; '.join(differ)}.",
            f"Say {actual} instead."
            if actual
            else "Give the file alone, without a variant's name.",
        )
    ends = (("num_classes", "classes"), ("in_chans", "input channels"))
    return [
        f"the weights have {getattr(config, field)} {what} ({variant.name}: "
        f"{getattr(wanted, field)}); read from the file"
        for field, what in ends
        if getattr(config, field) != getattr(wanted, field)
    ]


def _imagenet_names() -> tuple[str, ...]:
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))


def _name(spec: str) -> str:
    """Return a name for a bundle, from a path or a repository."""
    path = Path(spec.partition(":")[0] if REPO.fullmatch(spec) else spec)
    stem = path.name
    while stem.lower().endswith(SUFFIXES):
        stem = Path(stem).stem
    if stem.lower() in _PLAIN_STEMS and path.resolve().parent.name:
        stem = path.resolve().parent.name
    return re.sub(r"[^\w.-]+", "_", stem).strip("._") or "van"
