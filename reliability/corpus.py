"""Sound files of each kind, and an empty folder for each case."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LABELS = {str(number): f"digit {number}" for number in range(10)}
FIGURE = {"value": 60.0, "better": "higher", "slack": 1.0}
DOCUMENTS: dict[str, dict[str, Any]] = {
    "config": {"model_type": "van", "hidden_act": "gelu", "num_labels": 10, "id2label": LABELS},
    "preprocessor_config": {
        "size": {"shortest_edge": 64},
        "crop_size": 64,
        "crop_pct": 0.9,
        "resample": 3,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_normalize": True,
    },
    "baseline": {
        "schema": "van-deploy/baseline/2",
        "model": "van_digits",
        "images": "digits",
        "weights_sha256": "0",
        "images_sha256": "0",
        "figures": {"verify/fp16/sqnr_db": FIGURE},
    },
    "bench": {
        "schema": "van-deploy/bench/5",
        "results": [{"name": "ort", "median_ms": 1.0}],
    },
}
FLEET = """[fleet]
bundles = ["a", "b"]
precisions = ["fp16"]
targets = ["sm_89"]

[options]
workspace = "1GiB"

[hosts.sm_89]
backend = "tensorrt-rtx"
"""


class Corpus:
    """Sound files, made once in a folder from the embedded network."""

    def __init__(self, folder: Path) -> None:
        """Make them where they are not there yet."""
        self.folder, self.marker = folder, folder / "executed"
        self.bundle, self.signed = folder / "bundle", folder / "signed"
        if not (folder / "ready").exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._make_weights()
            self._make_signed()
            self._make_engine()
            self._make_images()
            (folder / "ready").touch()

    def _make_weights(self) -> None:
        import torch
        from safetensors.torch import save_file

        import van_deploy

        van_deploy.export("van_digits", self.bundle)
        network = van_deploy.load_van("van_digits").model
        state = {name: value.clone() for name, value in network.state_dict().items()}
        torch.save({"state_dict": state, "epoch": 3}, self.folder / "zip.pth")
        torch.save(state, self.folder / "old.pth", _use_new_zipfile_serialization=False)
        save_file(state, self.folder / "model.safetensors")
        for name, document in DOCUMENTS.items():
            (self.folder / f"{name}.json").write_text(json.dumps(document))
        (self.folder / "fleet.toml").write_text(FLEET)

    def _make_signed(self) -> None:
        from cryptography.hazmat.primitives import serialization as pem
        from cryptography.hazmat.primitives.asymmetric import ed25519

        from van_deploy.signing import sign_bundle

        key, path = ed25519.Ed25519PrivateKey.generate(), self.folder / "key.pem"
        none, spki = pem.NoEncryption(), pem.PublicFormat.SubjectPublicKeyInfo
        path.write_bytes(key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, none))
        public = key.public_key().public_bytes(pem.Encoding.PEM, spki)
        path.with_name("key.pem.pub").write_bytes(public)
        shutil.copytree(self.bundle, self.signed)
        sign_bundle(self.signed, path)

    def _make_engine(self) -> None:
        from van_deploy.config import BuildOptions
        from van_deploy.engine.backend import RTX, backend_named
        from van_deploy.engine.build import engine_from_onnx
        from van_deploy.errors import MissingDependency

        with contextlib.suppress(MissingDependency):
            engine_from_onnx(
                *(self.bundle / "model.onnx", self.folder / "engine.plan"),
                backend=backend_named(RTX),
                options=BuildOptions(targets=("sm_89",)),
                precision="fp32",
            )

    def _make_images(self) -> None:
        from PIL import Image

        grey = Image.radial_gradient("L").resize((60, 40))
        image = Image.merge("RGB", (grey, grey.rotate(90), grey.rotate(180)))
        exif = Image.Exif()
        exif[0x0112] = 6  # orientation
        more: dict[str, dict[str, Any]] = {
            "jpg": {"exif": exif.tobytes()},
            "tiff": {"compression": "lzw"},
            "gif": {"save_all": True, "append_images": [image.rotate(9)]},
        }
        for suffix in ("png", "jpg", "bmp", "tiff", "webp", "gif", "ppm"):
            image.save(self.folder / f"image.{suffix}", **more.get(suffix, {}))


@contextlib.contextmanager
def scratch(corpus: Corpus) -> Iterator[Path]:
    """Give an empty folder, and remove it afterwards."""
    folder = corpus.folder / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
