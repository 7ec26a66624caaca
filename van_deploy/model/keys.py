"""Tensor names of the three VAN checkpoint formats: detection and conversion.

========  ==============================================  ==========================
format    written by                                      a name
========  ==============================================  ==========================
official  ``Visual-Attention-Network/VAN-Classification``  ``block1.0.attn.proj_1.weight``
transformers  ``VanForImageClassification`` (up to 4.x)   ``van.encoder.stages.0.layers.0…``
mmpretrain  ``mmpretrain/models/backbones/van.py``        ``backbone.blocks1.0.attn.proj_1…``
========  ==============================================  ==========================

A network is detected by its Large Kernel Attention, with any prefix: ``module.``,
``_orig_mod.``, ``model.``, ``net.`` or another. No tensor is dropped silently: each one
belongs to the network, is listed in a note, or is an error.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from van_deploy.errors import CheckpointError, UsageError
from van_deploy.model.variants import STAGES

Notes = tuple[str, ...]
State = Mapping[str, Tensor]
FORMATS = ("official", "transformers", "mmpretrain")

# Prefix of a block's modules; {s} is the stage from 1, {z} the stage from 0, {b} the block.
_BLOCK_PREFIXES = ("block{s}.{b}.", "encoder.stages.{z}.layers.{b}.", "blocks{s}.{b}.")
_SGU, _HF_LKA = "attn.spatial_gating_unit", "attention.attention_layer.attention"
# Each row is a module or a bare parameter: its name in each of FORMATS.
_DILATED_CONV = (f"{_SGU}.conv_spatial", f"{_HF_LKA}.depth_wise_dilated", f"{_SGU}.DW_D_conv")
_BLOCK_MODULES = (
    ("norm1", "pre_normomalization", "norm1"),
    ("attn.proj_1", "attention.pre_projection.conv", "attn.proj_1"),
    (f"{_SGU}.conv0", f"{_HF_LKA}.depth_wise", f"{_SGU}.DW_conv"),
    _DILATED_CONV,
    (f"{_SGU}.conv1", f"{_HF_LKA}.point_wise", f"{_SGU}.conv1"),
    ("attn.proj_2", "attention.post_projection", "attn.proj_2"),
    ("layer_scale_1", "attention_scaling.weight", "layer_scale_1"),
    ("norm2", "post_normalization", "norm2"),
    ("mlp.fc1", "mlp.in_dense", "mlp.fc1"),
    ("mlp.dwconv.dwconv", "mlp.depth_wise", "mlp.dwconv"),
    ("mlp.fc2", "mlp.out_dense", "mlp.fc2"),
    ("layer_scale_2", "mlp_scaling.weight", "layer_scale_2"),
)
_STAGE_MODULES = (
    ("patch_embed{s}.proj", "{t}.embeddings.convolution", "patch_embed{s}.projection"),
    ("patch_embed{s}.norm", "{t}.embeddings.normalization", "patch_embed{s}.norm"),
    ("norm{s}", "{t}.normalization", "norm{s}"),
)
_INDICES = {"s": "([1-4])", "z": "([0-3])", "b": "(0|[1-9][0-9]{0,5})"}
_ANCHORS = {  # match the name of a dilated convolution: its prefix, stage and block
    name: re.compile("(.*\\.|)" + f"{block}{conv}.weight".replace(".", r"\.").format(**_INDICES))
    for name, block, conv in zip(FORMATS, _BLOCK_PREFIXES, _DILATED_CONV, strict=True)
}
# For each of FORMATS, the end of a backbone's prefix, and the name of the head without that end.
_HEADS = (("", "head"), ("van.", "classifier"), ("backbone.", "head.fc"))

# Tensors that training scripts save with a network and that inference does not use.
_IGNORED = re.compile(
    r"(.*\.)?(n_averaged|steps|total_ops|total_params)"
    r"|(criterion|.*loss|(train|val|valid|test)_\w+|\w*(metric|accuracy|acc|f1|auroc)s?)(\..+|$)"
)
# The other modules of OpenMMLab's segmenters and detectors.
_NECKS_AND_HEADS = re.compile(r"(module\.)?(neck|panoptic_\w+|\w+_head)\b")
# Modules around others, of torch.compile, activation checkpointing and FSDP.
_WRAPPERS = re.compile(r"(?<=\.)_(orig_mod|(checkpoint|fsdp)_wrapped_module)\.")
_AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?)([._]|$)")
# Containers of the weights that are not averaged, if ``state_dict`` has the averaged ones: of
# Lightning's WeightAveraging, and of mmengine's EMAHook, which swaps the two before it saves them.
_LIGHTNING_RAW, _MMENGINE_RAW = "current_model_state", "ema_state_dict"
_BESIDE_RAW = re.compile("^state_dict$")
TOP_LEVEL = "top level"


class NetworkMatch(NamedTuple):
    """A VAN, or a part of one, among the tensors of a file.

    Attributes:
        path: keys of its mapping, joined by dots; "" for the top level.
        tensors: all tensors of this mapping.
        format: one of :data:`FORMATS`.
        prefix: of its tensors' names.
        blocks: stage, from 1, and index of each of its blocks.
    """

    path: str
    tensors: State
    format: str
    prefix: str
    blocks: set[tuple[int, str]]

    @property
    def container(self) -> str:
        """The ``--container`` option that selects this network and its head."""
        prefix = self.prefix.removesuffix(_HEADS[FORMATS.index(self.format)][0])
        return ".".join(filter(None, (self.path, prefix.rstrip(".")))) or TOP_LEVEL


class Checkpoint(NamedTuple):
    """The network and the metadata read from a weights file.

    Attributes:
        tensors: official names to contiguous float32 tensors that share no memory with the
            file; BatchNorm's counters, which inference does not use, are omitted.
        format: one of :data:`FORMATS`, that of the names in the file.
        container: path of the tensors in the file, keys joined by dots, or ``top level``.
        content: everything in the file: tensors and metadata.
        notes: messages for the user.
    """

    tensors: dict[str, Tensor]
    format: str
    container: str
    content: Mapping[Any, Any]
    notes: Notes


def find_network(content: Mapping[Any, Any], container: str | None) -> tuple[NetworkMatch, Notes]:
    """Return the only network in a file, and notes for the user.

    Args:
        content: of the file.
        container: the mapping of tensors to use: its keys joined by dots, optionally followed
            by a prefix of the tensors' names (``state_dict.student``). By default the mapping
            that contains a VAN; averaged weights are preferred.

    Raises:
        CheckpointError: there is no network.
        UsageError: there is no such ``container``, or there are several networks.
    """
    mappings = dict(_tensor_mappings(content))
    if container not in (None, TOP_LEVEL):
        container = _WRAPPERS.sub("", f"{container}.").removesuffix(".")
        rows = [(f"{p}.{n}" if p else n, n, t) for p, ts in mappings.items() for n, t in ts.items()]
        prefixed = {name: t for full, name, t in rows if full.startswith(f"{container}.")}
        selected = mappings.get(container) or prefixed
        if not selected:
            available = (f"{path or TOP_LEVEL} ({len(ts)})" for path, ts in mappings.items())
            message = f"The checkpoint has no tensors under '{container}'."
            raise UsageError(message, f"It has tensors in: {', '.join(available)}.")
        mappings = {container: selected}
    networks: dict[tuple[str, str, str], NetworkMatch] = {}
    for path, (name, anchor) in itertools.product(mappings, _ANCHORS.items()):
        for match in filter(None, map(anchor.fullmatch, mappings[path])):
            prefix, stage, block = match.groups()
            network = NetworkMatch(path, mappings[path], name, prefix, set())
            network = networks.setdefault((path, name, prefix), network)
            network.blocks.add((int(stage) + (name == "transformers"), block))
    detected = list(networks.values())
    if not detected:
        names = max(map(list, mappings.values()), key=len, default=[])
        message = f"The checkpoint is not a VAN ({len(names)} tensors: {_join_names(names, 5)})."
        raise CheckpointError(message, "Pass a VAN (official, Transformers or mmpretrain names).")
    complete = [n for n in detected if len({stage for stage, _ in n.blocks}) == STAGES]
    candidates = complete or detected
    meta = content.get("meta")
    swapped = isinstance(meta, Mapping) and "mmengine_version" in meta
    raw = {_LIGHTNING_RAW, _MMENGINE_RAW if swapped else _LIGHTNING_RAW}
    pattern = _BESIDE_RAW if any(network.path in raw for network in candidates) else _AVERAGED
    averaged = [network for network in candidates if pattern.search(network.path)]
    selection = averaged if len(averaged) == 1 else candidates
    if len(selection) > 1:
        places = ", ".join(f"{one.format} names under '{one.container}'" for one in selection)
        choices = " or --container ".join(one.container for one in selection)
        message = f"The checkpoint contains several networks, or one in mixed formats: {places}."
        remedy = f"Select one: --container {choices}; or save one network's state dict."
        raise (UsageError if complete else CheckpointError)(message, remedy)
    others = ", ".join(one.container for one in candidates if one is not selection[0])
    note = f"the file also contains {others}: the averaged weights are used (--container)"
    return selection[0], (note,) if others else ()


def _tensor_mappings(
    value: Mapping[Any, Any], path: str = "", depth: int = 2
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the path and the tensors of every mapping that contains tensors.

    BatchNorm's counters, which inference does not use, are omitted, and names have no wrappers
    of submodules.
    """
    items = value.items()
    tensors = {_WRAPPERS.sub("", str(n)): t for n, t in items if isinstance(t, Tensor)}
    if tensors:
        yield path, {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}
    for key, inner in value.items():
        if depth and isinstance(inner, Mapping) and isinstance(key, str):
            yield from _tensor_mappings(inner, f"{path}.{key}" if path else key, depth - 1)


def official_names(network: NetworkMatch) -> tuple[dict[str, str], Notes]:
    """Return the official name of each tensor by its name in the file, and notes for the user.

    Raises:
        CheckpointError: the file has tensors that are neither the network's nor known leftovers.
    """
    prefix, column = network.prefix, FORMATS.index(network.format)
    modules: dict[str, str] = {}  # and bare parameters: names in the file to official names
    for stage, block in network.blocks:
        index = {"s": stage, "z": stage - 1, "b": block, "t": f"encoder.stages.{stage - 1}"}
        official, own = (_BLOCK_PREFIXES[i].format(**index) for i in (0, column))
        modules |= {own + row[column]: official + row[0] for row in _BLOCK_MODULES}
        modules |= {row[column].format(**index): row[0].format(**index) for row in _STAGE_MODULES}
    suffix, head = _HEADS[column]
    head_prefix = f"{prefix.removesuffix(suffix)}{head}." if prefix.endswith(suffix) else None
    # mmcv 1's EMAHook stores the other of the averaged and the raw weights as buffers of the model
    buffers = {f"ema_{name.replace('.', '_')}" for name in network.tensors}
    names: dict[str, str] = {}
    ignored: list[str] = []  # also Transformers' last LayerNorm, which its forward does not use
    unknown: list[str] = []
    for name in network.tensors:
        inner, has_prefix = name.removeprefix(prefix), name.startswith(prefix)
        module, _, parameter = inner.rpartition(".")
        if has_prefix and (inner in modules or module in modules):
            names[name] = modules.get(inner) or f"{modules[module]}.{parameter}"
        elif head_prefix and name.startswith(head_prefix):
            names[name] = f"head.{name.removeprefix(head_prefix)}"
        else:
            unused = has_prefix and network.format == "transformers" and module == "layernorm"
            is_known = unused or name in buffers or _IGNORED.fullmatch(inner)
            (ignored if is_known else unknown).append(name)
    notes = []
    if not any(name.startswith("head.") for name in names.values()):
        notes.append(f"a backbone ({network.format} names), without a classification head")
        ignored += filter(_NECKS_AND_HEADS.match, unknown)
        unknown = [name for name in unknown if name not in ignored]
    if unknown:
        select = f", or select it with --container {network.container}" if prefix else ""
        message = f"The checkpoint contains tensors that are not the VAN's: {_join_names(unknown)}."
        raise CheckpointError(message, f"Save the state dict of one complete VAN{select}.")
    if ignored:
        notes.append(f"tensors in the file that are not the network's: {_join_names(ignored)}")
    return names, tuple(notes)


def _join_names(names: Sequence[str], limit: int = 10) -> str:
    """Return the first names, each cut to 200 characters, and the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(name[:200] for name in names[:limit]) + more
