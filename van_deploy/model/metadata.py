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
import dataclasses
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from timm.models import PretrainedCfg

from van_deploy.errors import CheckpointError, UsageError
from van_deploy.model import processors
from van_deploy.model.files import CONFIG, PROCESSOR, Found
from van_deploy.model.keys import Weights
from van_deploy.model.preprocess import OFFICIAL, Preprocessing
from van_deploy.model.variants import VARIANTS, VanConfig

Values = Mapping[str, Any]
Source = tuple[str, Callable[[Values], dict[str, Any]], Values]
"""What it is called, how it is read, and what is read."""

_NAMES = ("class_to_idx", "idx_to_class", "id2label", "class_names", "classes", "label_names")
_OPTIONS = ("image_size", "mean", "std", "interpolation", "crop_pct")
_BESIDE = " beside the weights"
_SAY = "Say yourself what the weights want: --image-size --mean --std --interpolation --crop-pct."
_LABELS = "Give the names yourself, one a line in the logits' order: --labels FILE."
_CORRECT = "Correct it, or move the weights out of its folder to do without it."
_EPS = {"mmpretrain": 1e-5}  # mmcv's build_norm_layer; the official code's and Transformers': 1e-6

_PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
# What the tensors tell, and what others call it.
_TOLD = ("embed_dims", "in_chans", "depths", "patch_sizes", "mlp_ratios", "lka_dilation")
_CALLED = {"hidden_sizes": "embed_dims", "num_channels": "in_chans", "dilation": "lka_dilation"}
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
    "|model_args|crop_border_pixels|" + "|".join(f.name for f in dataclasses.fields(PretrainedCfg))
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
    _require("The checkpoint's own arguments", arguments, _ALLOWED)
    notes = [note for key, note in _NOTED.items() if arguments.get(key)]
    said = _from_openmmlab(openmmlab)
    is_network = bool({"architecture", "model_type", "hidden_sizes"} & config_json.keys())
    if is_network:
        said |= _from_json(config, config_json, notes)
    elif config_json:
        notes.append(f"the {CONFIG}{_BESIDE} is of no network: not used for one")
    if "layer_norm_eps" in given:
        said["layer_norm_eps"] = given["layer_norm_eps"]
    elif "layer_norm_eps" not in said and file.format in _EPS:
        said["layer_norm_eps"] = _EPS[file.format]
        notes.append(
            f"LayerNorm's eps is {file.format}'s own {_EPS[file.format]:g}; the published weights "
            "were trained with 1e-06 (--layer-norm-eps)"
        )
    if config.num_classes == 1 and "problem_type" not in said:
        notes.append("one logit: nothing says whether of two classes or of a regression")
    config = replace(config, **said)
    written, kept = _table(file.inside.get("preprocessing")), found.beside.get(PROCESSOR, {})
    has_size = config_json.get("image_size") is not None and not kept
    sized = "architecture" in config_json or (is_network and has_size)
    from_args = any(arguments.get(key) not in (None, "") for key in processors.ARGUMENTS)
    from_openmmlab = partial(processors.from_openmmlab, classifier=bool(config.num_classes))
    sources: list[Source] = [
        (str(written.get("source", "the weights file")), dict, written),
        (
            "the checkpoint's own training arguments",
            processors.from_arguments,
            arguments if from_args else {},
        ),
        ("the checkpoint's own configuration", from_openmmlab, openmmlab),
        (f"the {PROCESSOR}{_BESIDE}", processors.from_processor, kept),
        (f"the {CONFIG}{_BESIDE}", processors.from_config, config_json if sized else {}),
    ]
    sources = [row for row in sources if row[2]]
    preprocessing = _preprocessing(config.in_chans, sources, found.is_official, given, notes)
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
    value = vars(value) if isinstance(value, argparse.Namespace) else value
    return {str(key): inner for key, inner in value.items()} if isinstance(value, Mapping) else {}


# --- the network ---------------------------------------------------------------------------


def _require(where: str, told: Values, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse the first field that says what the network is not."""
    for key, values in allowed.items():
        if told.get(key) not in (None, *values):
            raise CheckpointError(
                f"{where} says {key} {reprlib.repr(told[key])}; what fits this network is "
                f"{' or '.join(map(str, values))}.",
                _CORRECT if _BESIDE in where else f"If that is not so, take '{key}' out of it.",
            )


def _from_json(config: VanConfig, beside: Values, notes: list[str]) -> dict[str, Any]:
    """Return what a ``config.json`` adds to the tensors, and hold the rest against them."""
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
    names = {key: _CALLED.get(key, key) for key in told}
    facts = {
        **{key: (getattr(config, name),) for key, name in names.items() if name in _TOLD},
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
    where = f"The {CONFIG}{_BESIDE}"
    _require(where, told, facts)

    def unknown(keys: Iterable[str]) -> str:
        strange = [key[:50] for key in keys if key not in facts and not _IDLE.fullmatch(key)]
        return ", ".join(strange[:10])

    if refused := unknown([*arguments, *(key for key, value in cfg.items() if value)]):
        raise CheckpointError(
            f"{where} has in model_args or pretrained_cfg what is not supported: {refused}.",
            _CORRECT,
        )
    found = {key: told[key] for key in ("strides", "layer_norm_eps", "problem_type") if key in told}
    taken = ", ".join(f"{key} {value}" for key, value in found.items())
    for told_of, what in (("from", taken), ("not known here, in", unknown(beside))):
        notes += [f"{told_of} the {CONFIG}{_BESIDE}: {what}"] if what else []
    return found


def _from_openmmlab(config: Values) -> dict[str, Any]:
    model = config.get("model") or {}
    backbone, head = model.get("backbone") or {}, model.get("head") or {}
    _require("The checkpoint's own configuration", backbone, {"block_cfgs": ({},)})
    eps = (backbone.get("norm_cfg") or {}).get("eps")
    said: dict[str, Any] = {"layer_norm_eps": float(eps)} if eps else {}
    if str(head.get("type")).startswith("MultiLabel"):
        said["problem_type"] = "multi_label_classification"
    return said


# --- the preprocessing ---------------------------------------------------------------------


def _preprocessing(
    channels: int, sources: list[Source], official: bool, given: Collection[str], notes: list[str]
) -> Preprocessing:
    """Return the preprocessing of the first source, or the official one."""
    half = OFFICIAL.mean[:1] * channels
    default = replace(OFFICIAL, mean=half, std=half)
    if not sources:
        assumed = replace(default, source="assumed: the official weights' (nothing says another)")
        return default if official else assumed
    result = _built(sources[0], default, given)
    first, *others = (name for name, _, _ in sources)
    if first.endswith(_BESIDE) and official:
        if str(result) != str(default):
            notes.append(
                f"the repository's JSON says {result}; the weights were trained with {default}, "
                "which is used"
            )
        return default
    if others or first.endswith(_BESIDE):
        rest = f"; not from {', '.join(others)}" if others else ""
        notes.append(f"preprocessing from {first}: {result}{rest}")
    return result


def _built(source: Source, default: Preprocessing, given: Collection[str]) -> Preprocessing:
    """Return the preprocessing that a source describes; what it leaves out is the default's."""
    name, read, values = source
    try:
        found = {
            key: value
            for key, value in read(values).items()
            if key not in (*given, "source") and value not in (None, "", [], ())
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
        if all(isinstance(name, str | int) for name in named):
            names = tuple(map(str, named))
    if names == tuple(f"LABEL_{index}" for index in range(len(names))) != ():
        return ()
    if classes == 1 and len(names) == 2:  # of two classes, one logit is the second's
        return names[1:]
    if len(names) != classes:
        raise CheckpointError(
            f"{key} in {place} has {len(value)} entries; it does not name each of the network's "
            f"{classes} classes.",
            _LABELS,
        )
    return names
