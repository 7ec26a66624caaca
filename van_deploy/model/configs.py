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
from van_deploy.model.architecture import variant_of
from van_deploy.model.variants import VARIANTS, VanConfig
from van_deploy.schema import Schema, validated

__all__ = ["is_timm", "is_transformers", "network_said"]

Values = Mapping[str, Any]
Stride = Annotated[int, Field(ge=1, le=8)]

_EPS = {"mmpretrain": 1e-5}  # mmcv's build_norm_layer; the official code's and Transformers': 1e-6
_WHERE = "The config.json beside the weights"
_REMEDY = "Correct it, or move the weights out of its folder to do without it."

# Fields that change nothing at inference, or that are read elsewhere.
_IDLE = re.compile(
    "architectures|(torch_)?dtype|transformers_version|_name_or_path|initializer_range"
    "|drop(_path|out)?_rate|layer_scale_init_value|id2label|label2id|label_(names|descriptions)"
    "|labels|license|tags|img_size|image_size|pretrained_cfg|model_args"
)

# What other values change nothing in timm's train.py arguments.
_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "gp": (None, "", "avg", "fast"),
    "global_pool": (None, "", "avg", "fast"),
    "bn_eps": (None, 1e-5),
    "bn_tf": (None, False),
    "split_bn": (None, False),
    "model_kwargs": (None, {}),
}


class _Added(Schema):
    """The fields of a configuration that no tensor tells."""

    model_type: Literal["van"] = "van"
    hidden_act: Literal["gelu", "gelu_python"] = "gelu"
    global_pool: Literal["avg", ""] = "avg"
    strides: Annotated[tuple[Stride, ...], Field(min_length=4, max_length=4)] = (4, 2, 2, 2)
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
    arguments = beside.get("model_args") or {}
    first, *_ = (beside.get("pretrained_cfg") or beside).get("input_size") or [None]
    fields = {**beside, "in_chans": first, **arguments}
    told = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    architecture = str(told.get("architecture", "")).partition(".")[0]
    named = architecture in VARIANTS or not architecture.startswith("van")
    facts: dict[str, Any] = {
        **dict.fromkeys(("hidden_sizes", "embed_dims"), config.embed_dims),
        **dict.fromkeys(("num_channels", "in_chans"), config.in_chans),
        **{key: getattr(config, key) for key in ("depths", "patch_sizes")},
        **({"num_classes": config.num_classes} if config.num_classes else {}),
        "mlp_ratios": _ratios(config, told.get("mlp_ratios")),
        "dilation": config.lka_dilation,
        "num_features": config.embed_dims[-1],
        "architecture": variant_of(config) if named else architecture,
    }
    told["architecture"] = architecture or None
    if not config.num_classes:  # a backbone's file may say of how many classes its head was
        told.pop("num_classes", None)
    added = {key: value for key, value in told.items() if key in _Added.model_fields}
    unknown = []
    for key, value in told.items():
        if value is None or key in added or _IDLE.fullmatch(key):
            continue
        if key in arguments and key not in facts:
            raise CheckpointError(f"{_WHERE} has {key} in model_args: not supported.", _REMEDY)
        if key in facts and value != facts[key]:
            raise CheckpointError(
                f"{_WHERE} says {key} {str(value)[:100]}; the tensors have {facts[key]}.", _REMEDY
            )
        unknown += [] if key in facts else [key[:50]]
    stated = {key: value for key, value in added.items() if value is not None}
    found = validated(_Added, stated, where=_WHERE, error=CheckpointError, remedy=_REMEDY)
    taken = ("strides", "layer_norm_eps", "problem_type")
    return {key: getattr(found, key) for key in taken if key in stated}, unknown


def _ratios(config: VanConfig, stated: Any) -> Any:
    """Return the MLP ratios as they were stated, if they give the tensors' widths."""
    try:
        same = replace(config, mlp_ratios=stated).hidden_dims == config.hidden_dims
    except (TypeError, ValueError):
        same = False
    return stated if same else config.mlp_ratios


def _of_arguments(config: VanConfig, arguments: Values) -> Iterator[str]:
    """Yield notes on a training script's arguments; refuse those that change the network."""
    for key, harmless in _DEFAULTS.items():
        if arguments.get(key) not in harmless:
            raise CheckpointError(
                f"The checkpoint's own arguments say {key} {str(arguments[key])[:100]}, which "
                "changes the network and is not supported.",
                f"If the network does without, take '{key}' out of the file.",
            )
    variant = variant_of(config)
    facts = {"in_chans": config.in_chans, "model": variant}
    facts |= {"num_classes": config.num_classes} if config.num_classes else {}
    for key, actual in facts.items():
        stated = arguments.get(key)
        if stated != actual and (isinstance(stated, int) or (stated in VARIANTS and variant)):
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
