"""From the tensors of a file to a network in evaluation mode, strictly.

Every tensor of the file ends in the network, is named in a note, or stops the
load; every parameter of the network comes from the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from van_deploy.errors import CheckpointError
from van_deploy.model.keys import Translation, translate_keys
from van_deploy.model.pickles import TOP_LEVEL
from van_deploy.model.van import VAN
from van_deploy.model.variants import VanConfig

__all__ = ["NamedState", "network_from_state", "official_state"]

_LONGEST = 200  # characters of a name in a message
_LISTED = 10  # names in a message before "and N more"


@dataclass(frozen=True)
class NamedState:
    """A state dict with official names, in float32.

    Attributes:
        tensors: official names to contiguous float32 tensors (int64 for
            ``num_batches_tracked``), none of them sharing memory with a file.
        format: the format the names were in.
        notes: what was done that the user should be told.
    """

    tensors: dict[str, Tensor]
    format: str
    notes: tuple[str, ...]


def official_state(tensors: Mapping[str, Tensor], container: str = "") -> NamedState:
    """Return a state dict under its official names, in float32, checked for sense.

    Args:
        tensors: names as in the file.
        container: where in the file they were, for the advice to take others.

    Raises:
        CheckpointError: the names are another network's, or of mixed formats; tensors stand
            beside the network whose part is unknown; or one is not floating point, NaN,
            infinite, a negative variance, or claims more elements than it has.
        UsageError: there are several networks.
    """
    container = "" if container == TOP_LEVEL else container
    found = translate_keys(tensors, container)
    notes: list[str] = []
    if not any(name.startswith("head.") for name in found.names.values()):
        found, notes = _backbone(found)
    if found.beside:
        inner = ".".join(filter(None, (container, found.prefix.rstrip("."))))
        raise CheckpointError(
            f"The checkpoint holds tensors beside the VAN whose part is unknown: "
            f"{_listed(found.beside)}.",
            f"If the network does without them at inference, name its own: --container {inner}.",
        )
    if found.unused:
        notes.append(
            f"{', '.join(sorted(found.unused))}: in the file, but Transformers does not compute "
            "logits or feature maps with them; left out"
        )
    if found.idle:
        notes.append(f"left by training, no part of the network: {_listed(found.idle)}")
    used = {new: tensors[old] for old, new in found.names.items()}
    used |= {name.removeprefix(found.prefix): tensors[name] for name in found.unknown}
    _refuse_unusable(used)
    other = sorted({str(t.dtype) for n, t in used.items() if _is_weight(n)} - {"torch.float32"})
    if other:
        notes.append(f"weights converted to float32 from {', '.join(other)}".replace("torch.", ""))
    converted = {
        name: tensor.to(torch.float32 if _is_weight(name) else torch.int64, copy=True).contiguous()
        for name, tensor in used.items()
    }
    _refuse_senseless(converted)
    return NamedState(converted, found.format, tuple(notes))


_LARGER = {
    r"(decode|auxiliary|segmentation|seg)_head\b.*": "a segmenter",
    r"(neck|panoptic_\w+|(?!decode_|auxiliary_|seg)\w+_head)\b.*": "a detector",
}
"""What stands beside a backbone in OpenMMLab's checkpoints, and whose it is."""


def _backbone(found: Translation) -> tuple[Translation, list[str]]:
    """Return the tensors of a backbone alone, and what to tell of the others."""
    names = (*found.beside, *found.unknown)
    rest = {n: whose for n in names for p, whose in _LARGER.items() if re.fullmatch(p, n)}
    whose = f" of {next(iter(rest.values()))}" if rest else ""
    notes = [f"a backbone{whose} ({found.format} names), without a classification head"]
    if rest:
        roots = dict.fromkeys(name.split(".")[0] for name in rest)
        notes.append(f"not the backbone's, left out: {len(rest)} tensors of {_listed(roots)}")
    beside, unknown = (
        tuple(name for name in kind if name not in rest) for kind in (found.beside, found.unknown)
    )
    return replace(found, beside=beside, unknown=unknown), notes


def network_from_state(state: Mapping[str, Tensor], config: VanConfig) -> VAN:
    """Return the network of an architecture with the weights of a state dict.

    In evaluation mode, float32, without gradients; it shares the tensors'
    memory. A backbone leaves a classifier's head out. Missing ``num_batches_tracked``
    are no fault: they only matter in training.

    Raises:
        CheckpointError: tensors are missing, unexpected or wrongly shaped; they are listed.
    """
    with torch.device("meta"):  # shapes only: no time, no random numbers
        model = VAN(config)
    expected = model.state_dict()
    counters = {name for name in expected if not _is_weight(name)}
    complete = {**dict.fromkeys(counters, torch.tensor(0)), **state}
    if config.out_indices:
        complete = {n: tensor for n, tensor in complete.items() if not n.startswith("head.")}
    _refuse_difference(expected, complete)
    model.load_state_dict(complete, assign=True)
    return model.eval().requires_grad_(False)


def _is_weight(name: str) -> bool:
    return not name.endswith("num_batches_tracked")


def _listed(names: Iterable[str]) -> str:
    names = [name[:_LONGEST] for name in names]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _extremes(t: Tensor) -> tuple[float, ...]:
    """Return the smallest and the largest value, NaN where there is one; none of an empty one."""
    return tuple(float(value) for value in torch.aminmax(t)) if t.numel() else ()


def _is_hollow(t: Tensor) -> bool:
    plain = t.layout == torch.strided and not t.is_quantized and t.device.type == "cpu"
    return not plain or t.numel() * t.element_size() > t.untyped_storage().nbytes()


def _refuse(
    state: Mapping[str, Tensor], wrong: Callable[[str, Tensor], bool], what: str, remedy: str
) -> None:
    """Refuse a state dict with tensors that are ``wrong``; ``{}`` in ``what`` is their number."""
    names = [name for name, tensor in state.items() if wrong(name, tensor)]
    if names:
        raise CheckpointError(f"{what.format(len(names))}: {_listed(names)}.", remedy)


def _refuse_unusable(state: Mapping[str, Tensor]) -> None:
    _refuse(
        state,
        lambda _, t: _is_hollow(t),
        "Tensors claim more elements than the file holds, or are not plain",
        "The file is damaged or made to harm: get it from a source you trust.",
    )
    _refuse(
        state,
        lambda name, t: _is_weight(name) and not t.is_floating_point(),
        "Weights are not floating point",
        "Pass the weights from before quantisation; quantising is this program's job.",
    )


def _refuse_senseless(state: Mapping[str, Tensor]) -> None:
    _refuse(
        state,
        lambda name, t: _is_weight(name) and not all(map(math.isfinite, _extremes(t))),
        "{} tensors hold NaN or infinite values",
        "The training diverged or the file is damaged: pass an earlier checkpoint.",
    )
    _refuse(
        state,
        lambda name, t: name.endswith("running_var") and min(_extremes(t), default=0.0) < 0,
        "Running variances are negative",
        "The file is damaged: pass an earlier checkpoint.",
    )


def _refuse_difference(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", wrong))
    parts = [f"{len(names)} {what}: {_listed(names)}" for what, names in found if names]
    if parts:
        raise CheckpointError(
            f"The checkpoint does not fit the VAN its shapes describe. {'; '.join(parts)}.",
            "Nothing is dropped or filled in: save the state dict of one whole VAN.",
        )
