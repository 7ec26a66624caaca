"""Graphs, archives and pictures that are damaged or lie."""

from __future__ import annotations

import io
import random
import zipfile
from pathlib import Path

from reliability.corpus import Corpus
from reliability.mutations import spoiled_bytes
from reliability.readers import Reader, command

__all__ = ["archive", "image", "onnx_file"]

PLACES = ("../../etc/passwd", "/etc/passwd", "there", "", "link", "link/x", "a\\b", "..")
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def onnx_file(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Spoil a graph's bytes, or say something strange in it."""
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
            if rng.random() < 0.3:  # as a constant's value
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
    return command("inspect", str(path))


def archive(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Write an archive of images, with other arrays than there should be or spoiled bytes."""
    import numpy as np

    from van_deploy.calibration_set import ImageSelection
    from van_deploy.precision.job_images import choose_images

    arrays = {
        "images": rng.choice(
            (
                *(np.zeros((4, 8, 8), np.uint8), np.zeros((4, 8, 8, 3), np.uint8)),
                *(np.zeros((0, 8, 8), np.uint8), np.array(3), np.zeros((2, 3, 8, 8), np.float32)),
                *(np.array([None, {}], object), np.zeros((2**14, 2**14), np.uint8)),
            )
        )
    }
    if rng.random() < 0.4:
        arrays["labels"] = rng.choice((np.zeros(4), np.array(1), np.zeros((4, 2)), np.zeros(9)))
    path, made = folder / "pictures.npz", io.BytesIO()
    np.savez_compressed(made, **arrays)  # type: ignore[arg-type]
    spoiled = rng.choice(
        (bytes, lambda data: spoiled_bytes(rng, data), lambda data: _spoiled_archive(rng, data))
    )
    path.write_bytes(spoiled(made.getvalue()))
    return lambda: choose_images(ImageSelection(count=2), path)


def _spoiled_archive(rng: random.Random, data: bytes) -> bytes:
    """Return an archive with one entry spoiled, its checksum right."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as sound, zipfile.ZipFile(made, "w") as bad:
        names = sound.namelist()
        chosen = rng.choice(names)
        for name in names:
            content = sound.read(name)
            if name == chosen and rng.random() < 0.05:
                bad.writestr(name, bytes(2**29), zipfile.ZIP_DEFLATED)
                continue
            bad.writestr(name, spoiled_bytes(rng, content) if name == chosen else content)
    return made.getvalue()


def image(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Spoil a picture, or write what only looks like one."""
    from van_deploy.data import open_image

    source = rng.choice(sorted(corpus.folder.glob("picture.*")))
    data = spoiled_bytes(rng, source.read_bytes())
    if rng.random() < 0.1:  # a header that promises a picture as large as a house
        data = b"P6 " + b"%d %d 255\n" % (rng.choice((2**16, 2**31)), rng.choice((2**16, 2**31)))
    elif rng.random() < 0.05:  # what Pillow gives to Ghostscript, under another name
        data = POSTSCRIPT
    path = folder / source.name
    path.write_bytes(data)
    return lambda: open_image(path)
