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

import argparse
import contextlib
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from timm.models import PretrainedCfg

from van_deploy.errors import CheckpointError, UsageError
from van_deploy.model import processors
from van_deploy.model.files import CONFIG, PROCESSOR, Found
from van_deploy.model.keys import Weights
from van_deploy.model.preprocess import OFFICIAL, Preprocessing
from van_deploy.model.variants import VARIANTS, VanConfig

Values = Mapping[str, Any]
# What it is called, how it is read, and what is read.
Source = tuple[str, Callable[[Values], dict[str, Any]], Values]

_NAMES = ("class_to_idx", "idx_to_class", "id2label", "class_names", "classes", "label_names")
_OPTIONS = ("image_size", "mean", "std", "interpolation", "crop_pct")
_BESIDE, _OWN = " beside the weights", "the checkpoint's own"
_SAY = "Say yourself what the weights want: --image-size --mean --std --interpolation --crop-pct."
_LABELS = "Give the names yourself, one a line in the logits' order: --labels FILE."
_MMCV_EPS = 1e-5  # build_norm_layer's default; the official code's and Transformers' is 1e-6

_PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
# What the tensors tell, and what others call it.
_NETWORK = {"architecture", "model_type", "hidden_sizes"}  # one of these makes a config.json one
_TOLD = {n: n for n in ("embed_dims", "in_chans", "depths", "patch_sizes", "mlp_ratios")}
_TOLD |= {"hidden_sizes": "embed_dims", "num_channels": "in_chans"}
_TOLD |= dict.fromkeys(("dilation", "lka_dilation"), "lka_dilation")
# What fields may be that no tensor tells, in a config.json or in training arguments.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu", "gelu_python"),
    **dict.fromkeys(("gp", "global_pool"), ("avg", "fast", "")),
    **dict.fromkeys(("bn_tf", "split_bn"), (False,)),
    "bn_eps": (1e-5,),
    "model_kwargs": ({},),
}
_NOTED = {
    "bce_loss": "trained with --bce-loss: each logit is a class's own odds, not softmax's",
    "class_map": "trained with --class-map, which orders the classes: give --labels",
}
# Fields of Transformers' and timm's that change nothing at inference, or that are read elsewhere.
_IDLE = re.compile(
    "architectures|(torch_)?dtype|transformers_version|_name_or_path|initializer_range|labels|tags"
    "|drop(_path|out)?_rate|layer_scale_init_value|id2label|label2id|i(mg|mage)_size|pretrained_cfg"
    "|model_args|crop_border_pixels|" + "|".join(f.name for f in fields(PretrainedCfg))
)


def described(
    config: VanConfig, file: Weights, found: Found, given: Mapping[str, Any]
) -> tuple[VanConfig, Preprocessing, tuple[str, ...] | None, tuple[str, ...]]:
    """Return everything that a checkpoint says beside its tensors.

    That is the architecture with what only the metadata tells, what the input must have gone
    through, the class names in the order of the logits (None if nothing says them), and notes:
    what was taken from where, and what the user should know.

    Args:
        config: the architecture as the tensors tell it.
        file: what else it holds; the format of its names decides LayerNorm's default ``eps``.
        found: the file, and the JSON beside it.
        given: what the caller decides, by name: values of the preprocessing, ``class_names``
            and ``layer_norm_eps``. What is said of them is not looked at.

    Raises:
        CheckpointError: a field contradicts the tensors or another one, or is not supported.
    """
    arguments = dict(file.inside)
    for name in ("args", "hyper_parameters", "hparams"):
        arguments |= _table(file.inside.get(name))
    meta, config_json = _table(file.inside.get("meta")), found.beside.get(CONFIG, {})
    openmmlab = processors.python_config(meta.get("cfg", meta.get("config")))
    notes = [note for key, note in _NOTED.items() if arguments.get(key)]
    _require(f"{_OWN} arguments", arguments, _ALLOWED)
    said = _from_openmmlab(openmmlab) | _from_json(config, config_json, notes)
    if "layer_norm_eps" in given:
        said["layer_norm_eps"] = given["layer_norm_eps"]
    elif "layer_norm_eps" not in said and file.format == "mmpretrain":
        said["layer_norm_eps"] = _MMCV_EPS
        told = f"LayerNorm's eps is mmpretrain's own {_MMCV_EPS:g}; the published weights were"
        notes.append(f"{told} trained with 1e-06 (--layer-norm-eps)")
    if config.num_classes == 1 and "problem_type" not in said:
        notes.append("one logit: nothing says whether of two classes or of a regression")
    sources = _sources(config, file.inside, arguments, openmmlab, found.beside)
    preprocessing = _preprocessing(config.in_chans, sources, found.is_official, given, notes)
    names = None
    if config.num_classes and not {"class_names", "out_indices"} & given.keys():
        meta["classes"] = meta.get("CLASSES", meta.get("classes"))
        places = (
            ("the file", arguments),
            ("the file's meta", meta),
            ("the file's meta", _table(meta.get("dataset_meta"))),
            (CONFIG, {"label_names": config_json.get("labels"), **config_json}),
            (f"pretrained_cfg in {CONFIG}", _table(config_json.get("pretrained_cfg"))),
        )
        names = _class_names(config.num_classes, places, notes)
    return replace(config, **said), preprocessing, names, tuple(notes)


def _table(value: object) -> dict[str, Any]:
    value = vars(value) if isinstance(value, argparse.Namespace) else value
    return {str(key): inner for key, inner in value.items()} if isinstance(value, Mapping) else {}


# --- the network ---------------------------------------------------------------------------


def _require(where: str, told: Values, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse the first field that says what the network is not."""
    for key, values in allowed.items():
        if told.get(key) not in (None, *values):
            fits, said = " or ".join(map(str, values)), reprlib.repr(told[key])
            wrong = f"T{where[1:]} says {key} {said}; what fits this network is {fits}."
            apart = ", or move the weights out of its folder" if _BESIDE in where else ""
            raise CheckpointError(wrong, f"Correct or take out '{key}'{apart}.")


def _from_json(config: VanConfig, beside: Values, notes: list[str]) -> dict[str, Any]:
    """Return what a ``config.json`` adds to the tensors, and hold the rest against them."""
    where = f"the {CONFIG}{_BESIDE}"
    if not _NETWORK & beside.keys():
        notes += [f"{where} is of no network: not used for one"] if beside else []
        return {}
    arguments, cfg = beside.get("model_args") or {}, beside.get("pretrained_cfg") or {}
    first, *_ = (cfg or beside).get("input_size") or [None]
    told = {**beside, "in_chans": first, **arguments}
    told = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items() if v is not None}
    name = str(told.get("architecture", "")).partition(".")[0]
    own = name.startswith("van") and name not in VARIANTS  # not one of timm's and ours
    told["architecture"] = name or None
    strides, eps = told.get("strides", config.strides), told.get("layer_norm_eps", 1e-6)
    sound = isinstance(strides, tuple) and len(strides) == len(config.depths)
    sound = sound and all(type(stride) is int and 1 <= stride <= 8 for stride in strides)
    facts = {
        **{key: (getattr(config, name),) for key, name in _TOLD.items()},
        # a backbone's file may say of how many classes its head was
        "num_classes": (config.num_classes or told.get("num_classes"),),
        "num_features": (config.embed_dims[-1],),
        "architecture": (name if own else config.variant,),
        "model_type": ("van",),
        "strides": (strides if sound else "four numbers from 1 to 8",),
        "layer_norm_eps": (eps if type(eps) is float and 0 < eps < 1 else "between 0 and 1",),
        "problem_type": _PROBLEM_TYPES,
        **_ALLOWED,
    }
    _require(where, told, facts)

    def unknown(keys: Iterable[str]) -> str:
        strange = [key[:50] for key in keys if key not in facts and not _IDLE.fullmatch(key)]
        return ", ".join(strange[:10])

    if refused := unknown([*arguments, *(key for key, value in cfg.items() if value)]):
        wrong = f"In {where}, model_args or pretrained_cfg have what is not supported: {refused}."
        raise CheckpointError(wrong, "Correct it, or move the weights out of its folder.")
    found = {key: told[key] for key in ("strides", "layer_norm_eps", "problem_type") if key in told}
    taken = ", ".join(f"{key} {value}" for key, value in found.items())
    for told_of, what in (("from", taken), ("not known here, in", unknown(beside))):
        notes += [f"{told_of} {where}: {what}"] if what else []
    return found


def _from_openmmlab(config: Values) -> dict[str, Any]:
    model = config.get("model") or {}
    backbone, head = model.get("backbone") or {}, model.get("head") or {}
    _require(f"{_OWN} configuration", backbone, {"block_cfgs": ({},)})
    eps = (backbone.get("norm_cfg") or {}).get("eps")
    said: dict[str, Any] = {"layer_norm_eps": float(eps)} if eps else {}
    if str(head.get("type")).startswith("MultiLabel"):
        said["problem_type"] = "multi_label_classification"
    return said


# --- the preprocessing ---------------------------------------------------------------------


def _sources(
    config: VanConfig, inside: Values, arguments: Values, openmmlab: Values, beside: Values
) -> list[Source]:
    """Return what describes the preprocessing, the first of which counts."""
    written, processor = _table(inside.get("preprocessing")), beside.get(PROCESSOR, {})
    json = beside.get(CONFIG, {})
    has_size = _NETWORK & json.keys() and json.get("image_size") is not None
    sized = "architecture" in json or (has_size and not processor)
    said = any(arguments.get(key) not in (None, "") for key in processors.ARGUMENTS)
    openmmlab = {**openmmlab, "is_classifier": bool(config.num_classes)} if openmmlab else {}
    rows: tuple[Source, ...] = (
        (str(written.get("source", "the weights file")), dict, written),
        (f"{_OWN} training arguments", processors.from_arguments, arguments if said else {}),
        (f"{_OWN} configuration", processors.from_openmmlab, openmmlab),
        (f"the {PROCESSOR}{_BESIDE}", processors.from_processor, processor),
        (f"the {CONFIG}{_BESIDE}", processors.from_config, json if sized else {}),
    )
    return [row for row in rows if row[2]]


def _preprocessing(
    channels: int, sources: list[Source], official: bool, given: Collection[str], notes: list[str]
) -> Preprocessing:
    """Return the preprocessing of the first source, or the official one."""
    half = OFFICIAL.mean[:1] * channels
    default = replace(OFFICIAL, mean=half, std=half)
    if not sources:
        assumed = "assumed: the official weights' (nothing says another)"
        return default if official else replace(default, source=assumed)
    (first, read, values), others = sources[0], [name for name, _, _ in sources[1:]]
    try:
        said, decided = read(values).items(), {*given, "source"}
        found = {k: v for k, v in said if k not in decided and v not in (None, "", [], ())}
        if {"image_size", "crop_pct"} & set(given):
            found.pop("resize_size", None)
        assumed = ", ".join(key for key in _OPTIONS if key not in found and key not in given)
        rest = f" ({assumed}: assumed, the official weights')" if assumed else ""
        result = replace(default.override(**found), source=first + rest)
    except (UsageError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
        if not set(_OPTIONS) <= set(given):
            reason = e.message if isinstance(e, UsageError) else f"{str(e)[:200]}."
            wrong = f"{first[0].upper()}{first[1:]} cannot be followed: {reason}"
            raise CheckpointError(wrong, _SAY) from None
        result = default
    if first.endswith(_BESIDE) and official:
        if str(result) != str(default):
            told = f"the repository's JSON says {result}; the weights were trained with {default}"
            notes.append(f"{told}, which is used")
        return default
    if others or first.endswith(_BESIDE):
        rest = f"; not from {', '.join(others)}" if others else ""
        notes.append(f"preprocessing from {first}: {result}{rest}")
    return result


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
    if len(found) > 1:
        (one, where), (two, other), *_ = found.items()
        index = next(i for i, name in enumerate(one) if name != two[i])
        wrong = f"Class {index} is '{one[index]}' by {where}, and '{two[index]}' by {other}."
        raise CheckpointError(wrong, _LABELS)
    notes += [f"class names from {where}" for where in found.values()]
    return next(iter(found), None)


def _names_in(key: str, value: Any, place: str, classes: int) -> tuple[str, ...]:
    """Return the class names that a field holds, none where it holds none."""
    if not value or not isinstance(value, Mapping | list | tuple):
        return ()
    names: tuple[str, ...] = ()
    with contextlib.suppress(TypeError, ValueError, LookupError):
        named = value
        if isinstance(value, Mapping):
            pairs = [(i, n) if key != "class_to_idx" else (n, i) for i, n in value.items()]
            by_index = {int(index): name for index, name in pairs}
            named = [by_index[index] for index in range(len(value))]
        names = tuple(str(n) for n in named) if all(isinstance(n, str | int) for n in named) else ()
    if names and names == tuple(f"LABEL_{index}" for index in range(len(names))):
        return ()
    if classes == 1 and len(names) == 2:  # of two classes, one logit is the second's
        return names[1:]
    if len(names) != classes:
        wrong = f"{key} in {place} has {len(value)} entries, and the network {classes} classes."
        raise CheckpointError(wrong, _LABELS)
    return names
