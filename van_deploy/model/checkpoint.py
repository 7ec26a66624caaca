"""From what a user asked for to a network in evaluation mode.

``load_van("van_b0")``, ``load_van("./mine.pth")``, ``load_van("owner/name")``:
the weights are found, read without running anything in them, renamed to the
official names, checked for sense, and loaded strictly into the architecture
their own shapes describe. What the user should know is in
:attr:`WeightsSource.notes`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from van_deploy.errors import CheckpointError, UsageError
from van_deploy.model.architecture import config_from_state_dict, variant_of
from van_deploy.model.embedded import EMBEDDED_NAME, embedded_files
from van_deploy.model.files import SUFFIXES, read_weights
from van_deploy.model.hub import Progress
from van_deploy.model.metadata import described
from van_deploy.model.preprocess import OFFICIAL, Preprocessing
from van_deploy.model.random_weights import random_van, sha256_of_state
from van_deploy.model.sources import REPO, Found, find_weights, from_hub, is_official, on_disk
from van_deploy.model.state import network_from_state, official_state
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANTS, HubFile, VanConfig, Variant, variant_named
from van_deploy.model.weights_source import WeightsSource

__all__ = [
    "ALL_STAGES",
    "EMBEDDED",
    "LoadedVan",
    "WeightsSource",
    "config_from_state_dict",
    "load_van",
]

ALL_STAGES = (0, 1, 2, 3)
EMBEDDED = EMBEDDED_NAME
"""Name of the small trained network inside the package."""

_RANDOM = "random weights: the outputs mean nothing"
_NO_PREPROCESSING = ("layer_norm_eps", "class_names")
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
    layer_norm_eps: float | None = None,
    head: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    own_labels: bool = False,
    out_indices: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> LoadedVan:
    """Return the network a user asked for, its weights loaded strictly.

    Args:
        spec: a variant's name, ``van_digits``, a path to a checkpoint or to the folder
            it is in, or ``owner/name[@revision][:file]`` on the hub.
        weights: for a variant, where its weights come from instead: a path, a
            repository, or ``random``.
        expect_sha256: what the digest of the weights file must be.
        offline: never use the network.
        seed: of random weights.
        container: which tensors to take where a file holds several networks: its keys
            joined by dots, and behind them the beginning of the names.
        layer_norm_eps: of every LayerNorm; by default what the checkpoint says, or else
            what the framework uses that its names are of.
        head: the layers of a sequential head, such as ``("linear", "relu", "linear")``.
        preprocessing: values that the caller decides, by the names that
            :meth:`~van_deploy.model.preprocess.Preprocessing.override` takes.
        own_labels: the caller has class names; the checkpoint's are not looked at.
        out_indices: stages (0 to 3) whose feature maps the network is to give, without a head;
            None for logits. A checkpoint without a head gives all four.
        progress: told how much of a download is here.

    Raises:
        UsageError: the request makes no sense, or a variant has no public weights.
        CheckpointError: the weights cannot be used, or something beside them cannot be followed.
        DownloadError: the weights could not be fetched, or have another digest.

    >>> loaded = load_van("van_b0", weights="random", seed=1)
    >>> loaded.source.format, loaded.config.depths
    ('random', (3, 3, 5, 2))
    """
    expect_sha256 = _digest_asked_for(expect_sha256)
    given = {name: value for name, value in (preprocessing or {}).items() if value is not None}
    variant = None if _is_place(spec) or spec == EMBEDDED else variant_named(spec)
    if variant is None and weights is not None:
        raise UsageError(
            f"'{spec}' already says which weights to use, and so does '{weights}'.",
            f"Give one of them; with a variant's name ({', '.join(VARIANTS)}) --weights is free.",
        )
    eps: dict[str, Any] = {}
    if layer_norm_eps is not None:
        eps["layer_norm_eps"] = _epsilon(layer_norm_eps)
    if variant is not None and weights == "random":
        if expect_sha256 or container or head:
            raise UsageError(
                "Random weights have no digest, no container and no other head.",
                "Leave these out, or the random weights.",
            )
        config = replace(variant.config, **eps)
        if out_indices is not None:
            config = config.backbone(tuple(out_indices))
        loaded = _random(variant, spec, seed, config)
        return replace(loaded, preprocessing=loaded.preprocessing.override(**given))
    if spec == EMBEDDED:
        found = on_disk(embedded_files().weights, expect_sha256)
    elif variant is not None and weights is None:
        found = from_hub(_public(variant), offline, expect_sha256, progress)
    else:
        found = find_weights(weights or spec, offline, expect_sha256, progress)
    if own_labels:
        given["class_names"] = ()
    return _load(spec, variant, found, container, head, {**given, **eps}, out_indices)


def _load(
    spec: str,
    variant: Variant | None,
    found: Found,
    container: str | None,
    head: Sequence[str] | None,
    given: dict[str, Any],
    out_indices: Sequence[int] | None,
) -> LoadedVan:
    """Return the network in a file; see :func:`load_van`."""
    file = read_weights(found.path, container=container)
    state = official_state(file.tensors, file.container)
    config, assumed = config_from_state_dict(state.tensors, head)
    if variant is not None:
        assumed += _compare_with_variant(variant, config)
    if out_indices is None and not config.num_classes:
        out_indices = ALL_STAGES
    if out_indices is not None:
        given["class_names"] = ()
    official = is_official(found.repo_id)
    said = described(
        config, state.format, file.metadata, found.beside, official=official, given=given
    )
    given = {key: value for key, value in given.items() if key not in _NO_PREPROCESSING}
    config, names = said.config, said.class_names
    if out_indices is not None:
        config = config.backbone(tuple(out_indices))
    if names is None and official and config.num_classes == 1000:
        names = _imagenet_names()
    source = WeightsSource(
        spec=spec,
        path=str(found.path),
        format="embedded" if spec == EMBEDDED else state.format,
        sha256=found.sha256,
        seed=None,
        container=file.container,
        notes=(*found.notes, *file.notes, *state.notes, *assumed, *said.notes),
    )
    name = variant.name if variant else EMBEDDED if spec == EMBEDDED else _name(spec)
    model = network_from_state(state.tensors, config)
    return LoadedVan(name, model, config, source, said.preprocessing.override(**given), names)


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


def _random(variant: Variant, spec: str, seed: int, config: VanConfig) -> LoadedVan:
    model = random_van(config, seed)
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
    return LoadedVan(variant.name, model, config, source, preprocessing, None)


def _public(variant: Variant) -> HubFile:
    if variant.weights is None:
        raise UsageError(
            f"{variant.name} has no public ImageNet-1K weights on the hub.",
            f"{variant.weights_note[:1].upper()}{variant.weights_note[1:]}.",
        )
    return variant.weights


def _epsilon(value: float) -> float:
    if not 0 < value < 1:
        raise UsageError(
            f"LayerNorm's eps {value:g} is not between 0 and 1.", "Give a number such as 1e-6."
        )
    return value


def _compare_with_variant(variant: Variant, config: VanConfig) -> tuple[str, ...]:
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
    return tuple(
        f"the weights have {getattr(config, field)} {what} ({variant.name}: "
        f"{getattr(wanted, field)}); read from the file"
        for field, what in ends
        if getattr(config, field) not in (0, getattr(wanted, field))
    )


def _imagenet_names() -> tuple[str, ...]:
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))


def _name(spec: str) -> str:
    """Return a name for a bundle, from a path or a repository."""
    repo = REPO.fullmatch(spec)
    path = Path(repo["repo"] if repo and not Path(spec).exists() else spec)
    stem = path.name
    while stem.lower().endswith(SUFFIXES):
        stem = Path(stem).stem
    if stem.lower() in _PLAIN_STEMS and path.resolve().parent.name:
        stem = path.resolve().parent.name
    return re.sub(r"[^\w.-]+", "_", stem).strip("._") or "van"
