"""Bundles whose folder holds what no command of ours leaves there: pipes, links, half a commit."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

from reliability.corpus import Corpus
from reliability.mutations import STRANGE_VALUES
from reliability.readers import Reader, command

__all__ = ["folder"]

ENTRIES = (
    *("manifest.json", "manifest.json.sig", "model.onnx", "golden/0.png", "labels.txt", ".lock"),
    *(".pending", ".staging-x", "engines", "bench.json", "stranger"),
)
GONE = (
    *("model.onnx", "manifest.json", "engines", "model.onnx/x", "../outside", "/etc/passwd", ""),
    *(".", ".lock", "a" * 300, "link/outside", "\x00", "é"),
)


def folder(corpus: Corpus, rng: random.Random, place: Path) -> Reader:
    """Spoil a bundle's folder; a file outside of it must stay as it is."""
    bundle, outside = place / "bundle", place / "outside"
    shutil.copytree(rng.choice((corpus.bundle, corpus.signed)), bundle)
    outside.write_text("mine")
    for _ in range(rng.choice((1, 1, 2))):
        _replaced(rng, bundle / rng.choice(ENTRIES))
    if rng.random() < 0.4:
        _half_a_commit(rng, bundle)
    key = str(corpus.folder / "key.pem.pub")
    words = rng.choice(
        (
            *(("info",), ("inspect",), ("predict",), ("report",), ("package", "triton")),
            *(("verify-signature", "--public-key", key), ("sign", "--key", key[:-4])),
        )
    )
    place_of = 2 if words[0] == "package" else 1
    more = [str(corpus.bundle / "golden/0.png")] if words[0] == "predict" else []
    more += ["--output", str(place / "out")] if words[0] == "package" else []
    read = command(*words[:place_of], str(bundle), *words[place_of:], *more)

    def read_and_look() -> object:
        result = read()
        if outside.read_text() != "mine":
            raise AssertionError("a file outside the bundle was changed")
        return result

    return read_and_look


def _replaced(rng: random.Random, path: Path) -> None:
    """Put something else where an entry is, or where none is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    way = rng.choice(("pipe", "folder", "link", "link", "empty", "bytes", "nothing"))
    if way == "pipe":
        os.mkfifo(path)
    elif way == "folder":
        path.mkdir()
        (path / "x").write_text("x")
    elif way == "link":
        path.symlink_to(rng.choice(("../outside", "..", path.name, "/dev/zero", "nowhere")))
    elif way == "empty":
        path.touch()
    elif way == "bytes":
        path.write_bytes(rng.randbytes(rng.choice((1, 100, 10_000))))


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
        if not target.exists() and not target.parent.is_file():
            target.parent.mkdir(exist_ok=True)
            target.write_text("theirs")
