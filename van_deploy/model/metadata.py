"""What stands beside the tensors: the one reader of it.

A state dict does not hold strides, LayerNorm's ``eps``, the meaning of the
logits, the preprocessing or the classes. They are in the file itself (a
training script's ``args``, ``class_to_idx``, mmpretrain's ``meta``, safetensors
metadata) and in the ``config.json`` and ``preprocessor_config.json`` beside it.
Every field that changes the network, its input or the meaning of its output is
used, or refused by name; what was taken is in the notes.

For the authors' own Transformers conversions the JSON is known to be wrong: the
conversion script pushed ConvNeXt's processor beside weights trained with
0.5/0.5/0.9 (VAN-Classification issues 2 and 16). There the official values are
used and the difference is pointed out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

from van_deploy.errors import CheckpointError, UsageError
from van_deploy.model import processors
from van_deploy.model.configs import is_timm, is_transformers, network_said
from van_deploy.model.preprocess import OFFICIAL, Preprocessing
from van_deploy.model.variants import CONFIG, PROCESSOR, VanConfig

_ARGUMENTS = ("args", "hyper_parameters", "hparams")
_TIMM = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "img_size", "input_size")
_TORCHVISION = ("val_resize_size", "val_crop_size")
_INDEX_OF = ("class_to_idx", "label2id")
_NAMES = (*_INDEX_OF, "idx_to_class", "id2label", "class_names", "classes", "label_names")
_LONGEST_CONFIG = 2**20  # characters
_OPTIONS = ("image_size", "mean", "std", "interpolation", "crop_pct")
_BESIDE = " beside the weights"
_SAY = "Say yourself what the weights want: --image-size --mean --std --interpolation --crop-pct."
_LABELS = "Give the names yourself, one a line in the logits' order: --labels FILE."

Values = Mapping[str, Any]
Source = tuple[str, Callable[[Values], dict[str, Any]], Values]
"""What it is called, how it is read, and what is read."""


def described(
    config: VanConfig,
    source: str,
    inside: Values,
    beside: Mapping[str, Values],
    *,
    official: bool = False,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[VanConfig, Preprocessing, tuple[str, ...] | None, tuple[str, ...]]:
    """Return everything that a checkpoint says beside its tensors.

    That is the architecture with what only the metadata tells, what the input must have gone
    through, the class names in the order of the logits (None if nothing says them), and notes:
    what was taken from where, and what the user should know.

    Args:
        config: the architecture as the tensors tell it.
        source: format of the tensors' names.
        inside: what else the file holds.
        beside: the JSON beside it, by file name.
        official: whether the weights come from the authors' own repositories.
        given: what the caller decides, by name: values of the preprocessing, ``class_names``
            and ``layer_norm_eps``. What is said of them is not looked at.

    Raises:
        CheckpointError: a field contradicts the tensors or another one, or is not supported.
    """
    arguments = dict(inside)
    for name in _ARGUMENTS:
        arguments |= _table(inside.get(name))
    meta, config_json = _table(inside.get("meta")), beside.get(CONFIG, {})
    cfg = meta.get("cfg", meta.get("config"))
    openmmlab = (
        processors.python_config(cfg[:_LONGEST_CONFIG]) if isinstance(cfg, str) else _table(cfg)
    )
    eps = given.get("layer_norm_eps")
    config, notes = network_said(config, source, arguments, config_json, openmmlab, eps)
    written, own = _table(inside.get("preprocessing")), "the checkpoint's own training arguments"
    torchvision = any(key in arguments for key in _TORCHVISION)
    timm = not torchvision and any(arguments.get(key) not in (None, "") for key in _TIMM)
    size = config_json.get("image_size") if is_transformers(config_json) else None
    openmmlabs = partial(processors.from_openmmlab, classifier=bool(config.num_classes))
    sources: list[Source] = [
        (str(written.get("source", "the weights file")), dict, written),
        (own, processors.from_torchvision, arguments if torchvision else {}),
        (own, processors.from_timm, arguments if timm else {}),
        (
            "the checkpoint's own configuration",
            openmmlabs,
            openmmlab if "model" in openmmlab else {},
        ),
        (f"the {PROCESSOR}{_BESIDE}", processors.from_processor, beside.get(PROCESSOR, {})),
        (f"the {CONFIG}{_BESIDE}", dict, {} if PROCESSOR in beside else {"image_size": size}),
        (
            f"the {CONFIG}{_BESIDE}",
            processors.from_timm_config,
            config_json if is_timm(config_json) else {},
        ),
    ]
    sources = [row for row in sources if any(value is not None for value in row[2].values())]
    preprocessing = _preprocessing(config.in_chans, sources, official, given, notes)
    names = None
    if "class_names" not in given:
        places = (
            ("the file", arguments),
            ("the file's meta", {**meta, "classes": meta.get("CLASSES", meta.get("classes"))}),
            ("the file's meta", _table(meta.get("dataset_meta"))),
            (CONFIG, {"label_names": config_json.get("labels"), **config_json}),
            (f"pretrained_cfg in {CONFIG}", _table(config_json.get("pretrained_cfg"))),
        )
        names = _class_names(config.num_classes, places, notes)
    return config, preprocessing, names, tuple(notes)


def _table(value: object) -> dict[str, Any]:
    return {str(key): inner for key, inner in value.items()} if isinstance(value, Mapping) else {}


# --- the preprocessing ---------------------------------------------------------------------


def _preprocessing(
    channels: int, sources: list[Source], official: bool, given: Collection[str], notes: list[str]
) -> Preprocessing:
    """Return the preprocessing of the first source, or the official one."""
    colour = {"mean": OFFICIAL.mean[:1] * channels, "std": OFFICIAL.std[:1] * channels}
    default = replace(OFFICIAL, **colour)  # type: ignore[arg-type]
    only_beside = all(name.endswith(_BESIDE) for name, _, _ in sources)
    if official and only_beside:
        stated = str(_built(sources[0], default, ())) if sources else str(default)
        if stated != str(default):
            notes.append(
                f"the repository's JSON says {stated}; the weights were trained with {default}, "
                "which is used"
            )
        return default
    if not sources:
        return replace(default, source="assumed: the official VAN weights' (nothing says another)")
    result = _built(sources[0], default, given)
    others = ", ".join(other for other, _, _ in sources[1:])
    if others or only_beside:
        rest = f"; not from {others}" if others else ""
        notes.append(f"preprocessing from {sources[0][0]}: {result}{rest}")
    return result


def _built(source: Source, default: Preprocessing, given: Collection[str]) -> Preprocessing:
    """Return the preprocessing that a source describes; what it leaves out is the default's."""
    name, read, values = source
    try:
        found = {
            key: value
            for key, value in read(values).items()
            if key not in (*given, "source") and value is not None and value not in ("", [], ())
        }
        if {"image_size", "crop_pct"} & set(given):
            found.pop("resize_size", None)
        assumed = [key for key in _OPTIONS if key not in found and key not in given]
        rest = f" ({', '.join(assumed)}: assumed, the official weights')" if assumed else ""
        return replace(default.override(**found), source=name + rest)
    except (UsageError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
        if set(_OPTIONS) <= set(given):
            return default
        reason = e.message if isinstance(e, UsageError) else f"{str(e)[:200]}."
        raise CheckpointError(
            f"{name[0].upper()}{name[1:]} cannot be followed: {reason}", _SAY
        ) from None


# --- the classes ---------------------------------------------------------------------------


def _class_names(
    classes: int, places: tuple[tuple[str, Values], ...], notes: list[str]
) -> tuple[str, ...] | None:
    """Return the names of the classes, on which all that name them must agree."""
    found: dict[tuple[str, ...], str] = {}
    for place, values in places:
        for key in _NAMES:
            if names := _names_in(key, values.get(key), place, classes):
                found.setdefault(names, f"{key} in {place}")
    if not found:
        return None
    (first, where), *others = found.items()
    for names, other in others:
        index = next(i for i, name in enumerate(names) if name != first[i])
        raise CheckpointError(
            f"The class names contradict each other: class {index} is '{first[index]}' by {where}, "
            f"and '{names[index]}' by {other}.",
            _LABELS,
        )
    notes.append(f"class names from {where}")
    return first


def _names_in(key: str, value: object, place: str, classes: int) -> tuple[str, ...] | None:
    """Return the class names that a field holds, or None where it holds none."""
    if not value or not isinstance(value, Mapping | list | tuple):
        return None
    listed: list[Any] = [None]
    with contextlib.suppress(TypeError, ValueError, LookupError):
        if isinstance(value, Mapping):
            pairs = {i: name for name, i in value.items()} if key in _INDEX_OF else value
            by_index = {int(index): name for index, name in pairs.items()}
            value = [by_index[index] for index in range(len(value))]
        listed = list(value)
    if not all(isinstance(name, str | int) for name in listed):
        raise CheckpointError(f"{key} in {place} does not name one class a logit.", _LABELS)
    names = tuple(map(str, listed))
    if names == tuple(f"LABEL_{index}" for index in range(len(names))):
        return None
    if classes == 1 and len(names) == 2:  # of two classes, one logit is the second's
        return names[1:]
    if len(names) != classes:
        raise CheckpointError(
            f"{key} in {place} names {len(names)} classes; the network has {classes}.", _LABELS
        )
    return names
