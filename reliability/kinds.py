"""What is fuzzed: sound files of each kind, how each is spoiled, and what reads it."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from reliability.spoiled import (
    STRANGE_VALUES,
    Draw,
    one_of,
    spoiled_bytes,
    spoiled_document,
    spoiled_json,
)
from reliability.weights import spoiled_weights

Reader = Callable[[], object]
"""Reads a spoiled file; returns or raises what the program would."""

Spoil = Callable[[Draw, Path, Path], Reader]
"""Spoils one of the sound files (in the first folder) into the second; returns its reader."""

PLACES = ("../../etc/passwd", "/etc/passwd", "there", "", "link", "link/x", "a\\b", "..")
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
ENTRIES = (
    *("manifest.json", "manifest.json.sig", "model.onnx", "golden/0.png", "labels.txt"),
    *(".lock", ".pending", ".staging-x", "engines", "bench.json", "stranger"),
)
GONE = (
    *("model.onnx", "manifest.json", "engines", "model.onnx/x", "../outside", "/etc/passwd", ""),
    *(".", ".lock", "a" * 300, "link/outside", "\x00", "é"),
)
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
    return command("info", spoiled_weights(draw, sound, folder))


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
    from van_deploy.calibration_set import builtin_calibration_sets, calibration_set_named
    from van_deploy.precision.images import choose_images
    from van_deploy.recipe import builtin_files, read_recipe

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
    source = builtin_calibration_sets()[one_of(draw, "digits", "folder", "cifar10")]
    path = Path(shutil.copy(source, folder))
    return path, lambda: choose_images(calibration_set_named(str(path)).images)


def onnx_file(draw: Draw, sound: Path, folder: Path) -> Reader:
    """Bytes, weights in other files, shapes, types and operators; by `inspect` and `build`."""
    import onnx

    from van_deploy.config import BuildOptions
    from van_deploy.engine.build import has_weights_beside

    path, source = folder / "model.onnx", sound / "bundle/model.onnx"
    way = one_of(draw, "bytes", "bytes", "elsewhere", "dims", "type", "operator", "opset")
    model = onnx.load(source)
    tensor, node = one_of(draw, *model.graph.initializer), one_of(draw, *model.graph.node)
    if way == "elsewhere":
        if one_of(draw, True, False):  # a constant made of it
            constant = onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
            model.graph.initializer.remove(tensor)
            model.graph.node.insert(0, constant)
            tensor = model.graph.node[0].attribute[0].t
        (folder / "link").symlink_to(one_of(draw, "/etc/passwd", "../there", "link"))
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=one_of(draw, *PLACES))
        tensor.external_data.add(key="offset", value=one_of(draw, "0", "-1", "x", str(2**62)))
        tensor.external_data.add(key="length", value=one_of(draw, "4", "-4", str(2**62)))
    elif way == "dims":
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


def archive(draw: Draw, sound: Path, folder: Path) -> Reader:
    """Images in `.npz`: other arrays, spoiled bytes and entries; read as `quantize` reads them."""
    import numpy as np

    from van_deploy.calibration_set import ImageSelection
    from van_deploy.precision.images import choose_images

    shapes = ((4, 8, 8), (4, 8, 8, 3), (0, 8, 8), (), (2**14, 2**14))
    images = [np.zeros(shape, np.uint8) for shape in shapes]
    images += [np.zeros((2, 3, 8, 8), np.float32), np.array([None, {}], object)]
    arrays: dict[str, Any] = {"images": one_of(draw, *images)}
    if one_of(draw, True, False):
        arrays["labels"] = np.zeros(one_of(draw, (4,), (), (4, 2), (9,)))
    path, made, way = folder / "images.npz", io.BytesIO(), one_of(draw, "sound", "bytes", "entry")
    np.savez_compressed(made, **arrays)
    data = made.getvalue()
    if way == "entry":  # one entry spoiled, its checksum right
        with zipfile.ZipFile(made) as old, zipfile.ZipFile(path, "w", 8) as bad:
            for name in old.namelist():
                data = old.read(name)
                content = spoiled_bytes(draw, data[:4096]) + data[4096:]
                bad.writestr(name, content if one_of(draw, True, True, False) else bytes(2**28))
    else:
        path.write_bytes(spoiled_bytes(draw, data) if way == "bytes" else data)
    return lambda: choose_images(ImageSelection(count=2), path)


def image(draw: Draw, sound: Path, folder: Path) -> Reader:
    """PNG, JPEG, BMP, TIFF, WebP, GIF, PPM, and PostScript by their names; as every command."""
    from van_deploy.data import open_image

    source = one_of(draw, *sorted(sound.glob("image.*")))
    huge = b"P6 %d %d 255\n" % (one_of(draw, 2**16, 2**31), 2**16)  # promises what is not there
    data, path = spoiled_bytes(draw, source.read_bytes()), folder / source.name
    # PostScript is what Pillow would give to Ghostscript, under another name.
    path.write_bytes(one_of(draw, data, data, data, data, huge, POSTSCRIPT))
    return lambda: open_image(path)


def bundle_folder(draw: Draw, sound: Path, folder: Path) -> Reader:
    """A bundle's folder: pipes, links, half a commit; also by `sign` and `verify-signature`."""
    bundle, outside = folder / "bundle", folder / "outside"
    shutil.copytree(sound / one_of(draw, "bundle", "signed"), bundle)
    outside.write_text("mine")
    path, way = bundle / one_of(draw, *ENTRIES), one_of(draw, "pipe", "folder", "link", "bytes", "")
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if way == "pipe":
        os.mkfifo(path)
    elif way == "folder":
        path.mkdir()
        (path / "x").touch()
    elif way == "link":
        path.symlink_to(one_of(draw, "../outside", "..", path.name, "/dev/zero", "nowhere"))
    elif way == "bytes":
        path.write_bytes(one_of(draw, b"", b"x", b"half" * 2500))
    pending = bundle / ".pending"
    if one_of(draw, True, False) and not (pending.exists() or pending.is_symlink()):
        pending.mkdir()  # half a commit, with names of a stranger's choice
        (bundle / "link").symlink_to("..")
        gone = [one_of(draw, *GONE), one_of(draw, *GONE)]
        (pending / ".gone").write_text(json.dumps(one_of(draw, gone, gone, *STRANGE_VALUES)))
        target = pending / one_of(draw, "model.onnx", "engines/x", "link/outside", "manifest.json")
        target.parent.mkdir(exist_ok=True)
        target.write_text("theirs")
    read = on_bundle(sound, one_of(draw, *READING, "verify-signature", "sign"), bundle)

    def read_and_look() -> object:
        result = read()
        if outside.read_text() != "mine":
            raise AssertionError("a file outside the bundle was changed")
        return result

    return read_and_look


KINDS: dict[str, tuple[int, str, Spoil]] = {
    "checkpoint": (250, "archives, tensors, pickles that run something", checkpoint),
    "onnx": (150, "weights in other files, shapes, types, operators", onnx_file),
    "repository": (40, "the JSON beside weights", partial(document, "config preprocessor")),
    "manifest": (130, "a bundle's manifest", partial(document, "manifest")),
    "recipe": (80, "recipes", partial(document, "recipe")),
    "calibration": (50, "calibration sets", partial(document, "calibration")),
    "sidecar": (60, "engines' sidecars, most with a right digest", partial(document, "sidecar")),
    "archives": (60, "images in `.npz`", archive),
    "image": (100, "seven formats, and PostScript by their names", image),
    "folder": (50, "pipes, links, half a commit in a bundle's folder", bundle_folder),
    "signature": (30, "signatures and keys", partial(document, "signature key")),
}
"""How much of all cases each kind is, in thousandths; what is spoiled; and what spoils it."""
