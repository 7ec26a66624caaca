"""Checkpoints that are damaged, lie or want to run something."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

from reliability.corpus import Corpus
from reliability.spoiled import STRANGE_VALUES, spoiled_bytes, spoiled_json


def spoiled_weights(corpus: Corpus, rng: random.Random, folder: Path) -> Path:
    """Write a checkpoint spoiled in one of the ways below, and return it."""
    return rng.choice(WAYS)(corpus, rng, folder)


def _bytes(corpus: Corpus, rng: random.Random, folder: Path) -> Path:
    source = corpus.folder / rng.choice(("zip.pth", "old.pth", "model.safetensors"))
    path = folder / f"weights{source.suffix}"
    path.write_bytes(spoiled_bytes(rng, source.read_bytes()))
    return path


def _tensors(corpus: Corpus, rng: random.Random, folder: Path) -> Path:
    """Write a state dict with a tensor renamed, reshaped, retyped, removed, added or NaN."""
    import torch

    state = dict(torch.load(corpus.folder / "old.pth", weights_only=True))
    for _ in range(rng.choice((1, 1, 2, 5))):
        name = rng.choice(list(state))
        value, way = state.pop(name), rng.randrange(9)
        huge = [rng.choice((0, 1, 3)), rng.choice((1, 2**20, 2**40))]
        kind, factor = rng.choice((torch.int64, torch.bool, torch.complex64)), rng.choice((1e38, 0))
        values = {
            0: value.reshape(-1),
            1: value.unsqueeze(0),
            2: value.to(kind),
            3: value * factor,
            4: torch.full_like(value.float(), rng.choice((math.nan, math.inf))),
            5: torch.zeros(1).expand(huge),
            6: rng.choice((None, 1, "text", [value], {"a": value})),
        }
        cut = rng.choice(("x.", "module.", "")) + name[rng.randrange(len(name)) :]
        named = name if way != 7 else rng.choice((cut, "é", "a" * 500))
        state |= {named: values.get(way, value)} if way != 8 else {}
    whole = rng.choice((state, {"model": state}, {"state_dict": state, "model": 3}))
    torch.save(whole, folder / "weights.pth")
    return folder / "weights.pth"


class _Payload:
    """Unpickles by running something."""

    def __init__(self, call: tuple[Any, tuple[Any, ...]]) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def _payload(corpus: Corpus, rng: random.Random, folder: Path) -> Path:
    """Write a pickle that leaves a marker behind if it runs."""
    marker, path = str(corpus.marker), folder / "weights.pth"
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (os.system, (f"touch {marker}",)),
        (exec, (f"open({marker!r}, 'w')",)),
        (eval, (f"open({marker!r}, 'w')",)),
        (open, (marker, "w")),
        (shutil.copy, (__file__, marker)),
        (eval, ("__import__('os').getpid()",)),
        (__import__, ("antigravity",)),
        (os.mkdir, (marker,)),
    ]
    payload = _Payload(rng.choice(calls))
    content = rng.choice((payload, {"state_dict": payload}, {"a": [payload]}, {"epoch": payload}))
    data = pickle.dumps(content, protocol=rng.choice((0, 1, 2, 3, 4, 5)))
    if rng.random() < 0.5:
        path.write_bytes(data)
        return path
    return _archive(corpus, path, lambda name, sound: data if name.endswith("/data.pkl") else sound)


def _archive(corpus: Corpus, path: Path, changed: Any, compression: int = 0) -> Path:
    """Write the sound archive with the content of its entries changed."""
    with (
        zipfile.ZipFile(corpus.folder / "zip.pth") as sound,
        zipfile.ZipFile(path, "w", compression) as bad,
    ):
        for name in sound.namelist():
            bad.writestr(name, changed(name, sound.read(name)))
    return path


def _bomb(corpus: Corpus, rng: random.Random, folder: Path) -> Path:
    """Write a small archive that claims, or unpacks to, much more than it holds."""
    which, size = f"/data/{rng.randrange(20)}", rng.choice((2**20, 2**24, 2**26))

    def changed(name: str, sound: bytes) -> bytes:
        return bytes(size) if name.endswith(which) else sound

    return _archive(corpus, folder / "weights.pth", changed, zipfile.ZIP_DEFLATED)


def _header(corpus: Corpus, rng: random.Random, folder: Path) -> Path:
    """Write a safetensors file whose header lies: shapes, offsets, types, lengths."""
    data = (corpus.folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = spoiled_json(rng, json.loads(data[8 : 8 + length]))
    if isinstance(header, dict) and rng.random() < 0.5:
        huge = rng.choice((2**31, 2**40, 2**62))
        lie = {"dtype": "F32", "shape": [huge], "data_offsets": [0, 4 * huge]}
        header[rng.choice(list(header) or ["x"])] = lie
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    stated = len(text) if rng.random() < 0.8 else rng.choice((0, 1, 2**20, 2**63))
    path = folder / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", stated) + text + data[8 + length :])
    return path


def _around(corpus: Corpus, rng: random.Random, folder: Path) -> Path:
    """Write sound tensors, and beside them what no training script leaves."""
    import torch
    from safetensors.torch import save_file

    state = torch.load(corpus.folder / "old.pth", weights_only=True)
    names = ("img_size", "mean", "std", "crop_pct", "interpolation", "input_size", "preprocessing")
    if rng.random() < 0.3:
        text = rng.choice(("[" * 100_000, "nan", '{"a": 1, "a": 2}', "9" * 5000, "\x1b[2J"))
        save_file(state, folder / "w.safetensors", metadata={rng.choice((*names, "classes")): text})
        return folder / "w.safetensors"
    nested: Any = ("x",)
    for _ in range(40):  # 2**40 texts in the memory of a few, as a pickle's memo can spell them
        nested = (nested, nested)
    strange = rng.choice((*STRANGE_VALUES, nested))
    place = rng.choice(("classes", "class_names", "meta", "epoch", 3, (1,)))
    more: dict[Any, Any] = {place: strange}
    if rng.random() < 0.5:
        more = {"args": {rng.choice(names): strange}}
    torch.save({"state_dict": state, **more}, folder / "weights.pth")
    return folder / "weights.pth"


WAYS = (*[_bytes] * 6, *[_tensors] * 4, *[_payload] * 2, *[_header] * 2, _bomb, _around, _around)
