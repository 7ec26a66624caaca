"""JSON and TOML with other values, other structure or other bytes than the program writes."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from reliability.corpus import Corpus
from reliability.mutations import spoiled_bytes, spoiled_json, spoiled_json_text, spoiled_text
from reliability.readers import Reader, command

__all__ = ["calibration", "manifest", "recipe", "sidecar", "small_document"]


def manifest(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Spoil a bundle's manifest."""
    target = folder / "bundle"
    shutil.copytree(corpus.bundle, target)
    path = target / "manifest.json"
    text = path.read_text(encoding="utf-8")
    if rng.random() < 0.2:
        path.write_bytes(spoiled_bytes(rng, text.encode()))
    else:
        spoiled = spoiled_json_text(rng, json.loads(text))
        path.write_text(spoiled, encoding="utf-8", errors="surrogatepass")
    words = rng.choice((("info",), ("inspect",), ("predict",), ("report",), ("package", "triton")))
    if words == ("predict",):
        return command("predict", str(target), str(corpus.bundle / "golden/0.png"))
    more = ("--output", str(folder / "out")) if words[0] == "package" else ()
    return command(*words, str(target), *more)


def recipe(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Spoil one of the recipes."""
    from van_deploy.recipe import builtin_files, read_recipe

    source = rng.choice(sorted(builtin_files().values()))
    return _text_file(rng, folder / "mine.toml", source, read_recipe)


def calibration(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Spoil one of the calibration sets."""
    from van_deploy.calibration_set import builtin_calibration_sets, calibration_set_named
    from van_deploy.precision.job_images import choose_images

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


def sidecar(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Spoil an engine's sidecar; most of the time its digest is right."""
    from van_deploy.files import content_key

    for suffix in ("plan", "log"):
        shutil.copy(corpus.folder / f"engine.{suffix}", folder)
    text = (corpus.folder / "engine.json").read_text(encoding="utf-8")
    path = folder / "engine.json"
    if rng.random() < 0.3:
        path.write_bytes(spoiled_bytes(rng, text.encode()))
    else:
        document = spoiled_json(rng, json.loads(text))
        if isinstance(document, dict) and rng.random() < 0.8:  # an edit by one who knows how
            document["sidecar_sha256"] = content_key({**document, "sidecar_sha256": ""})
        path.write_text(json.dumps(document), encoding="utf-8", errors="surrogatepass")
    return command("inspect", str(folder / "engine.plan"))


BASELINE = {
    "schema": "van-deploy/baseline/1",
    "model": "van_digits",
    "weights_sha256": "0",
    "images_sha256": "0",
    "images": "digits",
    "figures": {"verify/fp16/sqnr_db": {"value": 60.0, "better": "higher", "slack": 1.0}},
}
BENCH = {"schema": "van-deploy/bench/1", "results": [{"name": "ort", "median_ms": 1.0}]}
FLEET = """[fleet]
bundles = ["a", "b"]
precisions = ["fp16"]
targets = ["sm_89"]

[options]
workspace = "1GiB"

[hosts.sm_89]
backend = "tensorrt-rtx"
"""


def small_document(corpus: Corpus, rng: random.Random, folder: Path) -> Reader:
    """Spoil a signature, a key, a baseline, a benchmark's report or a fleet file."""
    from van_deploy.bench.document import read_report
    from van_deploy.checks.baseline import read_baseline
    from van_deploy.engine.fleet import read_fleet

    which = rng.choice(("signature", "signature", "key", "baseline", "bench", "fleet"))
    if which in ("baseline", "bench"):
        path = folder / f"{which}.json"
        text = spoiled_json_text(rng, BASELINE if which == "baseline" else BENCH)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        read = read_baseline if which == "baseline" else read_report
        return lambda: read(path)
    if which == "fleet":
        path = folder / "fleet.toml"
        path.write_bytes(spoiled_text(rng, FLEET).encode("utf-8", "surrogatepass"))
        return lambda: read_fleet(path)
    bundle, key = folder / "bundle", folder / "key.pub"
    shutil.copytree(corpus.signed, bundle)
    shutil.copy(corpus.folder / "key.pem.pub", key)
    path = key if which == "key" else bundle / "manifest.json.sig"
    content = path.read_text(encoding="utf-8")
    if which == "key" or rng.random() < 0.3:
        path.write_bytes(spoiled_bytes(rng, content.encode()))
    else:
        text = spoiled_json_text(rng, json.loads(content))
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return command("verify-signature", str(bundle), "--public-key", str(key))
