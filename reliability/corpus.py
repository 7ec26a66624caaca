"""Sound files of each kind, and an empty folder and a generator for each case."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Corpus", "digest_of", "scratch"]


class Corpus:
    """Sound files, made once in a folder from the embedded network."""

    def __init__(self, folder: Path) -> None:
        """Make them where they are not there yet."""
        self.folder = folder
        self.bundle, self.signed = folder / "bundle", folder / "signed"
        self.marker = folder / "executed"
        if not (folder / "ready").exists():
            self._make()

    def _make(self) -> None:
        import torch
        from safetensors.torch import save_file

        from van_deploy.config import BuildOptions, ModelSettings, Recipe
        from van_deploy.model.checkpoint import load_van
        from van_deploy.pipeline import export_bundle

        self.folder.mkdir(parents=True, exist_ok=True)
        recipe = Recipe(model=ModelSettings(name="van_digits"))
        loaded = load_van("van_digits")
        export_bundle(loaded, recipe, self.bundle)
        state = {name: value.clone() for name, value in loaded.model.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 3}, self.folder / "zip.pth")
        torch.save(state, self.folder / "old.pth", _use_new_zipfile_serialization=False)
        save_file(state, self.folder / "plain.safetensors")
        self._make_signed()
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

    def _make_signed(self) -> None:
        from van_deploy.signing import new_pair, private_key_from, sign_bundle

        key = self.folder / "key.pem"
        new_pair(key)
        shutil.copytree(self.bundle, self.signed)
        sign_bundle(self.signed, private_key_from(key))

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
