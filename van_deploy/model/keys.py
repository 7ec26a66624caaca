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

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from van_deploy.errors import CheckpointError, UsageError
from van_deploy.model.variants import STAGES

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
_NUMBERS = {"s": "([1-4])", "z": "([0-3])", "b": "(0|[1-9][0-9]{0,5})"}
_ANCHORS = {  # what stands before a block's dilated convolution, its stage and its number
    source: re.compile("(.*\\.|)" + f"{block}{lka}.weight".replace(".", r"\.").format(**_NUMBERS))
    for source, block, lka in zip(FORMATS, _BLOCK, _LKA, strict=True)
}
# What a backbone's prefix ends in, and where the head is once that is taken off.
_HEADS = (("", "head"), ("van.", "classifier"), ("backbone.", "head.fc"))

# Left by training beside a network, and no part of it.
_IDLE = re.compile(
    r"(.*\.)?(n_averaged|total_ops|total_params)"
    r"|(criterion|.*loss|(train|val|valid|test)_\w+|\w*(metric|accuracy|acc|f1|auroc)s?)(\..+|$)"
)
# What stands beside a backbone in OpenMMLab's segmenters and detectors.
_BESIDE_A_BACKBONE = re.compile(r"(neck|panoptic_\w+|\w+_head)\b")
_AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?)([._]|$)")
TOP_LEVEL = "top level"


class Network(NamedTuple):
    """A VAN, or a part of one, among the tensors of a file.

    Attributes:
        place: keys of the mapping it is in, joined by dots; "" for the top level.
        tensors: all that are in this mapping.
        source: one of :data:`FORMATS`.
        prefix: what stands before its names.
        blocks: stage, from 1, and number of each of its blocks.
    """

    place: str
    tensors: Mapping[str, Tensor]
    source: str
    prefix: str
    blocks: set[tuple[int, str]]

    @property
    def container(self) -> str:
        """What ``--container`` takes for this one, its head included."""
        prefix = self.prefix.removesuffix(_HEADS[FORMATS.index(self.source)][0])
        return ".".join(filter(None, (self.place, prefix.rstrip(".")))) or TOP_LEVEL


class Weights(NamedTuple):
    """What was read from a weights file.

    Attributes:
        tensors: official names to contiguous float32 tensors, none of them sharing memory
            with the file; BatchNorm's counters, of no meaning at inference, are left out.
        format: the format the names were in.
        container: where in the file they were, keys joined by dots, or ``top level``.
        inside: everything the file holds, beside these tensors what it says about itself.
        notes: what the user should be told.
    """

    tensors: dict[str, Tensor]
    format: str
    container: str
    inside: Mapping[Any, Any]
    notes: tuple[str, ...]


def find_network(loaded: Mapping[Any, Any], container: str | None) -> tuple[Network, str]:
    """Return a file's one network, and what should be told, if anything.

    Args:
        loaded: the file's content.
        container: which mapping of tensors to take: its keys joined by dots, and behind
            them, if need be, the beginning of the tensors' names (``state_dict.student``).
            By default the one that holds a VAN, averaged weights before others.

    Raises:
        CheckpointError: there is no network.
        UsageError: there is no such ``container``, or there are several networks.
    """
    places = dict(_places(loaded))
    if container not in (None, TOP_LEVEL):
        every = [(f"{p}.{n}" if p else n, n, t) for p, ts in places.items() for n, t in ts.items()]
        below = {name: t for whole, name, t in every if whole.startswith(f"{container}.")}
        inside = places.get(container) or below
        if not inside:
            held = (f"{place or TOP_LEVEL} ({len(held)})" for place, held in places.items())
            wrong = f"The checkpoint has no tensors under '{container}'."
            raise UsageError(wrong, f"It has tensors in: {', '.join(held)}.")
        places = {container: inside}
    parts: dict[tuple[str, str, str], Network] = {}
    for place, (source, anchor) in itertools.product(places, _ANCHORS.items()):
        for match in filter(None, map(anchor.fullmatch, places[place])):
            prefix, stage, block = match.groups()
            part = Network(place, places[place], source, prefix, set())
            part = parts.setdefault((place, source, prefix), part)
            part.blocks.add((int(stage) + (source == "transformers"), block))
    found = list(parts.values())
    if not found:
        names = max(map(list, places.values()), key=len, default=[])
        wrong = f"The checkpoint is no VAN: {len(names)} tensors begin with {_listed(names, 5)}."
        raise CheckpointError(wrong, "Pass a VAN's (official, Transformers or mmpretrain names).")
    whole = [network for network in found if len({stage for stage, _ in network.blocks}) == STAGES]
    several = whole or found
    averaged = [network for network in several if _AVERAGED.search(network.place)]
    chosen = averaged if len(averaged) == 1 else several
    if len(chosen) > 1:
        told = ", ".join(f"{one.source} names under '{one.container}'" for one in chosen)
        choices = " or --container ".join(one.container for one in chosen)
        wrong = f"The checkpoint holds several networks, or one in mixed formats: {told}."
        remedy = f"Say which: --container {choices}; or save one network's state dict."
        raise (UsageError if whole else CheckpointError)(wrong, remedy)
    others = ", ".join(one.container for one in several if one is not chosen[0])
    note = f"the file also holds {others}: the averaged weights were taken (--container)"
    return chosen[0], note if others else ""


def _places(
    value: Mapping[Any, Any], where: str = "", depth: int = 2
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the tensors of every mapping that has some, and the keys that lead to it.

    BatchNorm's counters, of no meaning at inference, are left out.
    """
    tensors = {str(key): inner for key, inner in value.items() if isinstance(inner, Tensor)}
    if tensors:
        yield where, {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}
    for key, inner in value.items():
        if depth and isinstance(inner, Mapping) and isinstance(key, str):
            yield from _places(inner, f"{where}.{key}" if where else key, depth - 1)


def official_names(network: Network) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the official name of each tensor of a network by its own, and notes.

    Raises:
        CheckpointError: there are tensors beside the network whose part is unknown.
    """
    source, prefix, column = network.source, network.prefix, FORMATS.index(network.source)
    modules: dict[str, str] = {}  # and bare parameters: their official names by their own
    for stage, block in network.blocks:
        at = {"s": stage, "z": stage - 1, "b": block, "t": f"encoder.stages.{stage - 1}"}
        ours, theirs = _BLOCK[0].format(**at), _BLOCK[column].format(**at)
        modules |= {theirs + row[column]: ours + row[0] for row in _OF_A_BLOCK}
        modules |= {row[column].format(**at): row[0].format(**at) for row in _OF_A_STAGE}
    ending, head = _HEADS[column]
    root = f"{prefix.removesuffix(ending)}{head}." if prefix.endswith(ending) else None
    official: dict[str, str] = {}
    idle: list[str] = []  # also Transformers' last LayerNorm, which it does not compute with
    strays: list[str] = []
    for name in network.tensors:
        inner, is_ours = name.removeprefix(prefix), name.startswith(prefix)
        module, _, parameter = inner.rpartition(".")
        if is_ours and (inner in modules or module in modules):
            official[name] = modules.get(inner) or f"{modules[module]}.{parameter}"
        elif root and name.startswith(root):
            official[name] = f"head.{name.removeprefix(root)}"
        else:
            unused = is_ours and source == "transformers" and module == "layernorm"
            (idle if unused or _IDLE.fullmatch(inner) else strays).append(name)
    notes = []
    if not any(name.startswith("head.") for name in official.values()):
        notes.append(f"a backbone ({source} names), without a classification head")
        idle += filter(_BESIDE_A_BACKBONE.match, strays)
        strays = [name for name in strays if name not in idle]
    if strays:
        alone = f", or name its own alone: --container {network.container}" if prefix else ""
        wrong = f"The checkpoint holds tensors beside the VAN's: {_listed(strays)}."
        raise CheckpointError(wrong, f"Save the state dict of one whole VAN{alone}.")
    if idle:
        notes.append(f"in the file, but no part of the network; left out: {_listed(idle)}")
    return official, tuple(notes)


def _listed(names: Sequence[str], most: int = 10) -> str:
    """Return the first names, each cut to 200 characters, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:200] for name in names[:most]) + more
