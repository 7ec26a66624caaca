"""What configurations say of the network itself, held against its tensors.

Strides, LayerNorm's ``eps``, activations and the meaning of the logits are in
no state dict. They are read from Transformers' and timm's ``config.json``, from
mmpretrain's ``meta`` and from a training script's arguments; what these say
that the tensors tell too must be the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from van_deploy.errors import CheckpointError
from van_deploy.model.variants import VARIANTS, VanConfig, variant_of
from van_deploy.schema import Schema, validated

Values = Mapping[str, Any]

_EPS = {"mmpretrain": 1e-5}  # mmcv's build_norm_layer; the official code's and Transformers': 1e-6
_WHERE = "The config.json beside the weights"
_REMEDY = "Correct it, or move the weights out of its folder to do without it."

# Fields that change nothing at inference, or that are read elsewhere; and timm 1.0's.
_IDLE = re.compile(
    "architectures|(torch_)?dtype|transformers_version|_name_or_path|initializer_range"
    "|drop(_path|out)?_rate|layer_scale_init_value|id2label|label2id|label_(names|descriptions)"
    "|labels|license|tags|i(mg|mage)_size|pretrained_cfg|model_args"
)
_IDLE_IN_TIMM = re.compile(
    _IDLE.pattern
    + "|mean|std|interpolation|crop_(pct|mode|border_pixels)|((test_|min_)?input|(test_)?pool)_size"
    "|fixed_input_size|test_crop_pct|label_offset|url|file|state_dict|hf_hub_(id|filename)|source"
    "|tag|custom_load|first_conv|classifier|description|origin_url|paper_(name|ids)|notes"
)

# What timm's train.py arguments may be without changing the network.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("gp", "global_pool"), (None, "", "avg", "fast")),
    **dict.fromkeys(("bn_tf", "split_bn"), (None, False)),
    "bn_eps": (None, 1e-5),
    "model_kwargs": (None, {}),
}


class _Added(Schema):
    """The fields of a configuration that no tensor tells."""

    model_type: Literal["van"] = "van"
    hidden_act: Literal["gelu", "gelu_python"] = "gelu"
    global_pool: Literal["avg", ""] = "avg"
    strides: Annotated[
        tuple[Annotated[int, Field(ge=1, le=8)], ...], Field(min_length=4, max_length=4)
    ] = (4, 2, 2, 2)
    layer_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    problem_type: Literal[
        "single_label_classification", "multi_label_classification", "regression"
    ] = "single_label_classification"


def is_timm(config: Values) -> bool:
    """Return whether a ``config.json`` is timm's."""
    return "architecture" in config


def is_transformers(config: Values) -> bool:
    """Return whether a ``config.json`` is of a Transformers model."""
    return "model_type" in config or "hidden_sizes" in config


def network_said(
    config: VanConfig,
    source: str,
    arguments: Values,
    beside: Values,
    openmmlab: Values,
    layer_norm_eps: float | None = None,
) -> tuple[VanConfig, list[str]]:
    """Return the architecture with what configurations add to it, and what was taken.

    Args:
        config: the architecture as the tensors tell it.
        source: format of the tensors' names, which decides LayerNorm's default ``eps``.
        arguments: of the training script.
        beside: the ``config.json`` beside the weights, or empty.
        openmmlab: mmpretrain's configuration, as the file holds it, or empty.
        layer_norm_eps: what the caller decides, whatever is said.

    Raises:
        CheckpointError: a field contradicts the tensors, or is not supported.
    """
    notes = list(_of_arguments(config, arguments))
    said = _from_openmmlab(openmmlab)
    if is_timm(beside) or is_transformers(beside):
        found, unknown = _from_json(config, beside)
        said |= found
        taken = ", ".join(f"{key} {value}" for key, value in found.items())
        notes += [f"from the config.json beside the weights: {taken}"] if taken else []
        if unknown:
            names = ", ".join(unknown[:10])
            notes.append(f"not known here, in the config.json beside the weights: {names}")
    elif beside:
        notes.append("the config.json beside the weights is of no network: not used")
    if layer_norm_eps is not None:
        said["layer_norm_eps"] = layer_norm_eps
    elif "layer_norm_eps" not in said and source in _EPS:
        said["layer_norm_eps"] = _EPS[source]
        notes.append(
            f"LayerNorm's eps is {source}'s own {_EPS[source]:g}; the published weights were "
            "trained with 1e-06 (--layer-norm-eps)"
        )
    if config.num_classes == 1 and "problem_type" not in said:
        notes.append("one logit: nothing says whether of two classes or of a regression")
    return replace(config, **said), notes


def _from_json(config: VanConfig, beside: Values) -> tuple[dict[str, Any], list[str]]:
    """Return what a ``config.json`` adds to the tensors, and its fields that are unknown."""
    arguments, cfg = beside.get("model_args") or {}, beside.get("pretrained_cfg") or {}
    first, *_ = (cfg or beside).get("input_size") or [None]
    told = {**beside, "in_chans": first, **arguments}
    told = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items() if v is not None}
    name = str(told.get("architecture", "")).partition(".")[0]
    told["architecture"] = name or None
    facts = {
        **dict.fromkeys(("hidden_sizes", "embed_dims"), config.embed_dims),
        **dict.fromkeys(("num_channels", "in_chans"), config.in_chans),
        **{key: getattr(config, key) for key in ("depths", "patch_sizes", "mlp_ratios")},
        # a backbone's file may say of how many classes its head was
        "num_classes": config.num_classes or told.get("num_classes"),
        "dilation": config.lka_dilation,
        "num_features": config.embed_dims[-1],
        # one of timm's and ours, or the user's own
        "architecture": name if name not in VARIANTS and name[:3] == "van" else variant_of(config),
    }
    for key, fact in facts.items():
        if told.get(key) not in (None, fact):
            says = f"{key} {str(told[key])[:100]}"
            raise CheckpointError(f"{_WHERE} says {says}; the tensors have {fact}.", _REMEDY)
    stated = {key: value for key, value in told.items() if key in _Added.model_fields}
    found = validated(_Added, stated, where=_WHERE, error=CheckpointError, remedy=_REMEDY)
    known = facts.keys() | stated.keys()
    idle = _IDLE_IN_TIMM if is_timm(beside) else _IDLE
    changing = [*arguments, *(key for key, value in cfg.items() if value)]
    refused = [key for key in changing if key not in known and not idle.fullmatch(key)]
    if refused:
        where = "model_args" if refused[0] in arguments else "pretrained_cfg"
        raise CheckpointError(f"{_WHERE} has {refused[0][:50]} in {where}: not supported.", _REMEDY)
    unknown = [key[:50] for key in told if key not in known and not idle.fullmatch(key)]
    taken = ("strides", "layer_norm_eps", "problem_type")
    return {key: getattr(found, key) for key in taken if key in stated}, unknown


def _of_arguments(config: VanConfig, arguments: Values) -> Iterator[str]:
    """Yield notes on a training script's arguments; refuse those that change the network."""
    for key, harmless in _HARMLESS.items():
        if arguments.get(key) not in harmless:
            raise CheckpointError(
                f"The checkpoint's own arguments say {key} {str(arguments[key])[:100]}, which "
                "changes the network and is not supported.",
                f"If the network does without, take '{key}' out of the file.",
            )
    variant = variant_of(config)
    facts = {"in_chans": config.in_chans, "num_classes": config.num_classes, "model": variant}
    for key, actual in facts.items():
        stated = arguments.get(key)
        comparable = isinstance(stated, int) or str(stated) in VARIANTS
        if actual and comparable and stated != actual:
            yield f"the checkpoint's own arguments say {key} {stated}; the tensors have {actual}"
    if arguments.get("bce_loss"):
        yield "trained with --bce-loss: each logit is a class's own odds, not softmax's"
    if arguments.get("class_map"):
        file = str(arguments["class_map"])[:100]
        yield f"trained with --class-map {file}, which orders the classes: give --labels"


def _from_openmmlab(config: Values) -> dict[str, Any]:
    model = config.get("model") or {}
    backbone, head = model.get("backbone") or {}, model.get("head") or {}
    if backbone.get("block_cfgs"):
        raise CheckpointError(
            "The checkpoint's own configuration has block_cfgs, which are not supported.",
            "Pass weights of mmpretrain's VAN with its own blocks.",
        )
    eps = (backbone.get("norm_cfg") or {}).get("eps")
    said: dict[str, Any] = {"layer_norm_eps": float(eps)} if eps else {}
    if str(head.get("type")).startswith("MultiLabel"):
        said["problem_type"] = "multi_label_classification"
    return said
