"""What is fuzzed: a sound file of each kind, how it is spoiled, and what reads it.

A reader is a command of the program, run in this process, or the function that
every command reads such a file through.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reliability.mutations import spoiled_bytes, spoiled_json, spoiled_text

__all__ = ["KINDS", "Corpus", "Kind", "Reader"]

Reader = Callable[[], object]
"""Reads a spoiled file; returns or raises what the program would."""


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        share: of all mutations, in thousandths.
        about: what is spoiled and who reads it.
        spoil: writes the spoiled file into a folder and returns its reader.
    """

    share: int
    about: str
    spoil: Callable[[Corpus, random.Random, Path], Reader]


class Corpus:
    """Sound files, made once in a folder from the embedded network."""

    def __init__(self, folder: Path) -> None:
        """Make them where they are not there yet."""
        self.folder = folder
        self.bundle = folder / "bundle"
        self.marker = folder / "executed"
        if not (folder / "ready").exists():
            self._make()

    def _make(self) -> None:
        import torch
        from safetensors.torch import save_file

        from van_deploy.engine.options import BuildOptions
        from van_deploy.model.checkpoint import load_van
        from van_deploy.pipeline import export_bundle
        from van_deploy.precision.ranges import record_ranges
        from van_deploy.precision.ranges_file import write_ranges
        from van_deploy.recipe import ModelSettings, Recipe

        self.folder.mkdir(parents=True, exist_ok=True)
        recipe = Recipe(model=ModelSettings(name="van_digits"))
        loaded = load_van("van_digits")
        export_bundle(loaded, recipe, self.bundle)
        state = {name: value.clone() for name, value in loaded.model.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 3}, self.folder / "zip.pth")
        torch.save(state, self.folder / "old.pth", _use_new_zipfile_serialization=False)
        save_file(state, self.folder / "plain.safetensors")
        import numpy as np
        import onnx

        model = onnx.load(self.bundle / "model.onnx")
        images = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)
        write_ranges(self.folder / "ranges.npz", record_ranges(model, [images], threads=1))
        self._make_engine(BuildOptions(targets=("sm_89",)))
        self._make_images()
        (self.folder / "ready").touch()

    def _make_engine(self, options: Any) -> None:
        """Build an engine, or write the sidecar of one that was not built."""
        from van_deploy.engine.backend import RTX, backend_named
        from van_deploy.engine.build import engine_from_onnx
        from van_deploy.errors import MissingDependency

        plan = self.folder / "engine.plan"
        try:
            backend = backend_named(RTX)
        except MissingDependency:
            return
        source = self.bundle / "model.onnx"
        engine_from_onnx(source, plan, backend=backend, options=options, precision="fp32")

    def _make_images(self) -> None:
        from PIL import Image

        picture = Image.radial_gradient("L").resize((60, 40))
        colours = Image.merge("RGB", (picture, picture.rotate(90), picture.rotate(180)))
        frames = {"save_all": True, "append_images": [colours.rotate(9)]}
        for suffix, more in (
            *(
                ("png", {}),
                ("jpg", {"exif": _exif()}),
                ("bmp", {}),
                ("tiff", {"compression": "lzw"}),
            ),
            *(("webp", {}), ("gif", frames), ("ppm", {})),
        ):
            colours.save(self.folder / f"picture.{suffix}", **more)


def _exif() -> bytes:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    return exif.tobytes()


# --- checkpoints -----------------------------------------------------------------------------


def _checkpoint(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    way = rng.choice((_bytes, _bytes, _bytes, _tensors, _tensors, _payload, _header, _bomb))
    path = way(corpus, rng, folder)
    return _command("info", str(path))


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


# --- graphs, manifests, recipes and the rest ---------------------------------------------------


def _onnx(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    import onnx

    from van_deploy.engine.source import read_source

    path = folder / "model.onnx"
    source = corpus.bundle / "model.onnx"
    if rng.random() < 0.6:
        path.write_bytes(spoiled_bytes(rng, source.read_bytes()))
    else:
        model = onnx.load(source)
        tensor = rng.choice(model.graph.initializer)
        way = rng.randrange(5)
        if way == 0:  # weights in a file elsewhere
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (
                ("location", rng.choice(("../../etc/passwd", "/etc/passwd", "there", ""))),
                ("offset", rng.choice(("0", "-1", "x", str(2**62)))),
                ("length", rng.choice(("4", "-4", str(2**62)))),
            ):
                tensor.external_data.add(key=key, value=value)
        elif way == 1:
            del tensor.dims[:]
            tensor.dims.extend([rng.choice((-1, 0, 2**31, 2**62)) for _ in range(3)])
        elif way == 2:
            tensor.data_type = rng.randrange(40)
        elif way == 3:
            node = rng.choice(model.graph.node)
            node.op_type = rng.choice(("Loop", "If", "", "é", "Conv", "PyFunc"))
        else:
            model.opset_import[0].version = rng.choice((0, 1, 99, 2**40))
        path.write_bytes(model.SerializeToString())
    if rng.random() < 0.5:
        return lambda: read_source(path)
    return _command("inspect", str(path))


def _manifest(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    target = folder / "bundle"
    shutil.copytree(corpus.bundle, target)
    path = target / "manifest.json"
    text = path.read_text(encoding="utf-8")
    if rng.random() < 0.2:
        path.write_bytes(spoiled_bytes(rng, text.encode()))
    else:
        document = spoiled_json(rng, json.loads(text))
        path.write_text(json.dumps(document), encoding="utf-8", errors="surrogatepass")
    words = rng.choice((("info",), ("inspect",), ("predict",), ("report",), ("package", "triton")))
    if words == ("predict",):
        return _command("predict", str(target), str(corpus.bundle / "canary.png"))
    more = ("--output", str(folder / "out")) if words[0] == "package" else ()
    return _command(*words, str(target), *more)


def _recipe(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    from van_deploy.recipe import builtin_recipes, read_recipe

    source = rng.choice(sorted(builtin_recipes().values()))
    return _text_file(rng, folder / "mine.toml", source, read_recipe)


def _calibration(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    from van_deploy.precision.calibration import choose_images
    from van_deploy.precision.manifests import builtin_calibration_sets, calibration_set_named

    def read(path: Path) -> object:
        found = calibration_set_named(str(path))
        return choose_images(found.images)

    source = builtin_calibration_sets()[rng.choice(("digits", "folder", "cifar10"))]
    return _text_file(rng, folder / "mine.toml", source, read)


def _text_file(
    rng: random.Random, path: Path, source: Path, read: Callable[[Path], object]
) -> Reader:
    text = source.read_text(encoding="utf-8")
    if rng.random() < 0.3:
        path.write_bytes(spoiled_bytes(rng, text.encode()))
    else:
        path.write_bytes(spoiled_text(rng, text).encode("utf-8", "surrogatepass"))
    return lambda: read(path)


def _sidecar(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    from van_deploy.engine.sidecar import _digest

    for suffix in ("plan", "log"):
        shutil.copy(corpus.folder / f"engine.{suffix}", folder)
    text = (corpus.folder / "engine.json").read_text(encoding="utf-8")
    path = folder / "engine.json"
    if rng.random() < 0.3:
        path.write_bytes(spoiled_bytes(rng, text.encode()))
    else:
        document = spoiled_json(rng, json.loads(text))
        if isinstance(document, dict) and rng.random() < 0.8:  # an edit by one who knows how
            body = {k: v for k, v in document.items() if k not in ("schema", "sidecar_sha256")}
            document["sidecar_sha256"] = _digest(body)
        path.write_text(json.dumps(document), encoding="utf-8", errors="surrogatepass")
    return _command("inspect", str(folder / "engine.plan"))


def _ranges(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    from van_deploy.precision.ranges_file import ranges_from_file

    data = (corpus.folder / "ranges.npz").read_bytes()
    path = folder / "ranges.npz"
    if rng.random() < 0.5:
        path.write_bytes(spoiled_bytes(rng, data))
    else:
        path.write_bytes(_spoiled_archive(rng, data))
    return lambda: ranges_from_file(path)


def _spoiled_archive(rng: random.Random, data: bytes) -> bytes:
    """Return an archive with one entry spoiled, its checksum right."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as sound, zipfile.ZipFile(made, "w") as bad:
        names = sound.namelist()
        chosen = rng.choice(names)
        for name in names:
            content = sound.read(name)
            bad.writestr(name, spoiled_bytes(rng, content) if name == chosen else content)
    return made.getvalue()


def _image(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    from van_deploy.images import open_image

    source = rng.choice(sorted(corpus.folder.glob("picture.*")))
    data = spoiled_bytes(rng, source.read_bytes())
    if rng.random() < 0.1:  # a header that promises a picture as large as a house
        data = b"P6 " + b"%d %d 255\n" % (rng.choice((2**16, 2**31)), rng.choice((2**16, 2**31)))
    path = folder / source.name
    path.write_bytes(data)
    return lambda: open_image(path)


def _command(*words: str) -> Reader:
    """Return a reader that runs ``van-deploy`` with these words, in this process."""

    def run() -> object:
        from typer.testing import CliRunner

        from van_deploy.cli.app import app

        result = CliRunner().invoke(app, [*words, "--json"])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code

    return run


KINDS: Mapping[str, Kind] = {
    "checkpoint": Kind(
        300,
        "bytes, tensors, headers and archives of `.pth` (both formats) and `.safetensors`; "
        "pickles that run something; read by `info`",
        _checkpoint,
    ),
    "onnx": Kind(
        150,
        "bytes, weights in other files, shapes, types and operators; read by `inspect` and `build`",
        _onnx,
    ),
    "manifest": Kind(
        150,
        "a bundle's manifest; read by `info`, `inspect`, `predict`, `report`, `package triton`",
        _manifest,
    ),
    "recipe": Kind(100, "recipes; read as `export` and `run` read them", _recipe),
    "calibration": Kind(50, "calibration sets, and the choice of images", _calibration),
    "sidecar": Kind(70, "engines' sidecars, most with a right digest; read by `inspect`", _sidecar),
    "ranges": Kind(50, "recorded ranges; read as `quantize` reads them", _ranges),
    "image": Kind(130, "PNG, JPEG, BMP, TIFF, WebP, GIF, PPM; read as every command does", _image),
}
"""Every kind that is fuzzed, by name."""


@contextmanager
def scratch(corpus: Corpus) -> Iterator[Path]:
    """Give an empty folder, and remove it afterwards."""
    folder = corpus.folder / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def digest_of(name: str, index: int) -> random.Random:
    """Return the generator of one case: the same on every machine."""
    seed = hashlib.sha256(f"{name}/{index}".encode()).digest()
    return random.Random(seed)
