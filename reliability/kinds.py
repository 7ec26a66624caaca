"""Kinds of files to fuzz: valid files of each kind, corruptions, and commands that read them."""

import contextlib
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from reliability.corruption import Draw, corrupt_bytes, corrupt_document, one_of
from van_deploy.config import BuildOptions
from van_deploy.data.images import open_image
from van_deploy.engine.build import has_external_weights
from van_deploy.precision.images import choose_images
from van_deploy.recipe import load_calibration_set, read_recipe

ROOT = Path(__file__).parent.parent
MARKER = "executed"  # a file in the folder of valid files that an executed payload creates
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
LABELS = {str(number): f"digit {number}" for number in range(10)}
HUB: dict[str, dict[str, Any]] = {
    "config": {"model_type": "van", "hidden_act": "gelu", "num_labels": 10, "id2label": LABELS},
    "preprocessor_config": {"size": {"shortest_edge": 64}, "crop_size": 64, "resample": 3},
}
KEYS = ("genpkey -algorithm ed25519 -out secret", "pkey -pubout -in secret -out signed/key.pub")


def make_valid_files(folder: Path) -> None:
    """Write valid files of each kind, made from the embedded network, into an empty folder.

    A corruption that changes a document copies its folder.
    """
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    import van_deploy
    from van_deploy.signing import sign_bundle

    van_deploy.export("van_digits", folder / "bundle")
    state = {k: v.clone() for k, v in van_deploy.load_van("van_digits").model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, folder / "zip.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("hub", "recipe"):
        (folder / name).mkdir()
    save_file(state, folder / "hub/model.safetensors")
    for name, content in HUB.items():
        (folder / f"hub/{name}.json").write_text(json.dumps(content))
    signed = Path(shutil.copytree(folder / "bundle", folder / "signed/bundle"))
    run_command("build", signed, "--backend", "tensorrt-rtx", "--target", "sm_89")
    for line in KEYS:
        subprocess.run(["openssl", *line.split()], cwd=folder, check=True)
    sign_bundle(signed, folder / "secret")
    page = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
    (folder / "recipe/all.toml").write_text(page.partition("```toml\n")[2].partition("```")[0])
    shutil.copytree(ROOT / "calibration", folder / "calibration")
    shutil.copytree(folder / "bundle/golden", folder / "calibration/golden")
    image = Image.open(folder / "bundle/golden/0.png").convert("RGB")
    for suffix in ("png", "jpg", "bmp", "tiff", "webp", "ppm"):
        image.save(folder / f"image.{suffix}")
    image.save(folder / "image.gif", save_all=True, append_images=[image.rotate(9)])


def run_command(*words: object) -> int:
    """Run ``van-deploy`` in this process; return its exit code, or raise a bug's error."""
    from typer.testing import CliRunner

    from van_deploy.cli.app import app

    line = [*map(str, words), "--json"]
    return CliRunner().invoke(app, line, catch_exceptions=False).exit_code


def checkpoint(draw: Draw, valid: Path, folder: Path) -> Path:
    """Corrupt bytes, tensors, headers or archives, or write a malicious pickle."""
    ways = (*[_corrupt_checkpoint_bytes] * 4, *[_corrupt_tensor] * 3)
    ways = (*ways, *[_corrupt_archive] * 2, _corrupt_header)
    path: Path = one_of(draw, *ways)(draw, valid, folder / "weights.pth")
    return path


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


def _corrupt_archive(draw: Draw, valid: Path, path: Path) -> Path:
    """Write a pickle that creates the marker if it is executed, alone or in an archive, or a bomb.

    A bomb is a small archive that unpacks to a much larger size.
    """
    marker = str(valid / MARKER)
    calls: dict[Any, Any] = {os.system: (f"touch {marker}",), exec: (f"open({marker!r}, 'w')",)}
    calls |= {open: (marker, "w"), shutil.copy: (__file__, marker), os.mkdir: (marker,)}
    call = one_of(draw, *calls.items(), (eval, ("__import__('os').getpid()",)))
    payload = type("Payload", (), {"__reduce__": lambda _: call})()
    content = one_of(draw, payload, {"state_dict": payload}, {"epoch": payload})
    data = pickle.dumps(content, protocol=one_of(draw, 0, 2, 5))
    path.write_bytes(data)
    end = one_of(draw, "", "data.pkl", "/data/0", "/data/3", "/data/19")
    if not end:
        return path
    data = data if end == "data.pkl" else bytes(one_of(draw, 2**20, 2**26))
    with zipfile.ZipFile(valid / "zip.pth") as old, zipfile.ZipFile(path, "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith(end) else old.read(name))
    return path


def _corrupt_header(draw: Draw, valid: Path, path: Path) -> Path:
    """Write a safetensors file with incorrect shapes, offsets, types or lengths in its header."""
    data, huge = (valid / "hub/model.safetensors").read_bytes(), one_of(draw, 2**31, 2**62)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if draw(st.booleans()):
        header["x"] = {"dtype": "F32", "shape": [huge], "data_offsets": [0, 4 * huge]}
    text = corrupt_document(draw, json.dumps(header, indent=1).encode())
    stated = one_of(draw, len(text), len(text), 0, 1, 2**20, 2**63)
    path = path.with_suffix(".safetensors")
    path.write_bytes(struct.pack("<Q", stated) + text + data[8 + length :])
    return path


def document(place: str, draw: Draw, valid: Path, folder: Path) -> Path:
    """Corrupt a document in a copy of its folder.

    Args:
        place: the folder, and the patterns of the documents in it.
        draw: decides the corruption.
        valid: folder of the valid files.
        folder: for the copy.
    """
    from van_deploy.files import content_key

    name, *patterns = place.split()
    it = Path(shutil.copytree(valid / name, folder / "it"))
    path = one_of(draw, *sorted(path for pattern in patterns for path in it.glob(pattern)))
    data = corrupt_document(draw, path.read_bytes())
    if path.parent.name == "engines" and one_of(draw, True, True, False):
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            sidecar = {**json.loads(data), "sidecar_sha256": ""}
            data = json.dumps({**sidecar, "sidecar_sha256": content_key(sidecar)}).encode()
    path.write_bytes(data)
    return path


def read_calibration_set(path: Path) -> object:
    """Read a calibration set, and choose its own images, or those in a folder."""
    images = load_calibration_set(str(path)).images
    return choose_images(images, path.parent / "golden" if images.source == "folder" else None)


read_as_build = partial(has_external_weights, options=BuildOptions())


def onnx_file(draw: Draw, valid: Path, folder: Path) -> Path:
    """Corrupt bytes, shapes, types, operators or the opset."""
    import onnx

    path, model = folder / "model.onnx", onnx.load(valid / "bundle/model.onnx")
    data = corrupt_bytes(draw, (valid / "bundle/model.onnx").read_bytes())
    tensor, node = one_of(draw, *model.graph.initializer), one_of(draw, *model.graph.node)
    place = one_of(draw, "bytes", "bytes", "dims", "data_type", "op_type", "version")
    if place == "dims":
        tensor.dims[:] = [one_of(draw, -1, 0, 2**31, 2**62) for _ in range(3)]
    elif place == "data_type":
        tensor.data_type = one_of(draw, *range(40))
    elif place == "op_type":
        node.op_type = one_of(draw, "Loop", "If", "", "é", "Conv", "PyFunc")
    elif place == "version":
        model.opset_import[0].version = one_of(draw, 0, 1, 99, 2**40)
    path.write_bytes(data if place == "bytes" else model.SerializeToString())
    return path


def image(draw: Draw, valid: Path, folder: Path) -> Path:
    """Corrupt an image of seven formats, or replace it by PostScript."""
    source = one_of(draw, *sorted(valid.glob("image.*")))
    huge = b"P6 %d %d 255\n" % (one_of(draw, 2**16, 2**31), 2**16)  # without pixel data
    data, path = corrupt_bytes(draw, source.read_bytes()), folder / source.name
    # Pillow would pass PostScript to Ghostscript, whatever the file name is.
    path.write_bytes(one_of(draw, data, data, data, data, huge, POSTSCRIPT))
    return path


READERS = (
    *("info {it}/bundle", "inspect {it}/bundle", "report {it}/bundle"),
    "package triton {it}/bundle --output {it}/out",
    "predict {it}/bundle {it}/bundle/golden/0.png",
)
VERIFY = "verify-signature {it}/bundle --public-key {it}/key.pub"
# Share of all cases in thousandths, description, a function that corrupts one of the valid files in
# the first folder into the second one (or folder and patterns of documents), and readers: functions
# of the corrupt file's path, and commands, where {it} is the copied folder of a document.
KINDS: dict[str, tuple[Any, ...]] = {
    "checkpoint": (250, "archives, tensors, headers, malicious pickles", checkpoint, "info {path}"),
    "onnx": (150, "bytes, shapes, types, operators", onnx_file, "inspect {path}", read_as_build),
    "repository": (40, "JSON files of a hub repository", "hub *.json", "info {it}"),
    "manifest": (130, "manifest of a bundle", "signed */manifest.json", *READERS),
    "recipe": (80, "recipes", "recipe all.toml", read_recipe),
    "calibration": (50, "calibration sets", "calibration *.toml", read_calibration_set),
    "sidecar": (
        *(60, "sidecars of engines, most with a valid digest"),
        *("signed */engines/*.json", "inspect {plan}"),
    ),
    "image": (100, "seven formats, and PostScript with their names", image, open_image),
    "signature": (30, "signatures and keys", "signed */*.sig key.pub", VERIFY),
}
