"""What is fuzzed: each kind of file, how much of the whole it is, and how it is spoiled."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from reliability.corpus import Corpus
from reliability.readers import Reader
from reliability.spoiled_documents import calibration, manifest, recipe, sidecar, small_document
from reliability.spoiled_files import archive, image, onnx_file
from reliability.spoiled_folders import folder
from reliability.spoiled_weights import checkpoint, repository

__all__ = ["KINDS", "Kind"]


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


KINDS: Mapping[str, Kind] = {
    "checkpoint": Kind(
        250,
        "bytes, tensors, headers and archives of `.pth` (both formats) and `.safetensors`; "
        "pickles that run something; read by `info`",
        checkpoint,
    ),
    "onnx": Kind(
        150,
        "bytes, weights in other files, shapes, types and operators; read by `inspect` and `build`",
        onnx_file,
    ),
    "repository": Kind(40, "the JSON beside weights, as hubs give it; read by `info`", repository),
    "manifest": Kind(
        130,
        "a bundle's manifest; read by `info`, `inspect`, `predict`, `report`, `package triton`",
        manifest,
    ),
    "recipe": Kind(80, "recipes; read as `export` and `run` read them", recipe),
    "calibration": Kind(50, "calibration sets, and the choice of images", calibration),
    "sidecar": Kind(60, "engines' sidecars, most with a right digest; read by `inspect`", sidecar),
    "archives": Kind(60, "images in `.npz`; read as `quantize` reads them", archive),
    "image": Kind(
        100,
        "PNG, JPEG, BMP, TIFF, WebP, GIF, PPM, and PostScript by their names; "
        "read as every command does",
        image,
    ),
    "folder": Kind(
        50,
        "a bundle's folder: pipes, links, folders for files, interrupted commits; read by "
        "`info`, `inspect`, `predict`, `report`, `package`, `sign`, `verify-signature`",
        folder,
    ),
    "document": Kind(
        30,
        "signatures, keys, baselines, benchmarks' and fleet files; read by `verify-signature` "
        "and as `check`, `bench` and `build` read them",
        small_document,
    ),
}
"""Every kind that is fuzzed, by name."""
