"""What is fuzzed: each kind of file, how much of the whole it is, and how it is spoiled."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reliability.corpus import BASELINE, BENCH, CONFIG, FLEET, PROCESSOR, Corpus
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
"""Writes a spoiled file into a folder and returns its reader; its first line says what."""

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


def on_bundle(corpus: Corpus, name: str, bundle: Path) -> Reader:
    """Return the reader of a bundle that a command is."""
    key = corpus.folder / "key.pem"
    more: dict[str, tuple[object, ...]] = {
        "predict": (corpus.bundle / "golden/0.png",),
        "package": ("--output", bundle.with_name("out")),
        "verify-signature": ("--public-key", f"{key}.pub"),
        "sign": ("--key", key),
    }
    first = ("package", "triton") if name == "package" else (name,)
    return command(*first, bundle, *more.get(name, ()))


def either(rng: random.Random, share: float, sound: bytes, other: Callable[[], bytes]) -> bytes:
    """Return spoiled bytes of a document now and then, or else what spoils its content."""
    return spoiled_bytes(rng, sound) if rng.random() < share else other()


def checkpoint(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Bytes, tensors, headers, archives of weights, pickles that run something; by `info`."""
    return command("info", spoiled_weights(corpus, rng, folder))


def repository(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """The JSON beside weights, as hubs give it; read by `info`."""
    (folder / "model.safetensors").symlink_to(corpus.folder / "plain.safetensors")
    for name, sound in (("config.json", CONFIG), ("preprocessor_config.json", PROCESSOR)):
        data = spoiled_json_text(rng, sound)
        (folder / name).write_bytes(spoiled_bytes(rng, data) if rng.random() < 0.1 else data)
    return command("info", folder)


def manifest(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """A bundle's manifest; by `info`, `inspect`, `predict`, `report` and `package triton`."""
    path = Path(shutil.copytree(corpus.bundle, folder / "bundle")) / "manifest.json"
    sound = path.read_bytes()
    path.write_bytes(either(rng, 0.2, sound, lambda: spoiled_json_text(rng, json.loads(sound))))
    return on_bundle(corpus, rng.choice(READING), path.parent)


def recipe(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Recipes; read as `export` and `run` read them."""
    from van_deploy.recipe import builtin_recipes, read_recipe

    source = rng.choice(sorted(builtin_recipes().values()))
    return _toml(rng, folder / "mine.toml", source.read_text("utf-8"), read_recipe)


def calibration(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Calibration sets, and the choice of images."""
    from van_deploy.calibration_set import builtin_calibration_sets, calibration_set_named
    from van_deploy.precision.job_images import choose_images

    def read(path: Path) -> object:
        return choose_images(calibration_set_named(str(path)).images)

    source = builtin_calibration_sets()[rng.choice(("digits", "folder", "cifar10"))]
    return _toml(rng, folder / "mine.toml", source.read_text("utf-8"), read)


def _toml(rng: random.Random, path: Path, text: str, read: Callable[[Path], object]) -> Reader:
    path.write_bytes(either(rng, 0.3, text.encode(), lambda: spoiled_text(rng, text)))
    return lambda: read(path)


def sidecar(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Engines' sidecars, most with a right digest; read by `inspect`."""
    from van_deploy.files import content_key

    for suffix in ("plan", "log"):
        shutil.copy(corpus.folder / f"engine.{suffix}", folder)
    sound = (corpus.folder / "engine.json").read_bytes()

    def edited() -> bytes:
        document = spoiled_json(rng, json.loads(sound))
        if isinstance(document, dict) and rng.random() < 0.8:  # by one who knows how
            document["sidecar_sha256"] = content_key({**document, "sidecar_sha256": ""})
        return json.dumps(document).encode("utf-8", "surrogatepass")

    (folder / "engine.json").write_bytes(either(rng, 0.3, sound, edited))
    return command("inspect", folder / "engine.plan")


def document(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Signatures, keys, baselines, benchmarks' reports and fleet files; as commands read them."""
    from van_deploy.bench.document import read_report
    from van_deploy.checks.baseline import read_baseline
    from van_deploy.engine.fleet import read_fleet

    which = rng.choice(("signature", "signature", "key", "baseline", "bench", "fleet"))
    path = folder / which
    if which == "fleet":
        return _toml(rng, path.with_suffix(".toml"), FLEET, read_fleet)
    if which in ("baseline", "bench"):
        path.write_bytes(spoiled_json_text(rng, BASELINE if which == "baseline" else BENCH))
        read = read_baseline if which == "baseline" else read_report
        return lambda: read(path)
    bundle, key = Path(shutil.copytree(corpus.signed, folder / "bundle")), folder / "key.pub"
    shutil.copy(corpus.folder / "key.pem.pub", key)
    path = key if which == "key" else bundle / "manifest.json.sig"
    sound, share = path.read_bytes(), 1.0 if which == "key" else 0.3
    path.write_bytes(either(rng, share, sound, lambda: spoiled_json_text(rng, json.loads(sound))))
    return command("verify-signature", bundle, "--public-key", key)


def onnx_file(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Bytes, weights in other files, shapes, types and operators; by `inspect` and `build`."""
    import onnx

    from van_deploy.engine.source import read_source

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

    path.write_bytes(either(rng, 0.6, source.read_bytes(), strange))
    return rng.choice((command("inspect", path), lambda: read_source(path)))


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
    from van_deploy.precision.job_images import choose_images

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


KINDS: Mapping[str, tuple[int, Spoil]] = {
    "checkpoint": (250, checkpoint),
    "onnx": (150, onnx_file),
    "repository": (40, repository),
    "manifest": (130, manifest),
    "recipe": (80, recipe),
    "calibration": (50, calibration),
    "sidecar": (60, sidecar),
    "archives": (60, archive),
    "image": (100, image),
    "folder": (50, bundle_folder),
    "document": (30, document),
}
"""How much of all cases each kind of file is, in thousandths, and what spoils it."""
