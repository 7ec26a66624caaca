"""Tensor names of the three formats VAN weights come in, and their translation.

========  ==============================================  ==========================
format    written by                                      a name
========  ==============================================  ==========================
official  ``Visual-Attention-Network/VAN-Classification``  ``block1.0.attn.proj_1.weight``
transformers  ``VanForImageClassification`` (up to 4.x)   ``van.encoder.stages.0.layers.0…``
mmpretrain  ``mmpretrain/models/backbones/van.py``        ``backbone.blocks1.0.attn.proj_1…``
========  ==============================================  ==========================

Nothing is dropped here: every name is either translated, known to be unused
(Transformers' ``van.layernorm``), or handed back as it is for the strict load
to complain about.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from van_deploy.errors import CheckpointError

__all__ = ["FORMATS", "Translation", "looks_like", "translate_keys", "unwrap_prefixes"]

T = TypeVar("T")

FORMATS = ("official", "transformers", "mmpretrain")

# One row a module: official name, and the other two's. {s} is the stage from 1
# ({z}: from 0), {b} the block. Parameters follow after a dot.
_MODULES = (
    ("patch_embed{s}.proj", "{e}.{z}.embeddings.convolution", "{m}patch_embed{s}.projection"),
    ("patch_embed{s}.norm", "{e}.{z}.embeddings.normalization", "{m}patch_embed{s}.norm"),
    ("block{s}.{b}.norm1", "{l}.pre_normomalization", "{m}blocks{s}.{b}.norm1"),
    ("block{s}.{b}.attn.proj_1", "{l}.attention.pre_projection.conv", "{a}.proj_1"),
    ("{g}.conv0", "{k}.depth_wise", "{a}.spatial_gating_unit.DW_conv"),
    ("{g}.conv_spatial", "{k}.depth_wise_dilated", "{a}.spatial_gating_unit.DW_D_conv"),
    ("{g}.conv1", "{k}.point_wise", "{a}.spatial_gating_unit.conv1"),
    ("block{s}.{b}.attn.proj_2", "{l}.attention.post_projection", "{a}.proj_2"),
    ("block{s}.{b}.norm2", "{l}.post_normalization", "{m}blocks{s}.{b}.norm2"),
    ("block{s}.{b}.mlp.fc1", "{l}.mlp.in_dense", "{m}blocks{s}.{b}.mlp.fc1"),
    ("block{s}.{b}.mlp.dwconv.dwconv", "{l}.mlp.depth_wise", "{m}blocks{s}.{b}.mlp.dwconv"),
    ("block{s}.{b}.mlp.fc2", "{l}.mlp.out_dense", "{m}blocks{s}.{b}.mlp.fc2"),
    ("norm{s}", "{e}.{z}.normalization", "{m}norm{s}"),
    ("head", "classifier", "head.fc"),
)
# Layer scales are bare parameters in two of the formats.
_SCALES = (
    (
        "block{s}.{b}.layer_scale_1",
        "{l}.attention_scaling.weight",
        "{m}blocks{s}.{b}.layer_scale_1",
    ),
    ("block{s}.{b}.layer_scale_2", "{l}.mlp_scaling.weight", "{m}blocks{s}.{b}.layer_scale_2"),
)
_SHORT = (  # spelled out in the rows above
    ("{g}", "block{s}.{b}.attn.spatial_gating_unit"),
    ("{k}", "{l}.attention.attention_layer.attention"),
    ("{l}", "{e}.{z}.layers.{b}"),
    ("{a}", "{m}blocks{s}.{b}.attn"),
    ("{e}", "van.encoder.stages"),
    ("{m}", "backbone."),
)
_PARAMETERS = r"\.(?P<p>weight|bias|running_mean|running_var|num_batches_tracked)"
_UNUSED = re.compile(r"van\.layernorm\.(weight|bias)")
_PREFIXES = ("module.", "_orig_mod.", "model.")

_LKA = re.compile(
    r"(spatial_gating_unit\.(conv_spatial|DW_D_conv)|attention_layer\.attention\.depth_wise_dilated)"
    r"\.weight$"
)

# What the state dicts of other networks contain, most specific first.
_OTHERS = (
    (r"attn\.spatial_gating_unit\.conv0_1", "SegNeXt's MSCAN"),
    (r"relative_position_bias_table", "a Swin Transformer"),
    (r"^block1\.0\.attn\.(q|kv|sr)\.", "a Pyramid Vision Transformer"),
    (r"^(downsample_layers\.0|stages\.\d\.blocks\.\d+\.conv_dw|convnext)", "a ConvNeXt"),
    (r"^(conv_stem|blocks\.\d\.\d\.(conv_dw|bn1))", "an EfficientNet or MobileNet"),
    (r"^(blocks\.\d+\.attn\.qkv|encoder\.layers\.encoder_layer_0|vit\.)", "a Vision Transformer"),
    (r"(^|\.)layer[1-4]\.\d+\.(conv|bn)\d", "a ResNet"),
    (r"denseblock1", "a DenseNet"),
    (r"^features\.\d+\.(weight|0\.)", "a VGG, MobileNet or EfficientNet of torchvision"),
    (r"^(transformer\.h|model\.layers|bert|gpt)", "a language model"),
)


@dataclass(frozen=True)
class Translation:
    """Where each tensor of a state dict goes.

    Attributes:
        names: official name of each tensor, by its name in the file. Names of
            no VAN tensor map to themselves.
        format: the format the names were in, one of :data:`FORMATS`.
        unused: names that the format has and no VAN computes with.
    """

    names: dict[str, str]
    format: str
    unused: tuple[str, ...]


def unwrap_prefixes(state: Mapping[str, T]) -> tuple[dict[str, T], tuple[str, ...]]:
    """Return the state dict without the wrappers' prefixes, and those prefixes.

    ``module.`` (DataParallel), ``_orig_mod.`` (``torch.compile``) and ``model.``
    (Lightning) go where *every* name has them, in any nesting.

    >>> unwrap_prefixes({"module._orig_mod.head.bias": 1})
    ({'head.bias': 1}, ('module.', '_orig_mod.'))
    """
    result, removed = dict(state), []
    while result:
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in result)), None)
        if prefix is None:
            break
        result = {name.removeprefix(prefix): value for name, value in result.items()}
        removed.append(prefix)
    return result, tuple(removed)


def translate_keys(names: Iterable[str]) -> Translation:
    """Return the official names of a state dict's tensors.

    Raises:
        CheckpointError: the names are another network's, or two formats are mixed.
    """
    names = list(names)
    if not any(_LKA.search(name) for name in names):
        raise _not_van(names)
    votes: Counter[str] = Counter()
    for name in names:
        formats = [f for f in FORMATS if _official_name(name, f) is not None]
        if len(formats) == 1:
            votes[formats[0]] += 1
    if len(votes) > 1:
        raise _mixed(names, votes)
    if not votes:
        raise _not_van(names)
    (found,) = votes
    unused = tuple(n for n in names if found == "transformers" and _UNUSED.fullmatch(n))
    used = [name for name in names if name not in unused]
    return Translation({name: _official_name(name, found) or name for name in used}, found, unused)


def looks_like(names: Iterable[str]) -> str | None:
    """Return what network these tensor names are usually of, or None."""
    names = list(names)
    for pattern, network in _OTHERS:
        if any(re.search(pattern, name) for name in names):
            return network
    return None


def _official_name(name: str, source: str) -> str | None:
    for pattern, target in _RULES[source]:
        match = pattern.fullmatch(name)
        if match:
            groups = match.groupdict()
            stage = int(groups["z"]) + 1 if groups.get("z") else groups.get("s")
            return target.format(s=stage, b=groups.get("b"), p=groups.get("p"))
    return None


def _spelled_out(template: str) -> str:
    for short, long in _SHORT:
        template = template.replace(short, long)
    return template


def _pattern(template: str) -> str:
    pattern = re.escape(_spelled_out(template))
    for letter, values in (("s", "[1-4]"), ("z", "[0-3]"), ("b", "0|[1-9][0-9]{0,5}")):
        pattern = pattern.replace(rf"\{{{letter}\}}", f"(?P<{letter}>{values})")
    return pattern


def _rules() -> dict[str, tuple[tuple[re.Pattern[str], str], ...]]:
    rules: dict[str, tuple[tuple[re.Pattern[str], str], ...]] = {}
    for column, source in enumerate(FORMATS):
        modules = [
            (re.compile(_pattern(row[column]) + _PARAMETERS), _spelled_out(row[0]) + ".{p}")
            for row in _MODULES
        ]
        scales = [(re.compile(_pattern(row[column])), _spelled_out(row[0])) for row in _SCALES]
        rules[source] = (*modules, *scales)
    return rules


_RULES = _rules()


def _mixed(names: list[str], votes: Counter[str]) -> CheckpointError:
    examples = []
    for source, count in votes.most_common():
        others = [f for f in FORMATS if f != source]
        example = next(
            name
            for name in names
            if _official_name(name, source) and not any(_official_name(name, f) for f in others)
        )
        examples.append(f"{count} {source} ones such as {example}")
    return CheckpointError(
        f"The checkpoint mixes formats: {', '.join(examples)}.",
        "Save the state dict of one network, with the names of one format.",
    )


def _not_van(names: list[str]) -> CheckpointError:
    network = looks_like(names)
    guess = f"It looks like {network}. " if network else ""
    first = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
    return CheckpointError(
        f"The checkpoint is not a VAN: it has no Large Kernel Attention. {guess}"
        f"Its {len(names)} tensors begin with {first}.",
        "Pass the weights of a VAN classifier (official, Transformers or mmpretrain names).",
    )
