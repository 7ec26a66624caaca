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
LABELS = {str(number): f"digit {number}" for number in range(10)}
HUB: dict[str, dict[str, Any]] = {
    "config": {"model_type": "van", "hidden_act": "gelu", "num_labels": 10, "id2label": LABELS},
    "preprocessor_config": {"size": {"shortest_edge": 64}, "crop_size": 64, "resample": 3},
}
DOCUMENTS: dict[str, tuple[str, ...]] = {
    "manifest": (
        "signed/manifest.json",
        *("info {it}", "inspect {it}", "report {it}", "package triton {it} --output {it}-out"),
        "predict {it} {sound}/bundle/golden/0.png",
    ),
    "signature": (
        "signed/manifest.json.sig",
        "verify-signature {it} --public-key {sound}/key/is.pub",
    ),
    "key": ("key/is.pub", "verify-signature {sound}/signed --public-key {it}/is.pub"),
    "sidecar": ("engine/van.json", "inspect {it}/van.plan"),
    "config": ("hub/config.json", "info {it}"),
    "preprocessor": ("hub/preprocessor_config.json", "info {it}"),
}
"""The sound file that is spoiled in a copy of its folder; the commands that read that copy."""


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
    for name in ("hub", "key", "engine"):
        (folder / name).mkdir()
    save_file(state, folder / "hub/model.safetensors")
    for name, document in HUB.items():
        (folder / f"hub/{name}.json").write_text(json.dumps(document))
    secret, public = folder / "secret.pem", folder / "key/is.pub"
    for words in (("genpkey", "-algorithm", "ed25519"), ("pkey", "-pubout", "-in", str(secret))):
        out = secret if words[0] == "genpkey" else public
        subprocess.run(["openssl", *words, "-out", str(out)], check=True)
    shutil.copytree(folder / "bundle", folder / "signed")
    sign_bundle(folder / "signed", secret)
    built = Path(shutil.copytree(folder / "bundle", folder / "built"))
    if command("build", built, "--backend", "tensorrt-rtx", "--target", "sm_89")() == 0:
        for file in (built / "engines").iterdir():
            shutil.copy(file, (folder / "engine/van").with_suffix(file.suffix))
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


def checkpoint(draw: Draw, sound: Path, folder: Path) -> Reader:
    """Bytes, tensors, headers and archives of weights, pickles that run something; by `info`."""
    ways = (*[_bytes] * 4, *[_tensors] * 3, _payload, _header, _bomb)
    return command("info", one_of(draw, *ways)(draw, sound, folder / "weights.pth"))


def _bytes(draw: Draw, sound: Path, path: Path) -> Path:
    source = sound / one_of(draw, "zip.pth", "old.pth", "hub/model.safetensors")
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
    data = (sound / "hub/model.safetensors").read_bytes()
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
    """Spoil one of some documents, its bytes or what it says; one of its commands reads it."""
    from van_deploy.files import content_key

    file, *lines = DOCUMENTS[one_of(draw, *names.split())]
    it = Path(shutil.copytree((sound / file).parent, folder / "it"))
    path = it / Path(file).name
    data = spoiled_document(draw, path.read_bytes(), path.suffix)
    if path.name == "van.json" and one_of(draw, True, True, False):
        edited = spoiled_json(draw, json.loads(path.read_bytes()))  # by one who knows of its digest
        if isinstance(edited, dict):
            edited["sidecar_sha256"] = content_key({**edited, "sidecar_sha256": ""})
        data = json.dumps(edited).encode("utf-8", "surrogatepass")
    path.write_bytes(data)
    words = one_of(draw, *lines).split()
    return command(*(word.format(it=it, sound=sound) for word in words))


def settings_file(of: str, draw: Draw, sound: Path, folder: Path) -> Reader:
    """Spoil a recipe or a calibration set; read as `run` and `quantize` read them."""
    from van_deploy import recipe
    from van_deploy.precision.images import choose_images

    known = recipe.builtin_files(recipe.RECIPES if of == "recipe" else recipe.CALIBRATION_SETS)
    path = Path(shutil.copy(one_of(draw, *sorted(known.values())), folder))
    path.write_bytes(spoiled_document(draw, path.read_bytes(), path.suffix))
    if of == "recipe":
        return lambda: recipe.read_recipe(path)
    return lambda: choose_images(recipe.load_calibration_set(str(path)).images)


def onnx_file(draw: Draw, sound: Path, folder: Path) -> Reader:
    """Bytes, shapes, types and operators; by `inspect` and `build`."""
    import onnx

    from van_deploy.config import BuildOptions
    from van_deploy.engine.build import has_external_weights

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
    return one_of(
        draw, command("inspect", path), lambda: has_external_weights(path, BuildOptions())
    )


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
    "recipe": (80, "recipes", partial(settings_file, "recipe")),
    "calibration": (50, "calibration sets", partial(settings_file, "calibration")),
    "sidecar": (60, "engines' sidecars, most with a right digest", partial(document, "sidecar")),
    "image": (100, "seven formats, and PostScript by their names", image),
    "signature": (30, "signatures and keys", partial(document, "signature key")),
}
"""How much of all cases each kind is, in thousandths; what is spoiled; and what spoils it."""
