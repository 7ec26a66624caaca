"""Which preprocessing and class names a set of weights came with.

Sources, best first: what the file says about itself (a training script's
``args``, safetensors metadata), the repository's or folder's JSON, else the
official values. For the official repositories' Transformers conversions the
JSON is known to be wrong: the conversion script pushed ConvNeXt's processor
beside weights trained with 0.5/0.5/0.9 (VAN-Classification issues 2 and 16),
so there the official values are used and the difference is pointed out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from van_deploy import forms
from van_deploy.errors import CheckpointError, UsageError
from van_deploy.model.preprocess import OFFICIAL, Preprocessing

__all__ = [
    "class_names_from",
    "is_official",
    "layer_norm_eps_from",
    "preprocessing_from_arguments",
    "preprocessing_from_json",
    "preprocessing_of",
]

OFFICIAL_OWNER = "Visual-Attention-Network"
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers
_FIELDS = ("image_size", "mean", "std", "interpolation", "crop_pct")
_MOST_VALUES = 16  # channels, of a mean
_ALIASES = {"img_size": "image_size"}

Found = tuple[Preprocessing, tuple[str, ...]]


def is_official(repo_id: str) -> bool:
    """Return whether a hub repository is the authors' own."""
    return repo_id.partition("/")[0].lower() == OFFICIAL_OWNER.lower()


def preprocessing_of(
    channels: int,
    *,
    arguments: Mapping[str, Any],
    processor: Mapping[str, Any] | None,
    repo_id: str | None,
) -> Found:
    """Return the preprocessing of a set of weights, and what the user should be told.

    Args:
        channels: input channels of the network.
        arguments: what the file says about itself, by timm's names.
        processor: the ``preprocessor_config.json`` beside it.
        repo_id: the hub repository it came from.

    Raises:
        CheckpointError: the JSON says something that cannot be done.
    """
    official = replace(OFFICIAL, mean=OFFICIAL.mean[:1] * channels, std=OFFICIAL.std[:1] * channels)
    written = arguments.get("preprocessing")
    if isinstance(written, Mapping) and all(map(_is_flat, written.values())):
        return _written(written, channels), ()
    own, notes = preprocessing_from_arguments(arguments, official)
    if own is not None:
        return own, notes
    stated = None
    if processor is not None:
        stated = preprocessing_from_json(processor, channels)
    if repo_id is not None and is_official(repo_id):
        return official, (*notes, *_disagreement(stated, official))
    if stated is not None:
        return stated, (
            *notes,
            f"preprocessing from the preprocessor_config.json beside the weights: {stated}",
        )
    assumed = replace(official, source="assumed: the official VAN weights' (the file says nothing)")
    return assumed, notes


def preprocessing_from_arguments(
    arguments: Mapping[str, Any], default: Preprocessing
) -> tuple[Preprocessing | None, tuple[str, ...]]:
    """Return the preprocessing in a training script's arguments, or None if there is none.

    timm's names: ``mean``, ``std``, ``interpolation``, ``crop_pct`` and
    ``img_size`` or ``input_size``. What is not given is ``default``'s; what
    cannot be used is named in the notes.
    """
    wanted = {*_FIELDS, *_ALIASES, "input_size"}
    values = {_ALIASES.get(n, n): v for n, v in arguments.items() if n in wanted and _is_flat(v)}
    size = values.get("input_size")
    if not values.get("image_size") and isinstance(size, Sequence) and len(size) == 3:
        values["image_size"] = size[-1] if size[1] == size[2] else size
    result, used, notes = default, [], []
    for name in _FIELDS:
        value = values.get(name)
        if value is None or value in ("", [], ()):
            continue
        try:
            result = result.override(**{name: value})
        except UsageError as error:
            notes.append(f"the checkpoint's own {name} is not used: {error.message}")
            continue
        used.append(name)
    if not used:
        return None, tuple(notes)
    rest = [name for name in _FIELDS if name not in used]
    source = "the checkpoint's own training arguments"
    if rest:
        source += f" ({', '.join(rest)}: assumed, the official weights')"
    return replace(result, source=source), tuple(notes)


def preprocessing_from_json(processor: Mapping[str, Any], channels: int = 3) -> Preprocessing:
    """Return the preprocessing a Transformers ``preprocessor_config.json`` describes.

    Raises:
        CheckpointError: it describes something else than resize, centre crop,
            1/255 and normalise.
    """
    try:
        return _described(processor, channels)
    except (UsageError, TypeError, IndexError, ValueError, ArithmeticError) as error:
        reason = error.message if isinstance(error, UsageError) else str(error)
        raise CheckpointError(
            f"The preprocessor_config.json beside the weights cannot be followed: {reason}",
            "Give the weights' file by its path, and --mean --std --interpolation --crop-pct "
            "--image-size yourself.",
        ) from None


def class_names_from(
    config: Mapping[str, Any] | None, metadata: Mapping[str, Any], num_classes: int
) -> tuple[str, ...] | None:
    """Return the classes' names, in the order of the logits, or None if nothing says them.

    From a Transformers ``config.json`` (``id2label``), from the file's own
    ``class_names`` or ``classes``, or from mmpretrain's ``meta``.
    """
    labels = (config or {}).get("id2label")
    if isinstance(labels, Mapping) and len(labels) == num_classes:
        names = [labels.get(str(index)) for index in range(num_classes)]
        if None not in names and names != [f"LABEL_{index}" for index in range(num_classes)]:
            return tuple(map(str, names))
    own = (metadata.get("class_names"), metadata.get("classes"))
    for candidate in (*own, *_mmpretrain_classes(metadata)):
        listed = isinstance(candidate, list | tuple) and len(candidate) == num_classes
        if listed and all(isinstance(name, str | int) for name in candidate):
            return tuple(map(str, candidate))
    return None


def layer_norm_eps_from(config: Mapping[str, Any] | None) -> float:
    """Return LayerNorm's eps from a Transformers ``config.json``; 1e-6 where it is silent.

    Raises:
        CheckpointError: the configuration is of a network that VAN here is not.
    """
    config = config or {}
    activation = config.get("hidden_act", "gelu")
    if config.get("model_type", "van") != "van" or activation != "gelu":
        raise CheckpointError(
            f"The config.json beside the weights is of a {config.get('model_type', 'van')} with "
            f"{activation}, not of a VAN with gelu.",
            "Pass the weights of a VAN classifier.",
        )
    eps = config.get("layer_norm_eps", 1e-6)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
        raise CheckpointError(
            f"The config.json beside the weights has layer_norm_eps {eps!r}.",
            "It must be a small positive number such as 1e-6.",
        )
    return float(eps)


def _is_flat(value: object) -> bool:
    """Return whether it is a value, or a short list of them.

    A pickle of some kilobytes can hold lists in lists that take for ever to look through.
    """
    items = value if isinstance(value, list | tuple) else [value]
    return len(items) <= _MOST_VALUES and not any(
        isinstance(item, Mapping | list | tuple | set | frozenset) for item in items
    )


def _written(values: Mapping[str, Any], channels: int) -> Preprocessing:
    """Return the preprocessing this program wrote into a weights file."""
    try:
        written = Preprocessing.from_dict(values)
    except UsageError as error:
        raise CheckpointError(
            f"The preprocessing written in the weights file is wrong: {error.message}",
            "Correct the file's metadata.",
        ) from None
    if written.channels != channels:
        raise CheckpointError(
            f"The preprocessing written in the weights file is for {written.channels} channels, "
            f"the network takes {channels}.",
            "Correct the file's metadata.",
        )
    return written


def _described(processor: Mapping[str, Any], channels: int) -> Preprocessing:
    if processor.get("do_resize", True) is False:
        raise UsageError("do_resize is false: the pictures' size is not given.")
    factor = processor.get("rescale_factor", 1 / 255)
    if processor.get("do_rescale", True) is False or abs(factor * 255 - 1) > 1e-3:
        raise UsageError(f"rescale_factor is {factor}, not 1/255.")
    missing = [k for k in ("size", "image_mean", "image_std", "resample") if k not in processor]
    if missing:
        raise UsageError(f"{', '.join(missing)} is not given.")
    normalised = processor.get("do_normalize", True)
    size = _side(processor["size"])
    crop = _crop_ratio(processor, size)
    return Preprocessing.from_dict(
        {
            "image_size": round(size * crop) if "crop_size" in processor else size,
            "mean": _channels(processor["image_mean"] if normalised else 0, channels),
            "std": _channels(processor["image_std"] if normalised else 1, channels),
            "interpolation": _RESAMPLE[processor["resample"]],
            "crop_pct": crop,
            "source": "the preprocessor_config.json beside the weights",
        }
    )


def _disagreement(stated: Preprocessing | None, used: Preprocessing) -> tuple[str, ...]:
    if stated is None:
        return ()
    names = [name for name in _FIELDS if getattr(stated, name) != getattr(used, name)]
    if not names:
        return ()
    says = ", ".join(f"{name} {_short(getattr(stated, name))}" for name in names)
    trained = ", ".join(f"{name} {_short(getattr(used, name))}" for name in names)
    return (
        f"the repository's JSON says {says}; the weights were trained with {trained}, "
        "which is used",
    )


def _short(value: object) -> str:
    if isinstance(value, tuple):
        same = len(set(value)) == 1
        return f"{value[0]:g}" if same else "/".join(f"{number:g}" for number in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _channels(value: Any, channels: int) -> Any:
    return value if isinstance(value, list) else [value] * channels


def _side(size: Any) -> int:
    """Return the side in pixels that Transformers' ``size`` means, in any of its spellings."""
    if isinstance(size, Mapping):
        sides = set(size.values())
        if len(sides) != 1:
            raise UsageError(f"size is {dict(size)}: only squares are supported.")
        size = sides.pop()
    if not forms.size(size):
        raise UsageError(f"size is {size!r}."[:200])
    return int(size)


def _crop_ratio(processor: Mapping[str, Any], size: int) -> float:
    """Return crop over resized side: ConvNeXt's ``crop_pct`` or ViT's ``crop_size``."""
    if processor.get("do_center_crop") is not False and "crop_size" in processor:
        return _side(processor["crop_size"]) / size
    if processor.get("crop_pct") is None or size >= 384:  # ConvNeXt crops only below 384
        return 1.0
    if not forms.number(processor["crop_pct"]):
        raise UsageError(f"crop_pct is {processor['crop_pct']!r}."[:200])
    return float(processor["crop_pct"])


def _mmpretrain_classes(metadata: Mapping[str, Any]) -> tuple[Any, ...]:
    meta = metadata.get("meta")
    if not isinstance(meta, Mapping):
        return ()
    dataset = meta.get("dataset_meta")
    nested = dataset.get("classes") if isinstance(dataset, Mapping) else None
    return (nested, meta.get("CLASSES"))
