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

from timm.data.imagenet_info import ImageNetInfo

from van_deploy.errors import CheckpointError, UsageError
from van_deploy.model.embedded import EMBEDDED_NAME, embedded_files
from van_deploy.model.files import SUFFIXES, TOP_LEVEL, read_weights
from van_deploy.model.hub import Progress
from van_deploy.model.metadata import described
from van_deploy.model.preprocess import OFFICIAL, Preprocessing
from van_deploy.model.random_weights import random_van, sha256_of_state
from van_deploy.model.sources import REPO, find_weights, from_hub, is_official
from van_deploy.model.state import config_from_state_dict, network_from_state, official_state
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANTS, VanConfig, Variant, variant_named, variant_of
from van_deploy.model.weights_source import WeightsSource

ALL_STAGES = (0, 1, 2, 3)
EMBEDDED = EMBEDDED_NAME
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
    if layer_norm_eps is not None and not 0 < layer_norm_eps < 1:
        raise UsageError(
            f"LayerNorm's eps {layer_norm_eps:g} is not between 0 and 1.",
            "Give a number such as 1e-6.",
        )
    given = {name: value for name, value in (preprocessing or {}).items() if value is not None}
    variant = None if _is_place(spec) or spec == EMBEDDED else variant_named(spec)
    if variant is None and weights is not None:
        raise UsageError(
            f"'{spec}' already says which weights to use, and so does '{weights}'.",
            f"Give one of them; with a variant's name ({', '.join(VARIANTS)}) --weights is free.",
        )
    if variant is not None and weights == "random":
        if expect_sha256 or container or head:
            raise UsageError(
                "Random weights have no digest, no container and no other head.",
                "Leave these out, or the random weights.",
            )
        loaded = _random(variant, spec, seed, layer_norm_eps, out_indices)
        return replace(loaded, preprocessing=loaded.preprocessing.override(**given))
    if variant is None or weights is not None:
        place = str(embedded_files().weights) if spec == EMBEDDED else weights or spec
        found = find_weights(place, offline, expect_sha256, progress)
    elif variant.weights is None:
        raise UsageError(
            f"{variant.name} has no public ImageNet-1K weights on the hub.",
            f"{variant.weights_note[:1].upper()}{variant.weights_note[1:]}.",
        )
    else:
        found = from_hub(variant.weights, offline, expect_sha256, progress)
    file = read_weights(found.path, container=container)
    state = official_state(file.tensors, file.container)
    config, assumed = config_from_state_dict(state.tensors, head)
    assumed += _compare_with_variant(variant, config) if variant else ()
    if out_indices is None and not config.num_classes:
        out_indices = ALL_STAGES
    decided = given | ({"layer_norm_eps": layer_norm_eps} if layer_norm_eps else {})
    if own_labels or out_indices is not None:
        decided["class_names"] = ()
    official = is_official(found.repo_id)
    config, stated, names, notes = described(
        config, state.format, file.metadata, found.beside, official=official, given=decided
    )
    if out_indices is not None:
        config = config.backbone(tuple(out_indices))
    if names is None and official and config.num_classes == 1000:
        names = tuple(map(ImageNetInfo().index_to_description, range(1000)))
    form = "embedded" if spec == EMBEDDED else state.format
    notes = (*found.notes, *file.notes, *state.notes, *assumed, *notes)
    path = str(found.path)
    source = WeightsSource(spec, path, form, found.sha256, None, file.container, notes)
    name = variant.name if variant else EMBEDDED if spec == EMBEDDED else _name(spec)
    model = network_from_state(state.tensors, config)
    return LoadedVan(name, model, config, source, stated.override(**given), names)


def _is_place(word: str) -> bool:
    """Return whether a word is a path or a repository rather than a variant's name."""
    lowered = word.lower()
    if "/" in word or "\\" in word or lowered.endswith(SUFFIXES):
        return True
    known = {name for v in VARIANTS.values() for name in (v.name, *v.aliases)} | {EMBEDDED}
    return lowered.replace("-", "_") not in known and Path(word).exists()


def _random(
    variant: Variant,
    spec: str,
    seed: int,
    layer_norm_eps: float | None,
    out_indices: Sequence[int] | None,
) -> LoadedVan:
    config = variant.config
    if layer_norm_eps is not None:
        config = replace(config, layer_norm_eps=layer_norm_eps)
    if out_indices is not None:
        config = config.backbone(tuple(out_indices))
    model = random_van(config, seed)
    digest, notes = sha256_of_state(model.state_dict()), (_RANDOM,)
    source = WeightsSource(spec, "", "random", digest, seed, TOP_LEVEL, notes)
    preprocessing = replace(OFFICIAL, source="the official VAN weights' (these ones are random)")
    return LoadedVan(variant.name, model, config, source, preprocessing, None)


def _compare_with_variant(variant: Variant, config: VanConfig) -> tuple[str, ...]:
    """Refuse another architecture under a variant's name; report other ends."""
    actual, wanted = variant_of(config), variant.config
    if actual != variant.name:
        theirs = wanted.body
        differ = "; ".join(
            f"{name} {value} instead of {theirs[name]}"
            for name, value in config.body.items()
            if value != theirs[name]
        )
        raise CheckpointError(
            f"The weights are not {variant.name}'s but those of "
            f"{actual or 'another architecture'}: {differ}.",
            f"Say {actual} instead." if actual else "Give the file alone, without a name.",
        )
    ends = (("num_classes", "classes"), ("in_chans", "input channels"))
    return tuple(
        f"the weights have {getattr(config, field)} {what} ({variant.name}: "
        f"{getattr(wanted, field)}); read from the file"
        for field, what in ends
        if getattr(config, field) not in (0, getattr(wanted, field))
    )


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
