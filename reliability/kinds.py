"""Kinds of files to fuzz: valid files of each kind, corruptions, and commands that read them."""

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

from reliability.corruption import Draw, corrupt_bytes, corrupt_document, corrupt_json, one_of

Reader = Callable[[], object]  # reads a corrupt file like a command: returns, or raises its error
# Corrupts one of the valid files (first folder) into the second folder; returns its reader.
Corruption = Callable[[Draw, Path, Path], Reader]

MARKER = "executed"  # a file in the folder of valid files that an executed payload creates
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
LABELS = {str(number): f"digit {number}" for number in range(10)}
HUB: dict[str, dict[str, Any]] = {
    "config": {"model_type": "van", "hidden_act": "gelu", "num_labels": 10, "id2label": LABELS},
    "preprocessor_config": {"size": {"shortest_edge": 64}, "crop_size": 64, "resample": 3},
}
# The file that is corrupted in a copy of its folder, and the commands that read the copy.
DOCUMENTS: dict[str, tuple[str, ...]] = {
    "manifest": (
        "signed/manifest.json",
        *("info {it}", "inspect {it}", "report {it}", "package triton {it} --output {it}-out"),
        "predict {it} {valid}/bundle/golden/0.png",
    ),
    "signature": (
        "signed/manifest.json.sig",
        "verify-signature {it} --public-key {valid}/key/is.pub",
    ),
    "key": ("key/is.pub", "verify-signature {valid}/signed --public-key {it}/is.pub"),
    "sidecar": ("engine/van.json", "inspect {it}/van.plan"),
    "config": ("hub/config.json", "info {it}"),
    "preprocessor": ("hub/preprocessor_config.json", "info {it}"),
}


def make_valid_files(folder: Path) -> None:
    """Write valid files of each kind, made from the embedded network, into an empty folder."""
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
    for name, content in HUB.items():
        (folder / f"hub/{name}.json").write_text(json.dumps(content))
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
    """Return a reader that runs ``van-deploy`` with these arguments in this process."""

    def run() -> object:
        from typer.testing import CliRunner

        from van_deploy.cli.app import app

        result = CliRunner().invoke(app, [*map(str, words), "--json"])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code

    return run


def checkpoint(draw: Draw, valid: Path, folder: Path) -> Reader:
    """Corrupt bytes, tensors, headers or archives, or write a malicious pickle; read by `info`."""
    ways = (*[_corrupt_checkpoint_bytes] * 4, *[_corrupt_tensor] * 3)
    ways = (*ways, _write_payload, _corrupt_header, _write_zip_bomb)
    return command("info", one_of(draw, *ways)(draw, valid, folder / "weights.pth"))


def _corrupt_checkpoint_bytes(draw: Draw, valid: Path, path: Path) -> Path:
    source = valid / one_of(draw, "zip.pth", "old.pth", "hub/model.safetensors")
    path = path.with_suffix(source.suffix)
    path.write_bytes(corrupt_bytes(draw, source.read_bytes()))
    return path


def _corrupt_tensor(draw: Draw, valid: Path, path: Path) -> Path:
    """Write a state dict with a tensor renamed, reshaped, cast, filled with NaN, or replaced."""
    import torch

    state: dict[str, Any] = torch.load(valid / "old.pth", weights_only=True)
    name = one_of(draw, *state)
    value = state.pop(name)
    changed = [value.reshape(-1), value.unsqueeze(0), value * 1e38, value.to(torch.complex64)]
    changed += [torch.full_like(value.float(), math.nan), torch.zeros(1).expand(3, 2**40)]
    new_name = one_of(draw, name, "module." + name, name[1:], "é", "a" * 500)
    state[new_name] = one_of(draw, *changed, None, "text", [value], {"a": value})
    torch.save(one_of(draw, state, {"model": state}, {"state_dict": state, "model": 3}), path)
    return path


def _write_payload(draw: Draw, valid: Path, path: Path) -> Path:
    """Write a pickle that creates the marker if it is executed."""
    marker = str(valid / MARKER)
    call = one_of(
        draw,
        (os.system, (f"touch {marker}",)),
        (exec, (f"open({marker!r}, 'w')",)),
        (open, (marker, "w")),
        (shutil.copy, (__file__, marker)),
        (eval, ("__import__('os').getpid()",)),
        (os.mkdir, (marker,)),
    )
    payload = type("Payload", (), {"__reduce__": lambda _: call})()
    content = one_of(draw, payload, {"state_dict": payload}, {"epoch": payload})
    data = pickle.dumps(content, protocol=one_of(draw, 0, 2, 5))
    path.write_bytes(data)
    if one_of(draw, True, False):
        _rewrite_archive(valid, path, lambda name, old: data if name.endswith("data.pkl") else old)
    return path


def _corrupt_header(draw: Draw, valid: Path, path: Path) -> Path:
    """Write a safetensors file with incorrect shapes, offsets, types or lengths in its header."""
    data = (valid / "hub/model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, huge = corrupt_json(draw, json.loads(data[8 : 8 + length])), one_of(draw, 2**31, 2**62)
    if isinstance(header, dict) and one_of(draw, True, False):
        header["x"] = {"dtype": "F32", "shape": [huge], "data_offsets": [0, 4 * huge]}
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    stated = one_of(draw, len(text), len(text), 0, 1, 2**20, 2**63)
    path = path.with_suffix(".safetensors")
    path.write_bytes(struct.pack("<Q", stated) + text + data[8 + length :])
    return path


def _write_zip_bomb(draw: Draw, valid: Path, path: Path) -> Path:
    """Write a small archive that unpacks to a much larger size."""
    end, size = f"/data/{one_of(draw, 0, 3, 19)}", one_of(draw, 2**20, 2**26)
    return _rewrite_archive(
        valid, path, lambda name, old: bytes(size) if name.endswith(end) else old
    )


def _rewrite_archive(valid: Path, path: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """Write the valid archive with the content of its entries changed."""
    with zipfile.ZipFile(valid / "zip.pth") as old, zipfile.ZipFile(path, "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return path


def document(names: str, draw: Draw, valid: Path, folder: Path) -> Reader:
    """Corrupt the bytes or values of one document; read by one of its commands."""
    from van_deploy.files import content_key

    file, *lines = DOCUMENTS[one_of(draw, *names.split())]
    it = Path(shutil.copytree((valid / file).parent, folder / "it"))
    path = it / Path(file).name
    data = corrupt_document(draw, path.read_bytes(), path.suffix)
    if path.name == "van.json" and one_of(draw, True, True, False):
        edited = corrupt_json(draw, json.loads(path.read_bytes()))  # with a matching digest
        if isinstance(edited, dict):
            edited["sidecar_sha256"] = content_key({**edited, "sidecar_sha256": ""})
        data = json.dumps(edited).encode("utf-8", "surrogatepass")
    path.write_bytes(data)
    words = one_of(draw, *lines).split()
    return command(*(word.format(it=it, valid=valid) for word in words))


def settings_file(kind: str, draw: Draw, valid: Path, folder: Path) -> Reader:
    """Corrupt a recipe or a calibration set; read as `run` and `quantize` read them."""
    from van_deploy import recipe
    from van_deploy.precision.images import choose_images

    files = recipe.builtin_files(recipe.RECIPES if kind == "recipe" else recipe.CALIBRATION_SETS)
    path = Path(shutil.copy(one_of(draw, *sorted(files.values())), folder))
    path.write_bytes(corrupt_document(draw, path.read_bytes(), path.suffix))
    if kind == "recipe":
        return lambda: recipe.read_recipe(path)
    images = one_of(draw, None, *[valid / "bundle/golden"] * 3)  # a set's own images, or a folder
    return lambda: choose_images(recipe.load_calibration_set(str(path)).images, images)


def onnx_file(draw: Draw, valid: Path, folder: Path) -> Reader:
    """Corrupt bytes, shapes, types, operators or the opset; read by `inspect` and `build`."""
    import onnx

    from van_deploy.config import BuildOptions
    from van_deploy.engine.build import has_external_weights

    path, source = folder / "model.onnx", valid / "bundle/model.onnx"
    change = one_of(draw, "bytes", "bytes", "dims", "type", "operator", "opset")
    model = onnx.load(source)
    tensor, node = one_of(draw, *model.graph.initializer), one_of(draw, *model.graph.node)
    if change == "dims":
        tensor.ClearField("dims")
        tensor.dims.extend([one_of(draw, -1, 0, 2**31, 2**62) for _ in range(3)])
    elif change == "type":
        tensor.data_type = one_of(draw, *range(40))
    elif change == "operator":
        node.op_type = one_of(draw, "Loop", "If", "", "é", "Conv", "PyFunc")
    elif change == "opset":
        model.opset_import[0].version = one_of(draw, 0, 1, 99, 2**40)
    data = source.read_bytes()
    path.write_bytes(corrupt_bytes(draw, data) if change == "bytes" else model.SerializeToString())
    build = partial(has_external_weights, path, BuildOptions())
    return one_of(draw, command("inspect", path), build)


def image(draw: Draw, valid: Path, folder: Path) -> Reader:
    """Corrupt an image of seven formats, or replace it by PostScript; read as all commands do."""
    from van_deploy.data.images import open_image

    source = one_of(draw, *sorted(valid.glob("image.*")))
    huge = b"P6 %d %d 255\n" % (one_of(draw, 2**16, 2**31), 2**16)  # without pixel data
    data, path = corrupt_bytes(draw, source.read_bytes()), folder / source.name
    # Pillow would pass PostScript to Ghostscript, whatever the file name is.
    path.write_bytes(one_of(draw, data, data, data, data, huge, POSTSCRIPT))
    return lambda: open_image(path)


# Share of all cases in thousandths, description of the corruption, and the corruption.
KINDS: dict[str, tuple[int, str, Corruption]] = {
    "checkpoint": (250, "archives, tensors, headers, malicious pickles", checkpoint),
    "onnx": (150, "bytes, shapes, types, operators", onnx_file),
    "repository": (40, "JSON files of a hub repository", partial(document, "config preprocessor")),
    "manifest": (130, "manifest of a bundle", partial(document, "manifest")),
    "recipe": (80, "recipes", partial(settings_file, "recipe")),
    "calibration": (50, "calibration sets", partial(settings_file, "calibration")),
    "sidecar": (60, "sidecars of engines, most with a valid digest", partial(document, "sidecar")),
    "image": (100, "seven formats, and PostScript with their names", image),
    "signature": (30, "signatures and keys", partial(document, "signature key")),
}
