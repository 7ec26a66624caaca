"""Checkpoints that are damaged, lie or want to run something."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reliability.spoiled import STRANGE_VALUES, Draw, one_of, spoiled_bytes, spoiled_json

MARKER = "executed"  # of the sound files' folder: a payload that runs makes it


def spoiled_weights(draw: Draw, sound: Path, folder: Path) -> Path:
    """Return a checkpoint, spoiled in one of the ways below."""
    ways = (*[_bytes] * 4, *[_tensors] * 3, _payload, _header, _bomb, _around)
    return Path(one_of(draw, *ways)(draw, sound, folder / "weights.pth"))


def _bytes(draw: Draw, sound: Path, path: Path) -> Path:
    source = sound / one_of(draw, "zip.pth", "old.pth", "model.safetensors")
    path = path.with_suffix(source.suffix)
    path.write_bytes(spoiled_bytes(draw, source.read_bytes()))
    return path


def _tensors(draw: Draw, sound: Path, path: Path) -> Path:
    """Write a state dict with a tensor renamed, reshaped, retyped, NaN, or no tensor."""
    import torch

    state: dict[str, Any] = torch.load(sound / "old.pth", weights_only=True)
    name = one_of(draw, *state)
    value = state.pop(name)
    changed = [value.reshape(-1), value.unsqueeze(0), value * 1e38, value.to(torch.complex64)]
    changed += [torch.full_like(value.float(), math.nan), torch.zeros(1).expand(3, 2**40)]
    named = one_of(draw, name, "module." + name, name[1:], "é", "a" * 500)
    state[named] = one_of(draw, *changed, None, "text", [value], {"a": value})
    torch.save(one_of(draw, state, {"model": state}, {"state_dict": state, "model": 3}), path)
    return path


def _payload(draw: Draw, sound: Path, path: Path) -> Path:
    """Write a pickle that leaves a marker behind if it runs."""
    marker = str(sound / MARKER)
    run = one_of(
        draw,
        (os.system, (f"touch {marker}",)),
        (exec, (f"open({marker!r}, 'w')",)),
        (open, (marker, "w")),
        (shutil.copy, (__file__, marker)),
        (eval, ("__import__('os').getpid()",)),
        (os.mkdir, (marker,)),
    )
    payload = type("Payload", (), {"__reduce__": lambda _: run})()
    content = one_of(draw, payload, {"state_dict": payload}, {"epoch": payload})
    data = pickle.dumps(content, protocol=one_of(draw, 0, 2, 5))
    path.write_bytes(data)
    if one_of(draw, True, False):
        _archive(sound, path, lambda name, old: data if name.endswith("data.pkl") else old)
    return path


def _header(draw: Draw, sound: Path, path: Path) -> Path:
    """Write a safetensors file whose header lies: shapes, offsets, types, lengths."""
    data = (sound / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, huge = spoiled_json(draw, json.loads(data[8 : 8 + length])), one_of(draw, 2**31, 2**62)
    if isinstance(header, dict) and one_of(draw, True, False):
        header["x"] = {"dtype": "F32", "shape": [huge], "data_offsets": [0, 4 * huge]}
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    stated = one_of(draw, len(text), len(text), 0, 1, 2**20, 2**63)
    path = path.with_suffix(".safetensors")
    path.write_bytes(struct.pack("<Q", stated) + text + data[8 + length :])
    return path


def _bomb(draw: Draw, sound: Path, path: Path) -> Path:
    """Write a small archive that unpacks to much more than it holds."""
    which, size = f"/data/{one_of(draw, 0, 3, 19)}", one_of(draw, 2**20, 2**26)
    return _archive(sound, path, lambda name, old: bytes(size) if name.endswith(which) else old)


def _archive(sound: Path, path: Path, changed: Callable[[str, bytes], bytes]) -> Path:
    """Write the sound archive with the content of its entries changed."""
    with zipfile.ZipFile(sound / "zip.pth") as old, zipfile.ZipFile(path, "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, changed(name, old.read(name)))
    return path


def _around(draw: Draw, sound: Path, path: Path) -> Path:
    """Write sound tensors, and beside them what no training script leaves."""
    import torch
    from safetensors.torch import save_file

    state = torch.load(sound / "old.pth", weights_only=True)
    if one_of(draw, True, False):
        text = one_of(draw, "[" * 100_000, "nan", '{"a": 1, "a": 2}', "9" * 5000, "\x1b[2J")
        path = path.with_suffix(".safetensors")
        save_file(state, path, metadata={one_of(draw, "img_size", "mean", "classes"): text})
        return path
    nested: Any = ("x",)
    for _ in range(40):  # 2**40 texts in the memory of a few, as a pickle's memo can spell them
        nested = (nested, nested)
    strange = one_of(draw, *STRANGE_VALUES, nested)
    more = {one_of(draw, "classes", "meta", "epoch", 3): strange, "args": {"mean": strange}}
    torch.save({"state_dict": state, **more}, path)
    return path
