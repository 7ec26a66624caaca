"""Checkpoints that are damaged, lie, want to run something, or are folders of such files."""

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
from reliability.mutations import STRANGE_VALUES, spoiled_bytes, spoiled_json, spoiled_json_text
from reliability.readers import Reader, command

__all__ = ["checkpoint", "repository"]


def checkpoint(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Write a checkpoint spoiled in one of the ways."""
    way = rng.choice(WAYS)
    path = way(corpus, rng, folder)
    return command("info", str(path))


def _bytes(corpus: Corpus, rng: random.Random, folder: Path) -> Path:
    source = corpus.folder / rng.choice(("zip.pth", "old.pth", "plain.safetensors"))
    path = folder / f"weights{source.suffix}"
    path.write_bytes(spoiled_bytes(rng, source.read_bytes()))
    return path


def _tensors(corpus: Corpus, rng: random.Random, folder: Path) -> Path:
    """Write a state dict with a tensor renamed, reshaped, retyped, removed, added or NaN."""
    import torch

    state = dict(torch.load(corpus.folder / "old.pth", weights_only=True))
    for _ in range(rng.choice((1, 1, 2, 5))):
        name = rng.choice(list(state))
        value = state.pop(name)
        way = rng.randrange(9)
        if way == 0:
            state[rng.choice(("x.", "module.", "")) + name[rng.randrange(len(name)) :]] = value
        elif way == 1:
            state[name] = value.reshape(-1)
        elif way == 2:
            state[name] = torch.full_like(value.float(), rng.choice((math.nan, math.inf)))
        elif way == 3:
            state[name] = value.to(rng.choice((torch.int64, torch.bool, torch.complex64)))
        elif way == 4:
            shape = [rng.choice((0, 1, 3)) for _ in range(rng.randint(0, 4))]
            state[name] = torch.zeros(1).expand([*shape, rng.choice((1, 2**20, 2**40))])
        elif way == 5:
            state[name] = rng.choice((None, 1, "text", [value], {"a": value}))
        elif way == 6:
            state[rng.choice((name, "é", "a" * 500))] = value.unsqueeze(0)
        elif way == 7:
            state[name] = value * rng.choice((1e38, -1, 0))
    path = folder / "weights.pth"
    with path.open("wb") as file:
        torch.save(rng.choice((state, {"model": state}, {"state_dict": state, "model": 3})), file)
    return path


class _Payload:
    """Unpickles by running something."""

    def __init__(self, call: tuple[Any, tuple[Any, ...]]) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def _payload(corpus: Corpus, rng: random.Random, folder: Path) -> Path:
    """Write a pickle that leaves a marker behind if it runs."""
    marker = str(corpus.marker)
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
    protocol = rng.choice((0, 1, 2, 3, 4, 5))
    data = pickle.dumps(content, protocol=protocol)
    path = folder / "weights.pth"
    if rng.random() < 0.5:
        path.write_bytes(data)
        return path
    with zipfile.ZipFile(corpus.folder / "zip.pth") as sound, zipfile.ZipFile(path, "w") as bad:
        for entry in sound.infolist():
            pickled = entry.filename.endswith("/data.pkl")
            bad.writestr(entry.filename, data if pickled else sound.read(entry))
    return path


def _header(corpus: Corpus, rng: random.Random, folder: Path) -> Path:
    """Write a safetensors file whose header lies: shapes, offsets, types, lengths."""
    data = (corpus.folder / "plain.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = spoiled_json(rng, json.loads(data[8 : 8 + length]))
    if isinstance(header, dict) and rng.random() < 0.5:
        name = rng.choice(list(header) or ["x"])
        huge = rng.choice((2**31, 2**40, 2**62))
        header[name] = {"dtype": "F32", "shape": [huge], "data_offsets": [0, 4 * huge]}
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    stated = len(text) if rng.random() < 0.8 else rng.choice((0, 1, 2**20, 2**63))
    path = folder / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", stated) + text + data[8 + length :])
    return path


def _bomb(corpus: Corpus, rng: random.Random, folder: Path) -> Path:
    """Write a small archive that claims, or unpacks to, much more than it holds."""
    path = folder / "weights.pth"
    with (
        zipfile.ZipFile(corpus.folder / "zip.pth") as sound,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bad,
    ):
        for entry in sound.infolist():
            data = sound.read(entry)
            if entry.filename.endswith(f"/data/{rng.randrange(20)}"):
                data = bytes(rng.choice((2**20, 2**24, 2**26)))
            bad.writestr(entry.filename, data)
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
    strange = rng.choice((*STRANGE_VALUES, _lists_in_lists(40), 10**400))
    content: dict[Any, Any] = {"state_dict": state}
    if rng.random() < 0.5:
        content["args"] = {rng.choice(names): strange}
    else:
        content[rng.choice(("classes", "class_names", "meta", "epoch", 3, (1,)))] = strange
    torch.save(content, folder / "weights.pth")
    return folder / "weights.pth"


def _lists_in_lists(levels: int) -> Any:
    """Return 2**levels texts in the memory of a few, as a pickle's memo can spell them."""
    value: Any = ("x",)
    for _ in range(levels):
        value = (value, value)
    return value


WAYS = (*[_bytes] * 6, *[_tensors] * 4, *[_payload] * 2, *[_header] * 2, _bomb, _around, _around)


def repository(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Write a folder as Transformers saves one, with its JSON spoiled."""
    processor = {
        "size": {"shortest_edge": 64},
        "crop_pct": 0.9,
        "resample": 3,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "rescale_factor": 1 / 255,
        "crop_size": 64,
        "do_normalize": True,
        "do_rescale": True,
        "do_center_crop": True,
    }
    labels = {str(number): f"digit {number}" for number in range(10)}
    config = {
        "model_type": "van",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "num_labels": 10,
        "id2label": labels,
    }
    place = folder / "model"
    place.mkdir()
    (place / "model.safetensors").symlink_to(corpus.folder / "plain.safetensors")
    for name, sound in (("config.json", config), ("preprocessor_config.json", processor)):
        data = spoiled_json_text(rng, sound).encode("utf-8", "surrogatepass")
        (place / name).write_bytes(spoiled_bytes(rng, data) if rng.random() < 0.1 else data)
    return command("info", str(place))
