"""What is fuzzed: sound files of each kind, how each is spoiled, and what reads it."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from reliability.spoiled import Draw, one_of, spoiled_bytes, spoiled_document, spoiled_json

Reader = Callable[[], object]
"""Reads a spoiled file; returns or raises what the program would."""

Spoil = Callable[[Draw, Path, Path], Reader]
"""Spoils one of the sound files (in the first folder) into the second; returns its reader."""

MARKER = "executed"  # of the sound files' folder: a payload that runs makes it
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
READING = ("info", "inspect", "predict", "report", "package")
LABELS = {str(number): f"digit {number}" for number in range(10)}
DOCUMENTS: dict[str, dict[str, Any]] = {
    "config": {"model_type": "van", "hidden_act": "gelu", "num_labels": 10, "id2label": LABELS},
    "preprocessor_config": {"size": {"shortest_edge": 64}, "crop_size": 64, "resample": 3},
}


def make_sound_files(folder: Path) -> None:
    """Write sound files of each kind, made from the embedded network, into an empty folder."""
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    import van_deploy
    from van_deploy.signing import sign_bundle

    van_deploy.export("van_digits", folder / "bundle")
    state = {k: v.clone() for k, v in van_deploy.load_van("van_digits").model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, folder / "zip.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, folder / "model.safetensors")
    for name, document in DOCUMENTS.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    key, public = folder / "key.pem", folder / "key.pem.pub"
    for words in (("genpkey", "-algorithm", "ed25519"), ("pkey", "-pubout", "-in", str(key))):
        out = key if words[0] == "genpkey" else public
        subprocess.run(["openssl", *words, "-out", str(out)], check=True)
    shutil.copytree(folder / "bundle", folder / "signed")
    sign_bundle(folder / "signed", key)
    build = ("build", folder / "bundle", "--backend", "tensorrt-rtx", "--target", "sm_89")
    if command(*build)() == 0:
        for file in (folder / "bundle/engines").iterdir():
            shutil.copy(file, (folder / "engine").with_suffix(file.suffix))
        shutil.rmtree(folder / "bundle")
        van_deploy.export("van_digits", folder / "bundle")
    grey = Image.radial_gradient("L").resize((60, 40))
    image = Image.merge("RGB", (grey, grey.rotate(90), grey.rotate(180)))
    more: dict[str, Any] = {"gif": {"save_all": True, "append_images": [image.rotate(9)]}}
    for suffix in ("png", "jpg", "bmp", "tiff", "webp", "gif", "ppm"):
        image.save(folder / f"image.{suffix}", **more.get(suffix, {}))


def command(*words: object) -> Reader:
    """Return a reader that runs ``van-deploy`` with these words, in this process."""

    def run() -> object:
        from typer.testing import CliRunner

        from van_deploy.cli.app import app

        result = CliRunner().invoke(app, [*map(str, words), "--json"])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code

    return run


def on_bundle(sound: Path, name: str, bundle: Path) -> Reader:
    """Return the reader of a bundle that a command is."""
    more: dict[str, tuple[object, ...]] = {
        "predict": (sound / "bundle/golden/0.png",),
        "package": ("--output", bundle.with_name("out")),
        "verify-signature": ("--public-key", sound / "key.pem.pub"),
        "sign": ("--key", sound / "key.pem"),
    }
    first = ("package", "triton") if name == "package" else (name,)
    return command(*first, bundle, *more.get(name, ()))


def checkpoint(draw: Draw, sound: Path, folder: Path) -> Reader:
    """Bytes, tensors, headers and archives of weights, pickles that run something; by `info`."""
    ways = (*[_bytes] * 4, *[_tensors] * 3, _payload, _header, _bomb)
    return command("info", one_of(draw, *ways)(draw, sound, folder / "weights.pth"))


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


def document(names: str, draw: Draw, sound: Path, folder: Path) -> Reader:
    """Spoil one of some documents: its bytes, or what it says."""
    from van_deploy.files import content_key

    path, read = _placed(one_of(draw, *names.split()), draw, sound, folder)
    data = spoiled_document(draw, path.read_bytes(), path.suffix)
    if path.name == "engine.json" and one_of(draw, True, True, False):
        edited = spoiled_json(draw, json.loads(path.read_bytes()))  # by one who knows of its digest
        if isinstance(edited, dict):
            edited["sidecar_sha256"] = content_key({**edited, "sidecar_sha256": ""})
        data = json.dumps(edited).encode("utf-8", "surrogatepass")
    path.write_bytes(data)
    return read


def _placed(name: str, draw: Draw, sound: Path, folder: Path) -> tuple[Path, Reader]:
    """Put a sound document into a folder; return it, and what reads it."""
    from van_deploy.precision.images import choose_images
    from van_deploy.recipe import (
        CALIBRATION_SETS,
        builtin_files,
        calibration_set_named,
        read_recipe,
    )

    if name in {"manifest", "signature"}:
        bundle = Path(shutil.copytree(sound / "signed", folder / "bundle"))
        verb = one_of(draw, *READING) if name == "manifest" else "verify-signature"
        file = "manifest.json" if name == "manifest" else "manifest.json.sig"
        return bundle / file, on_bundle(sound, verb, bundle)
    if name == "key":
        path = Path(shutil.copy(sound / "key.pem.pub", folder))
        return path, command("verify-signature", sound / "signed", "--public-key", path)
    beside = {
        "sidecar": ("engine.json", "engine.plan"),
        "config": ("config.json", "preprocessor_config.json", "model.safetensors"),
        "preprocessor": ("preprocessor_config.json", "config.json", "model.safetensors"),
    }
    if name in beside:
        path, second, *_ = (Path(shutil.copy(sound / n, folder)) for n in beside[name])
        return path, command(*(("inspect", second) if name == "sidecar" else ("info", folder)))
    if name == "recipe":
        path = Path(shutil.copy(one_of(draw, *sorted(builtin_files().values())), folder))
        return path, lambda: read_recipe(path)
    source = builtin_files(CALIBRATION_SETS)[one_of(draw, "digits", "folder", "cifar10")]
    path = Path(shutil.copy(source, folder))
    return path, lambda: choose_images(calibration_set_named(str(path)).images)


def onnx_file(draw: Draw, sound: Path, folder: Path) -> Reader:
    """Bytes, shapes, types and operators; by `inspect` and `build`."""
    import onnx

    from van_deploy.config import BuildOptions
    from van_deploy.engine.build import has_weights_beside

    path, source = folder / "model.onnx", sound / "bundle/model.onnx"
    way = one_of(draw, "bytes", "bytes", "dims", "type", "operator", "opset")
    model = onnx.load(source)
    tensor, node = one_of(draw, *model.graph.initializer), one_of(draw, *model.graph.node)
    if way == "dims":
        tensor.ClearField("dims")
        tensor.dims.extend([one_of(draw, -1, 0, 2**31, 2**62) for _ in range(3)])
    elif way == "type":
        tensor.data_type = one_of(draw, *range(40))
    elif way == "operator":
        node.op_type = one_of(draw, "Loop", "If", "", "é", "Conv", "PyFunc")
    elif way == "opset":
        model.opset_import[0].version = one_of(draw, 0, 1, 99, 2**40)
    data = source.read_bytes()
    path.write_bytes(spoiled_bytes(draw, data) if way == "bytes" else model.SerializeToString())
    return one_of(draw, command("inspect", path), lambda: has_weights_beside(path, BuildOptions()))


def image(draw: Draw, sound: Path, folder: Path) -> Reader:
    """PNG, JPEG, BMP, TIFF, WebP, GIF, PPM, and PostScript by their names; as every command."""
    from van_deploy.data.images import open_image

    source = one_of(draw, *sorted(sound.glob("image.*")))
    huge = b"P6 %d %d 255\n" % (one_of(draw, 2**16, 2**31), 2**16)  # promises what is not there
    data, path = spoiled_bytes(draw, source.read_bytes()), folder / source.name
    # PostScript is what Pillow would give to Ghostscript, under another name.
    path.write_bytes(one_of(draw, data, data, data, data, huge, POSTSCRIPT))
    return lambda: open_image(path)


KINDS: dict[str, tuple[int, str, Spoil]] = {
    "checkpoint": (250, "archives, tensors, pickles that run something", checkpoint),
    "onnx": (150, "bytes, shapes, types, operators", onnx_file),
    "repository": (40, "the JSON beside weights", partial(document, "config preprocessor")),
    "manifest": (130, "a bundle's manifest", partial(document, "manifest")),
    "recipe": (80, "recipes", partial(document, "recipe")),
    "calibration": (50, "calibration sets", partial(document, "calibration")),
    "sidecar": (60, "engines' sidecars, most with a right digest", partial(document, "sidecar")),
    "image": (100, "seven formats, and PostScript by their names", image),
    "signature": (30, "signatures and keys", partial(document, "signature key")),
}
"""How much of all cases each kind is, in thousandths; what is spoiled; and what spoils it."""
