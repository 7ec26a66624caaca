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
is dropped unnamed: a tensor is the network's, is listed in a note, or stops the load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from van_deploy.errors import CheckpointError, UsageError

STAGES = 4
FORMATS = ("official", "transformers", "mmpretrain")

# What stands before a block's modules; {s} is the stage from 1, {z} from 0, {b} the block.
_BLOCK = ("block{s}.{b}.", "encoder.stages.{z}.layers.{b}.", "blocks{s}.{b}.")
_GATE, _DEEP = "attn.spatial_gating_unit", "attention.attention_layer.attention"
# One row a module or bare parameter, its name in each of FORMATS.
_LKA = (f"{_GATE}.conv_spatial", f"{_DEEP}.depth_wise_dilated", f"{_GATE}.DW_D_conv")
_OF_A_BLOCK = (
    ("norm1", "pre_normomalization", "norm1"),
    ("attn.proj_1", "attention.pre_projection.conv", "attn.proj_1"),
    (f"{_GATE}.conv0", f"{_DEEP}.depth_wise", f"{_GATE}.DW_conv"),
    _LKA,
    (f"{_GATE}.conv1", f"{_DEEP}.point_wise", f"{_GATE}.conv1"),
    ("attn.proj_2", "attention.post_projection", "attn.proj_2"),
    ("layer_scale_1", "attention_scaling.weight", "layer_scale_1"),
    ("norm2", "post_normalization", "norm2"),
    ("mlp.fc1", "mlp.in_dense", "mlp.fc1"),
    ("mlp.dwconv.dwconv", "mlp.depth_wise", "mlp.dwconv"),
    ("mlp.fc2", "mlp.out_dense", "mlp.fc2"),
    ("layer_scale_2", "mlp_scaling.weight", "layer_scale_2"),
)
_OF_A_STAGE = (
    ("patch_embed{s}.proj", "{t}.embeddings.convolution", "patch_embed{s}.projection"),
    ("patch_embed{s}.norm", "{t}.embeddings.normalization", "patch_embed{s}.norm"),
    ("norm{s}", "{t}.normalization", "norm{s}"),
)
_ANCHORS = {
    source: re.compile(
        r"(?P<prefix>(?:.*\.)?)"
        + f"{block}{lka}.weight".replace(".", r"\.").format(
            s="(?P<s>[1-4])", z="(?P<z>[0-3])", b="(?P<b>0|[1-9][0-9]{0,5})"
        )
    )
    for source, block, lka in zip(FORMATS, _BLOCK, _LKA, strict=True)
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
# What stands beside a backbone in OpenMMLab's checkpoints.
_SEGMENTER = re.compile(r"(decode|auxiliary|segmentation|seg)_head\b.*")
_SEGMENTER_OR_DETECTOR = re.compile(r"(neck|panoptic_\w+|\w+_head)\b.*")


def listed(names: Sequence[str], most: int = 10) -> str:
    """Return the first names, each cut to 200 characters, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:200] for name in names[:most]) + more


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


def translate_keys(
    names: Sequence[str], container: str = ""
) -> tuple[dict[str, str], str, tuple[str, ...]]:
    """Return the official name of each tensor of a network, the format, and notes.

    The names are by those in the file; the format is one of :data:`FORMATS`; the notes say what
    was left out.

    Args:
        names: as in the file.
        container: what of the file they are from, for the advice to choose another part.

    Raises:
        CheckpointError: no names are a VAN's, two formats are mixed, or some tensors' part is
            unknown.
        UsageError: there are several whole networks.
    """
    source, prefix, blocks = _network_in(names, container)
    modules = _modules(source, blocks)
    ending, head = _HEADS[source]
    root = f"{prefix.removesuffix(ending)}{head}." if prefix.endswith(ending) else None
    official: dict[str, str] = {}
    unused: list[str] = []
    idle: list[str] = []
    strays: list[str] = []
    for name in names:
        inner = name.removeprefix(prefix)
        module, _, parameter = inner.rpartition(".")
        ours = name.startswith(prefix)
        if ours and (inner in modules or module in modules):
            official[name] = modules.get(inner) or f"{modules[module]}.{parameter}"
        elif root and name.startswith(root):
            official[name] = f"head.{name.removeprefix(root)}"
        elif ours and source == "transformers" and module == "layernorm":
            unused.append(name)
        else:
            (idle if _IDLE.fullmatch(inner) else strays).append(name)
    notes = []
    if not any(name.startswith("head.") for name in official.values()):
        rest = [name for name in strays if _SEGMENTER_OR_DETECTOR.fullmatch(name)]
        whose = " of a segmenter" if any(map(_SEGMENTER.fullmatch, rest)) else " of a detector"
        notes.append(
            f"a backbone{whose if rest else ''} ({source} names), without a classification head"
        )
        if rest:
            roots = listed(list(dict.fromkeys(name.split(".")[0] for name in rest)))
            notes.append(f"not the backbone's, left out: {len(rest)} tensors of {roots}")
        strays = [name for name in strays if name not in rest]
    if strays:
        inner = ".".join(filter(None, (container, prefix.rstrip("."))))
        alone = f", or name the network's own alone: --container {inner}" if prefix else ""
        raise CheckpointError(
            f"The checkpoint holds tensors beside the VAN's: {listed(strays)}.",
            f"Nothing is dropped unasked: save the state dict of one whole VAN{alone}.",
        )
    if unused:
        notes.append(
            f"{', '.join(sorted(unused))}: in the file, but Transformers does not compute "
            "logits or feature maps with them; left out"
        )
    if idle:
        notes.append(f"left by training, no part of the network: {listed(idle)}")
    return official, source, tuple(notes)


def _network_in(names: Sequence[str], container: str) -> tuple[str, str, set[tuple[int, str]]]:
    """Return format, prefix and (stage, block)s of the one network among tensor names."""
    found = networks_in(names)
    if not found:
        raise CheckpointError(
            "The checkpoint is not a VAN: no tensor is called as its Large Kernel Attention is. "
            f"Its {len(names)} tensors begin with {listed(names, 5)}.",
            "Pass the weights of a VAN (official, Transformers or mmpretrain names).",
        )
    whole = [key for key, blocks in found.items() if len({stage for stage, _ in blocks}) == STAGES]
    if len(found) > 1 and len(whole) != 1:
        networks = ", ".join(f"{source} names under '{prefix}'" for source, prefix in found)
        if not whole:
            raise CheckpointError(
                f"The checkpoint mixes formats, and is whole in none: {networks}.",
                "Save the state dict of one network, with the names of one format.",
            )
        choices = [".".join(filter(None, (container, prefix.rstrip(".")))) for _, prefix in found]
        raise UsageError(
            f"The checkpoint holds {len(found)} networks: {networks}.",
            f"Say which: --container {' or --container '.join(filter(None, choices))}.",
        )
    chosen = (whole or list(found))[0]
    return *chosen, found[chosen]


def _modules(source: str, blocks: set[tuple[int, str]]) -> dict[str, str]:
    """Return the official name of every module and bare parameter, by its name in ``source``."""
    column = FORMATS.index(source)
    names: dict[str, str] = {}
    for stage, block in blocks:
        at = {"s": stage, "z": stage - 1, "b": block, "t": f"encoder.stages.{stage - 1}"}
        ours, theirs = _BLOCK[0].format(**at), _BLOCK[column].format(**at)
        names |= {theirs + row[column]: ours + row[0] for row in _OF_A_BLOCK}
        names |= {row[column].format(**at): row[0].format(**at) for row in _OF_A_STAGE}
    return names
