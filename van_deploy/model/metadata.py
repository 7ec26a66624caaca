"""Read the metadata of a checkpoint: from the file itself and the JSON files beside it.

A state dict does not contain strides, LayerNorm's ``eps``, the meaning of the
logits, the preprocessing or the class names. They are in the file (a training
script's ``args``, ``class_to_idx``, mmpretrain's ``meta``, safetensors metadata)
and in the ``config.json`` and ``preprocessor_config.json`` beside it. Every field
that changes the network, its input or the meaning of its output is used, or is
an error that names it; notes list the values used.

The JSON of the authors' own Transformers conversions is known to be incorrect:
the conversion script uploaded ConvNeXt's processor with weights trained with
0.5/0.5/0.9 (VAN-Classification issues 2 and 16). For these repositories the
official values are used, and a note shows the difference.
"""

import argparse
import contextlib
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from timm.models import PretrainedCfg
from torch import Tensor

from van_deploy.errors import CheckpointError, UsageError
from van_deploy.model import processors
from van_deploy.model.files import CONFIG, PROCESSOR, WeightsFile
from van_deploy.model.keys import Checkpoint
from van_deploy.model.preprocess import OFFICIAL, Preprocessing
from van_deploy.model.variants import STAGES, VARIANTS, VanConfig

Values = Mapping[str, Any]
# Name, reader and content of a source of preprocessing values.
Source = tuple[str, Callable[[Values], dict[str, Any]], Values]

# Keys of class names: lists, tables by index, and tables of indices.
_NAMES_KEY = re.compile(
    "class_names|classes|CLASSES|label_names|(idx|id|index)(_to_|2)(class|label)"
    "|(?P<is_inverse>(class|label)(_to_|2)(idx|id|index))"
)
# Tables of training arguments in a file: of timm, Lightning and others.
_ARGUMENT_TABLES: tuple[str, ...] = ("args", "opt", "cfg", "config", "hparams")
_ARGUMENT_TABLES += ("hyper_parameters", "datamodule_hyper_parameters")
_MAX_TENSOR_LENGTH = 1000  # of a mean; longer tensors are weights
_OPTIONS = ("image_size", "mean", "std", "interpolation", "crop_pct")
_BESIDE, _OWN = " beside the weights", "the checkpoint's own"
_PREPROCESSING_HINT = "Give all of --image-size --mean --std --interpolation --crop-pct."
_LABELS_HINT = "Give --labels FILE, with one class name per line in the order of the logits."
_MMCV_EPS = 1e-5  # build_norm_layer's default; the official code's and Transformers' is 1e-6

_PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
_NETWORK_VALUES = ("strides", "layer_norm_eps", "problem_type")  # that tensors lack
# A config.json with one of these keys describes a network.
_NETWORK_KEYS = {"architecture", "model_type", "hidden_sizes"}
# Keys whose values follow from the tensors, and the attribute of VanConfig that they must equal.
_TENSOR_KEYS = {n: n for n in ("embed_dims", "in_chans", "depths", "patch_sizes", "mlp_ratios")}
_TENSOR_KEYS |= {"hidden_sizes": "embed_dims", "num_channels": "in_chans"}
_TENSOR_KEYS |= dict.fromkeys(("dilation", "lka_dilation"), "lka_dilation")
# Supported values of other keys, in a config.json or in training arguments.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu", "gelu_python"),
    **dict.fromkeys(("gp", "global_pool"), ("avg", "fast", "")),
    **dict.fromkeys(("bn_tf", "split_bn"), (False,)),
    "bn_eps": (1e-5,),
    "model_kwargs": ({},),
}
_TRAINING_NOTES = {
    "bce_loss": "trained with --bce-loss: each logit is an independent sigmoid, not softmax",
    "class_map": "trained with --class-map, which sets the order of the classes: give --labels",
}
# Keys of Transformers and timm that do not affect inference, or that are read elsewhere.
_IGNORED = re.compile(
    "architectures|(torch_)?dtype|transformers_version|_name_or_path|initializer_range|labels|tags"
    "|drop(_path|out)?_rate|layer_scale_init_value|id2label|label2id|i(mg|mage)_size|pretrained_cfg"
    "|model_args|crop_border_pixels|"
    + "|".join((*_NETWORK_VALUES, *_ALLOWED, *(field.name for field in fields(PretrainedCfg))))
)


def read_metadata(
    config: VanConfig, checkpoint: Checkpoint, file: WeightsFile, overrides: Mapping[str, Any]
) -> tuple[VanConfig, Preprocessing, tuple[str, ...] | None, tuple[str, ...]]:
    """Return the architecture, preprocessing, class names and notes of a checkpoint.

    The architecture includes the values that only the metadata has. Class names are in the
    order of the logits, or None if unknown. The notes list the sources of the values used,
    and warnings for the user.

    Args:
        config: the architecture that follows from the tensors.
        checkpoint: its content; its format sets the default of LayerNorm's ``eps``.
        file: the weights file, with the JSON files beside it.
        overrides: values that replace those of the metadata, which are not validated then:
            values of the preprocessing, ``class_names`` and ``layer_norm_eps``.

    Raises:
        CheckpointError: a field contradicts the tensors or another field, or is not supported.
    """
    content = checkpoint.content
    tables = {f"the file's {name}": _as_dict(content.get(name)) for name in _ARGUMENT_TABLES}
    tables = {"the file": _as_dict(content), **tables}
    arguments = {key: value for table in tables.values() for key, value in table.items()}
    meta, config_json = _as_dict(content.get("meta")), file.configs.get(CONFIG, {})
    openmmlab = processors.parse_python_config(meta.get("cfg", meta.get("config")))
    notes = [note for key, note in _TRAINING_NOTES.items() if arguments.get(key)]
    for key in (*processors.ARGUMENT_KEYS, *_NETWORK_VALUES, *_ALLOWED):
        found = {place: reprlib.repr(table[key]) for place, table in tables.items() if key in table}
        if len({*found.values()}) > 1:
            text = ", ".join(f"{value} in {place}" for place, value in found.items())
            notes.append(f"{key} is {text}: the last one has priority")
    values = _read_network(f"{_OWN} arguments", arguments, notes)
    values |= _read_openmmlab(openmmlab) | _read_config_json(config, config_json, notes)
    if "layer_norm_eps" in overrides:
        values["layer_norm_eps"] = overrides["layer_norm_eps"]
    elif "layer_norm_eps" not in values and checkpoint.format == "mmpretrain":
        values["layer_norm_eps"] = _MMCV_EPS
        note = f"LayerNorm's eps is mmpretrain's default {_MMCV_EPS:g}; the published weights"
        notes.append(f"{note} were trained with 1e-06 (--layer-norm-eps)")
    if config.num_classes == 1 and "problem_type" not in values:
        notes.append("one logit: it is unknown whether of two classes or of a regression")
    sources = _preprocessing_sources(config, content, arguments, openmmlab, file.configs)
    preprocessing = _read_preprocessing(config, file, sources, overrides, notes)
    names = None
    if config.num_classes and not {"class_names", "out_indices"} & overrides.keys():
        places = (
            *tables.items(),
            ("the file's meta", meta),
            ("the file's meta", _as_dict(meta.get("dataset_meta"))),
            (CONFIG, {"label_names": config_json.get("labels"), **config_json}),
            (f"pretrained_cfg in {CONFIG}", _as_dict(config_json.get("pretrained_cfg"))),
        )
        names = _read_class_names(config.num_classes, places, notes)
    return replace(config, **values), preprocessing, names, tuple(notes)


def _as_dict(value: object) -> dict[str, Any]:
    """Return a table's values that are not None, arrays and short tensors as lists."""
    value = vars(value) if isinstance(value, argparse.Namespace) else value
    items = value.items() if isinstance(value, Mapping) else ()
    return {str(key): _as_list(inner) for key, inner in items if inner is not None}


def _as_list(value: Any) -> Any:
    """Return an array's values as a list, and a scalar's as a number; anything else unchanged."""
    if isinstance(value, Tensor) and value.numel() <= _MAX_TENSOR_LENGTH:
        is_plain = value.layout == torch.strided and value.is_cpu and not value.is_quantized
        value = np.array(value.tolist()) if is_plain else value
    if isinstance(value, np.ndarray | np.generic):
        return value.ravel().tolist() if value.ndim else value.item()
    return value


# --- the network ---------------------------------------------------------------------------


def _check_values(where: str, values: Values, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise an error for the first value that is not allowed."""
    for key, expected in allowed.items():
        if values.get(key) not in (None, *expected):
            options, value = " or ".join(map(str, expected)), reprlib.repr(values[key])
            message = f"{key} is {value} in {where}; this network needs {options}."
            move = ", or move the weights out of its folder" if _BESIDE in where else ""
            raise CheckpointError(message, f"Correct or remove '{key}'{move}.")


def _table(where: str, values: Values, key: str) -> Values:
    """Return the table at ``key``, empty if there is none; any other value is an error."""
    table = values.get(key) or {}
    _check_values(where, {key: table}, {key: (table if isinstance(table, Mapping) else "a table",)})
    return table


def _valid_eps(eps: object) -> tuple[object]:
    return (eps if type(eps) is float and 0 < eps < 1 else "between 0 and 1",)


def _valid_strides(strides: object) -> tuple[object]:
    numbers = strides if isinstance(strides, tuple) else ()
    valid = all(type(number) is int and 1 <= number <= 8 for number in numbers)
    return (strides if valid and len(numbers) == STAGES else "four numbers from 1 to 8",)


def _read_network(where: str, values: Values, notes: list[str]) -> dict[str, Any]:
    """Return the values of a table that belong to the network and that its tensors lack.

    Invalid ones are an error in a ``config.json``, which describes this network. Training
    arguments may mean something else by the name, such as the strides of a detector's anchors.
    """
    _check_values(where, values, _ALLOWED)
    used = {key: values[key] for key in _NETWORK_VALUES if key in values}
    used |= {key: tuple(value) for key, value in used.items() if isinstance(value, list)}
    eps, strides = _valid_eps(used.get("layer_norm_eps")), _valid_strides(used.get("strides"))
    allowed = {"strides": strides, "layer_norm_eps": eps, "problem_type": _PROBLEM_TYPES}
    if _BESIDE in where:
        _check_values(where, used, allowed)
    others = {key: reprlib.repr(value) for key, value in used.items() if value not in allowed[key]}
    notes += [f"{k} is {v} in {where}, not a VAN's: it is not used" for k, v in others.items()]
    used = {key: value for key, value in used.items() if key not in others}
    text = ", ".join(f"{key} {value}" for key, value in used.items())
    notes += [f"from {where}: {text}"] if used else []
    return used


def _read_config_json(config: VanConfig, content: Values, notes: list[str]) -> dict[str, Any]:
    """Return the values that a ``config.json`` adds, and check its others against the tensors."""
    where = f"the {CONFIG}{_BESIDE}"
    if not _NETWORK_KEYS & content.keys():
        notes += [f"{where} does not describe a network and is not used"] if content else []
        return {}
    arguments, cfg = (_table(where, content, key) for key in ("model_args", "pretrained_cfg"))
    size = (cfg or content).get("input_size") or [None]
    values = {**content, "input_size[0]": size[0] if isinstance(size, list) else size, **arguments}
    values["label_offset"] = (cfg or content).get("label_offset")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if v is not None}
    name = str(values.get("architecture", "")).partition(".")[0]
    is_custom = name.startswith("van") and name not in VARIANTS
    values["architecture"] = name or None
    allowed = {
        **{key: (getattr(config, attribute),) for key, attribute in _TENSOR_KEYS.items()},
        # a backbone's file may still have the number of classes of its head
        "num_classes": (config.num_classes or values.get("num_classes"),),
        "num_features": (config.embed_dims[-1],),
        "input_size[0]": (config.in_chans,),
        "architecture": (name if is_custom else config.variant,),
        "model_type": ("van",),
        "label_offset": (0,),
    }
    _check_values(where, values, allowed)
    used = _read_network(where, values, notes)
    inner = [*arguments, *(key for key, value in cfg.items() if value)]
    unsupported, others = (
        ", ".join([k[:50] for k in keys if k not in allowed and not _IGNORED.fullmatch(k)][:10])
        for keys in (inner, content)
    )
    if unsupported:
        message = f"In {where}, model_args or pretrained_cfg have unsupported keys: {unsupported}."
        raise CheckpointError(message, "Correct it, or move the weights out of its folder.")
    if others:
        notes.append(f"unknown keys in {where}: {others}")
    return used


def _read_openmmlab(config: Values) -> dict[str, Any]:
    where = f"{_OWN} configuration"
    model = _table(where, config, "model")
    backbone, head = _table(where, model, "backbone"), _table(where, model, "head")
    norm = _table(where, backbone, "norm_cfg")
    eps, is_layer_norm = norm.get("eps"), norm.get("type", "LN") == "LN"
    valid = _valid_eps(eps) if is_layer_norm else _ALLOWED["bn_eps"]  # OpenMMLab's segmenters
    _check_values(where, {**backbone, "eps": eps}, {"block_cfgs": ({},), "eps": valid})
    values: dict[str, Any] = {"layer_norm_eps": eps} if eps and is_layer_norm else {}
    if str(head.get("type")).startswith("MultiLabel"):
        values["problem_type"] = "multi_label_classification"
    return values


# --- the preprocessing ---------------------------------------------------------------------


def _preprocessing_sources(
    config: VanConfig, content: Values, arguments: Values, openmmlab: Values, configs: Values
) -> list[Source]:
    """Return the sources of preprocessing values in order of priority."""
    metadata = _as_dict(content.get("preprocessing"))
    processor, json = configs.get(PROCESSOR, {}), configs.get(CONFIG, {})
    has_size = _NETWORK_KEYS & json.keys() and json.get("image_size") is not None
    use_json = "architecture" in json or (has_size and not processor)
    if not config.num_classes:  # a segmenter's or detector's images are cropped in training only
        arguments = {key: value for key, value in arguments.items() if key != "crop_size"}
    has_arguments = any(arguments.get(key) not in (None, "") for key in processors.ARGUMENT_KEYS)
    arguments = arguments if has_arguments else {}
    openmmlab = {**openmmlab, "is_classifier": bool(config.num_classes)} if openmmlab else {}
    sources: tuple[Source, ...] = (
        (str(metadata.get("source", "the weights file")), dict, metadata),
        (f"{_OWN} training arguments", processors.from_arguments, arguments),
        (f"{_OWN} configuration", processors.from_openmmlab, openmmlab),
        (f"the {PROCESSOR}{_BESIDE}", processors.from_processor, processor),
        (f"the {CONFIG}{_BESIDE}", processors.from_config, json if use_json else {}),
    )
    return [source for source in sources if source[2]]


def _read_preprocessing(
    config: VanConfig, file: WeightsFile, sources: list[Source], overrides: Values, notes: list[str]
) -> Preprocessing:
    """Return the preprocessing of the first source, or the official one."""
    half = OFFICIAL.mean[:1] * config.in_chans
    default = replace(OFFICIAL, mean=half, std=half)
    if not sources:
        assumed = "assumed: the official weights' (no known metadata)"
        return default if file.is_official else replace(default, source=assumed)
    (source, read, content), others = sources[0], [name for name, _, _ in sources[1:]]
    try:
        items, ignored = read(content).items(), {*overrides, "source"}
        values = {k: v for k, v in items if k not in ignored and v not in (None, "", [], ())}
        if {"image_size", "crop_pct"} & overrides.keys():
            values.pop("resize_size", None)
        assumed = ", ".join(k for k in _OPTIONS if k not in values and k not in overrides)
        suffix = f" ({assumed}: assumed, the official weights')" if assumed else ""
        result = replace(default.override(**values), source=source + suffix)
    except (UsageError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
        if not overrides.keys() >= set(_OPTIONS):
            reason = e.message if isinstance(e, UsageError) else f"{str(e)[:200]}."
            message = f"{source[0].upper()}{source[1:]} cannot be used: {reason}"
            raise CheckpointError(message, _PREPROCESSING_HINT) from None
        result = default
    if source.endswith(_BESIDE) and file.is_official:
        if str(result) != str(default):
            note = f"the repository's JSON has {result}; the weights were trained with {default}"
            notes.append(f"{note}, which is used")
        return default
    if others or source.endswith(_BESIDE):
        suffix = f"; not from {', '.join(others)}" if others else ""
        notes.append(f"preprocessing from {source}: {result}{suffix}")
    return result


# --- the classes ---------------------------------------------------------------------------


def _read_class_names(
    classes: int, tables: tuple[tuple[str, Values], ...], notes: list[str]
) -> tuple[str, ...] | None:
    """Return the class names; all sources must agree."""
    sources: dict[tuple[str, ...], str] = {}
    for table, values in tables:
        for key, value in values.items():
            match = _NAMES_KEY.fullmatch(key)
            if not match or (key == "label2id" and "id2label" in values):  # without repeated names
                continue
            if isinstance(value, str | set) and value:
                notes.append(f"{key} in {table} is not a list or a table, and is not used")
            where = f"{key} in {table}"
            if names := _parse_class_names(value, bool(match["is_inverse"]), where, classes):
                sources.setdefault(names, where)
    if len(sources) > 1:
        (one, where), (two, other), *_ = sources.items()
        index = next(i for i, name in enumerate(one) if name != two[i])
        message = f"Class {index} is '{one[index]}' in {where}, but '{two[index]}' in {other}."
        raise CheckpointError(message, _LABELS_HINT)
    notes += [f"class names from {where}" for where in sources.values()]
    return next(iter(sources), None)


def _parse_class_names(value: Any, inverse: bool, where: str, classes: int) -> tuple[str, ...]:
    """Return the class names in a field, empty if it has none."""
    if not value or not isinstance(value, Mapping | list | tuple):
        return ()
    names: tuple[str, ...] = ()
    with contextlib.suppress(TypeError, ValueError, LookupError):
        items = value
        if isinstance(value, Mapping):
            pairs = [(i, n) if inverse else (n, i) for n, i in value.items()]
            by_index = {int(index): name for index, name in pairs}
            items = [by_index[index] for index in range(len(value))]
        names = tuple(map(str, items)) if all(isinstance(n, str | int) for n in items) else ()
    if names and names == tuple(f"LABEL_{index}" for index in range(len(names))):
        return ()
    if classes == 1 and len(names) == 2:  # one logit of two classes is the second class's
        return names[1:]
    if len(names) != classes:
        entries = f"{where} ({len(value)} entries: {reprlib.repr(value)})"
        message = f"{entries} does not name each of the network's {classes} classes."
        raise CheckpointError(message, _LABELS_HINT)
    return names
