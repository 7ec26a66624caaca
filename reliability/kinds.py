"""What is fuzzed: each kind of file, how much of the whole it is, and how it is spoiled."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from reliability.corpus import Corpus
from reliability.spoiled import (
    STRANGE_VALUES,
    spoiled_bytes,
    spoiled_json,
    spoiled_json_text,
    spoiled_text,
)
from reliability.weights import spoiled_weights

Reader = Callable[[], object]
"""Reads a spoiled file; returns or raises what the program would."""

Spoil = Callable[[Corpus, random.Random, Path], Reader]
"""Writes a spoiled file into a folder and returns its reader."""

PLACES = ("../../etc/passwd", "/etc/passwd", "there", "", "link", "link/x", "a\\b", "..")
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
ENTRIES = (
    *("manifest.json", "manifest.json.sig", "model.onnx", "golden/0.png", "labels.txt", ".lock"),
    *(".pending", ".staging-x", "engines", "bench.json", "stranger"),
)
GONE = (
    *("model.onnx", "manifest.json", "engines", "model.onnx/x", "../outside", "/etc/passwd", ""),
    *(".", ".lock", "a" * 300, "link/outside", "\x00", "é"),
)
READING = ("info", "inspect", "predict", "report", "package")


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


def on_bundle(corpus: Corpus, name: str, bundle: Path, key: Path | None = None) -> Reader:
    """Return the reader of a bundle that a command is."""
    private = corpus.folder / "key.pem"
    more: dict[str, tuple[object, ...]] = {
        "predict": (corpus.bundle / "golden/0.png",),
        "package": ("--output", bundle.with_name("out")),
        "verify-signature": ("--public-key", key or f"{private}.pub"),
        "sign": ("--key", private),
    }
    first = ("package", "triton") if name == "package" else (name,)
    return command(*first, bundle, *more.get(name, ()))


def checkpoint(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Bytes, tensors, headers, archives of weights, pickles that run something; by `info`."""
    return command("info", spoiled_weights(corpus, rng, folder))


def document(names: str, corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Spoil one of some documents: its bytes, or what it says."""
    from van_deploy.files import content_key

    name = rng.choice(names.split())
    path, read = _placed(name, corpus, rng, folder)
    sound = path.read_bytes()
    if name == "key" or rng.random() < 0.25:
        data = spoiled_bytes(rng, sound)
    elif path.suffix == ".toml":
        data = spoiled_text(rng, sound.decode())
    elif name == "sidecar" and rng.random() < 0.8:  # by one who knows of its digest
        edited = spoiled_json(rng, json.loads(sound))
        if isinstance(edited, dict):
            edited["sidecar_sha256"] = content_key({**edited, "sidecar_sha256": ""})
        data = json.dumps(edited).encode("utf-8", "surrogatepass")
    else:
        data = spoiled_json_text(rng, json.loads(sound))
    path.write_bytes(data)
    return read


def _placed(
    name: str, corpus: Corpus, rng: random.Random, folder: Path
) -> tuple[Path, Callable[[], object]]:
    """Put a sound document into a folder; return it, and what reads it."""
    from van_deploy.bench.document import read_report
    from van_deploy.calibration_set import builtin_calibration_sets, calibration_set_named
    from van_deploy.checks.baseline import read_baseline
    from van_deploy.engine.bundled import read_fleet
    from van_deploy.precision.images import choose_images
    from van_deploy.recipe import builtin_files, read_recipe

    if name in {"manifest", "signature", "key"}:
        bundle = Path(shutil.copytree(corpus.signed, folder / "bundle"))
        key = Path(shutil.copy(corpus.folder / "key.pem.pub", folder))
        file = {"manifest": "manifest.json", "signature": "manifest.json.sig"}.get(name)
        verb = rng.choice(READING) if name == "manifest" else "verify-signature"
        return bundle / file if file else key, on_bundle(corpus, verb, bundle, key)
    beside = {
        "sidecar": ("engine.json", "engine.plan", "engine.log"),
        "config": ("config.json", "preprocessor_config.json", "model.safetensors"),
        "preprocessor": ("preprocessor_config.json", "config.json", "model.safetensors"),
    }
    if name in beside:
        path, plan, _ = (Path(shutil.copy(corpus.folder / n, folder)) for n in beside[name])
        return path, command("inspect", plan) if name == "sidecar" else command("info", folder)
    sets = builtin_calibration_sets()
    sources = {
        "recipe": lambda: rng.choice(sorted(builtin_files().values())),
        "calibration": lambda: sets[rng.choice(("digits", "folder", "cifar10"))],
    }
    source = sources[name]() if name in sources else next(corpus.folder.glob(f"{name}.*"))
    path = Path(shutil.copy(source, folder))
    readers: dict[str, Callable[[Path], object]] = {
        "recipe": read_recipe,
        "calibration": lambda file: choose_images(calibration_set_named(str(file)).images),
        "baseline": read_baseline,
        "bench": read_report,
        "fleet": read_fleet,
    }
    return path, lambda: readers[name](path)


def onnx_file(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Bytes, weights in other files, shapes, types and operators; by `inspect` and `build`."""
    import onnx

    from van_deploy.config import BuildOptions
    from van_deploy.engine.build import has_weights_beside

    path, source = folder / "model.onnx", corpus.bundle / "model.onnx"

    def strange() -> bytes:
        model, way = onnx.load(source), rng.randrange(5)
        tensor = rng.choice(model.graph.initializer)
        if way == 0:
            _elsewhere(model, tensor, rng, folder)
        elif way == 1:
            tensor.ClearField("dims")
            tensor.dims.extend([rng.choice((-1, 0, 2**31, 2**62)) for _ in range(3)])
        elif way == 2:
            tensor.data_type = rng.randrange(40)
        elif way == 3:
            node = rng.choice(model.graph.node)
            node.op_type = rng.choice(("Loop", "If", "", "é", "Conv", "PyFunc"))
        else:
            model.opset_import[0].version = rng.choice((0, 1, 99, 2**40))
        return bytes(model.SerializeToString())

    sound = rng.random() < 0.6
    path.write_bytes(spoiled_bytes(rng, source.read_bytes()) if sound else strange())
    asked = BuildOptions()
    return rng.choice((command("inspect", path), lambda: has_weights_beside(path, asked)))


def _elsewhere(model: Any, tensor: Any, rng: random.Random, folder: Path) -> None:
    """Let a tensor, or a constant made of it, say that its values lie in another file."""
    import onnx

    if rng.random() < 0.3:
        node = onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        model.graph.initializer.remove(tensor)
        model.graph.node.insert(0, node)
        tensor = model.graph.node[0].attribute[0].t
    (folder / "link").symlink_to(rng.choice(("/etc/passwd", "../there", "link")))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (
        ("location", rng.choice(PLACES)),
        ("offset", rng.choice(("0", "-1", "x", str(2**62)))),
        ("length", rng.choice(("4", "-4", str(2**62)))),
    ):
        tensor.external_data.add(key=key, value=value)


def archive(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Images in `.npz`: other arrays, spoiled bytes and entries; read as `quantize` reads them."""
    import numpy as np

    from van_deploy.calibration_set import ImageSelection
    from van_deploy.precision.images import choose_images

    shapes = ((4, 8, 8), (4, 8, 8, 3), (0, 8, 8), (), (2**14, 2**14))
    images = [np.zeros(shape, np.uint8) for shape in shapes]
    images += [np.zeros((2, 3, 8, 8), np.float32), np.array([None, {}], object)]
    arrays: dict[str, Any] = {"images": rng.choice(images)}
    if rng.random() < 0.4:
        arrays["labels"] = np.zeros(rng.choice(((4,), (), (4, 2), (9,))))
    path, made = folder / "images.npz", io.BytesIO()
    np.savez_compressed(made, **arrays)
    data, way = made.getvalue(), rng.randrange(3)
    if way == 2:  # one entry spoiled, its checksum right
        bad_file, chosen = io.BytesIO(), rng.choice([f"{name}.npy" for name in arrays])
        with zipfile.ZipFile(made) as sound, zipfile.ZipFile(bad_file, "w", 8) as bad:
            for name in sound.namelist():
                content = sound.read(name)
                if name == chosen:
                    content = spoiled_bytes(rng, content) if rng.random() < 0.95 else bytes(2**29)
                bad.writestr(name, content)
        data = bad_file.getvalue()
    path.write_bytes(spoiled_bytes(rng, data) if way == 1 else data)
    return lambda: choose_images(ImageSelection(count=2), path)


def image(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """PNG, JPEG, BMP, TIFF, WebP, GIF, PPM, and PostScript by their names; as every command."""
    from van_deploy.data import open_image

    source, draw = rng.choice(sorted(corpus.folder.glob("image.*"))), rng.random()
    data = spoiled_bytes(rng, source.read_bytes())
    if draw < 0.1:  # a header that promises an image as large as a house
        data = b"P6 %d %d 255\n" % (rng.choice((2**16, 2**31)), rng.choice((2**16, 2**31)))
    elif draw < 0.15:  # what Pillow gives to Ghostscript, under another name
        data = POSTSCRIPT
    path = folder / source.name
    path.write_bytes(data)
    return lambda: open_image(path)


def bundle_folder(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """A bundle's folder: pipes, links, half a commit; also by `sign` and `verify-signature`."""
    bundle, outside = folder / "bundle", folder / "outside"
    shutil.copytree(rng.choice((corpus.bundle, corpus.signed)), bundle)
    outside.write_text("mine")
    for _ in range(rng.choice((1, 1, 2))):
        path, way = bundle / rng.choice(ENTRIES), rng.randrange(7)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if way == 0:
            os.mkfifo(path)
        elif way == 1:
            path.mkdir()
            (path / "x").touch()
        elif way in {2, 3}:
            path.symlink_to(rng.choice(("../outside", "..", path.name, "/dev/zero", "nowhere")))
        elif way in {4, 5}:
            path.write_bytes(rng.randbytes(rng.choice((0, 1, 10_000))))
    if rng.random() < 0.4:
        _half_a_commit(rng, bundle)
    read = on_bundle(corpus, rng.choice((*READING, "verify-signature", "sign")), bundle)

    def read_and_look() -> object:
        result = read()
        if outside.read_text() != "mine":
            raise AssertionError("a file outside the bundle was changed")
        return result

    return read_and_look


def _half_a_commit(rng: random.Random, bundle: Path) -> None:
    """Leave what an interrupted command would, with names of a stranger's choice."""
    pending = bundle / ".pending"
    if pending.exists() or pending.is_symlink():
        return
    pending.mkdir()
    if rng.random() < 0.2:
        (bundle / "link").symlink_to("..")
    names = [rng.choice(GONE) for _ in range(rng.randint(0, 3))]
    gone = rng.choice((names, names, names, rng.choice(STRANGE_VALUES)))
    (pending / ".gone").write_text(json.dumps(gone))
    for _ in range(rng.randint(0, 2)):
        target = pending / rng.choice(("model.onnx", "engines/x", "link/outside", "manifest.json"))
        target.parent.mkdir(exist_ok=True)
        target.write_text("theirs")


KINDS: Mapping[str, tuple[int, str, Spoil]] = {
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
    "document": (
        30,
        "signatures, keys, baselines, reports of `bench`, fleets",
        partial(document, "signature key baseline bench fleet"),
    ),
}
"""How much of all cases each kind is, in thousandths; what is spoiled; and what spoils it."""
