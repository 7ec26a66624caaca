"""Tensor names of the three formats VAN weights come in: found, told apart, translated.

========  ==============================================  ==========================
format    written by                                      a name
========  ==============================================  ==========================
official  ``Visual-Attention-Network/VAN-Classification``  ``block1.0.attn.proj_1.weight``
transformers  ``VanForImageClassification`` (up to 4.x)   ``van.encoder.stages.0.layers.0…``
mmpretrain  ``mmpretrain/models/backbones/van.py``        ``backbone.blocks1.0.attn.proj_1…``
========  ==============================================  ==========================

A network is found by its Large Kernel Attention, whatever stands before its
names: ``module.``, ``_orig_mod.``, ``model.``, ``net.`` or anything else. Nothing
is dropped unnamed: a tensor is the network's, known to take no part, or
handed back for the load to complain about.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from van_deploy.errors import CheckpointError, UsageError

__all__ = ["FORMATS", "STAGES", "Translation", "networks_in", "translate_keys"]

STAGES = 4
FORMATS = ("official", "transformers", "mmpretrain")

# One row a module or bare parameter: official name, and the other two's; the letters stand
# for what _modules puts in. The convolution that no other network has is written out, with
# {s} the stage from 1 ({z}: from 0) and {b} the block.
_LKA = (
    "block{s}.{b}.attn.spatial_gating_unit.conv_spatial",
    "encoder.stages.{z}.layers.{b}.attention.attention_layer.attention.depth_wise_dilated",
    "blocks{s}.{b}.attn.spatial_gating_unit.DW_D_conv",
)
_ROWS = (
    ("patch_embed{s}.proj", "{t}.embeddings.convolution", "patch_embed{s}.projection"),
    ("patch_embed{s}.norm", "{t}.embeddings.normalization", "patch_embed{s}.norm"),
    ("norm{s}", "{t}.normalization", "norm{s}"),
    ("{o}.norm1", "{l}.pre_normomalization", "{m}.norm1"),
    ("{o}.attn.proj_1", "{l}.attention.pre_projection.conv", "{m}.attn.proj_1"),
    ("{o}.{g}.conv0", "{l}.{a}.depth_wise", "{m}.{g}.DW_conv"),
    ("{o}.{g}.conv_spatial", "{l}.{a}.depth_wise_dilated", "{m}.{g}.DW_D_conv"),
    ("{o}.{g}.conv1", "{l}.{a}.point_wise", "{m}.{g}.conv1"),
    ("{o}.attn.proj_2", "{l}.attention.post_projection", "{m}.attn.proj_2"),
    ("{o}.layer_scale_1", "{l}.attention_scaling.weight", "{m}.layer_scale_1"),
    ("{o}.norm2", "{l}.post_normalization", "{m}.norm2"),
    ("{o}.mlp.fc1", "{l}.mlp.in_dense", "{m}.mlp.fc1"),
    ("{o}.mlp.dwconv.dwconv", "{l}.mlp.depth_wise", "{m}.mlp.dwconv"),
    ("{o}.mlp.fc2", "{l}.mlp.out_dense", "{m}.mlp.fc2"),
    ("{o}.layer_scale_2", "{l}.mlp_scaling.weight", "{m}.layer_scale_2"),
)
_ANCHORS = {
    source: re.compile(
        r"(?P<prefix>(?:.*\.)?)"
        + re.escape(lka)
        .replace(r"\{s\}", "(?P<s>[1-4])")
        .replace(r"\{z\}", "(?P<z>[0-3])")
        .replace(r"\{b\}", "(?P<b>0|[1-9][0-9]{0,5})")
        + r"\.weight"
    )
    for source, lka in zip(FORMATS, _LKA, strict=True)
}
# What a backbone's prefix ends in, and where the head is once that is taken off.
_HEADS = {
    "official": ("", "head"),
    "transformers": ("van.", "classifier"),
    "mmpretrain": ("backbone.", "head.fc"),
}

# Left by training beside a network, and no part of it.
_IDLE = re.compile(
    r"(.*\.)?(n_averaged|total_ops|total_params)"
    r"|(criterion|.*loss|(train|val|valid|test)_\w+|\w*(metric|accuracy|acc|f1|auroc)s?)(\..+|$)"
)


@dataclass(frozen=True)
class Translation:
    """Where each tensor of a state dict goes.

    Attributes:
        names: official name of each tensor of the network, by its name in the file.
        format: the format the names were in, one of :data:`FORMATS`.
        prefix: what stands before the network's names.
        unused: names that the format has and no VAN computes with.
        idle: names left by training that take no part.
        unknown: names behind the prefix that no VAN has.
        beside: names without the prefix, whose part is unknown.
    """

    names: dict[str, str]
    format: str
    prefix: str
    unused: tuple[str, ...]
    idle: tuple[str, ...]
    unknown: tuple[str, ...]
    beside: tuple[str, ...]


def networks_in(names: Iterable[str]) -> dict[tuple[str, str], set[tuple[int, str]]]:
    """Return the VANs among tensor names: format and prefix, and each one's (stage, block)s."""
    found: dict[tuple[str, str], set[tuple[int, str]]] = {}
    for name in names:
        for source, pattern in _ANCHORS.items():
            if match := pattern.fullmatch(name):
                at = match.groupdict()
                stage = int(at["s"]) if "s" in at else int(at["z"]) + 1
                found.setdefault((source, at["prefix"]), set()).add((stage, at["b"]))
    return found


def translate_keys(names: Iterable[str], container: str = "") -> Translation:
    """Return the official names of a state dict's tensors.

    Args:
        names: as in the file.
        container: what of the file they are from, for the advice to choose another part.

    Raises:
        CheckpointError: no names are a VAN's, or two formats are mixed.
        UsageError: there are several whole networks.
    """
    names = list(names)
    found = networks_in(names)
    if not found:
        first = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
        raise CheckpointError(
            "The checkpoint is not a VAN: no tensor is called as its Large Kernel Attention is. "
            f"Its {len(names)} tensors begin with {first}.",
            "Pass the weights of a VAN classifier (official, Transformers or mmpretrain names).",
        )
    whole = [key for key, blocks in found.items() if len({stage for stage, _ in blocks}) == STAGES]
    if len(found) > 1 and len(whole) != 1:
        raise _several(list(found), bool(whole), container)
    source, prefix = (whole or list(found))[0]
    modules = _modules(source, found[source, prefix])
    ending, head = _HEADS[source]
    root = f"{prefix.removesuffix(ending)}{head}." if prefix.endswith(ending) else None
    official: dict[str, str] = {}
    rest: dict[str, list[str]] = {"unused": [], "idle": [], "unknown": [], "beside": []}
    for name in names:
        inner = name.removeprefix(prefix) if name.startswith(prefix) else ""
        module, _, parameter = inner.rpartition(".")
        if inner in modules or module in modules:
            official[name] = modules.get(inner) or f"{modules[module]}.{parameter}"
        elif root and name.startswith(root):
            official[name] = f"head.{name.removeprefix(root)}"
        elif source == "transformers" and module == "layernorm":
            rest["unused"].append(name)
        elif _IDLE.fullmatch(name.removeprefix(prefix)):
            rest["idle"].append(name)
        else:
            rest["unknown" if inner else "beside"].append(name)
    kinds = {kind: tuple(found) for kind, found in rest.items()}
    return Translation(official, source, prefix, **kinds)


def _modules(source: str, blocks: set[tuple[int, str]]) -> dict[str, str]:
    """Return the official name of every module and bare parameter, by its name in ``source``."""
    column = FORMATS.index(source)
    names: dict[str, str] = {}
    for stage, block in blocks:
        words = {
            "s": stage,
            "t": f"encoder.stages.{stage - 1}",
            "o": f"block{stage}.{block}",
            "l": f"encoder.stages.{stage - 1}.layers.{block}",
            "m": f"blocks{stage}.{block}",
            "g": "attn.spatial_gating_unit",
            "a": "attention.attention_layer.attention",
        }
        names |= {row[column].format(**words): row[0].format(**words) for row in _ROWS}
    return names


def _several(
    found: list[tuple[str, str]], whole: bool, container: str
) -> CheckpointError | UsageError:
    listed = ", ".join(f"{source} names under '{prefix}'" for source, prefix in found)
    if not whole:
        return CheckpointError(
            f"The checkpoint mixes formats, and is whole in none: {listed}.",
            "Save the state dict of one network, with the names of one format.",
        )
    choices = [".".join(filter(None, (container, prefix.rstrip(".")))) for _, prefix in found]
    return UsageError(
        f"The checkpoint holds {len(found)} networks: {listed}.",
        f"Say which: --container {' or --container '.join(filter(None, choices))}.",
    )
