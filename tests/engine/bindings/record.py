"""Writes down which names TensorRT's Python bindings have, without TensorRT.

The bindings are a small wheel of their own; the libraries they call are not needed
to look at them, only to be there when they are loaded. So each library is stood in
for by an empty one that exports the nine functions the bindings ask for, and
nothing is called. Needs a C compiler.

    pip download --no-deps tensorrt-cu13-bindings==11.4.0.106
    python tests/engine/bindings/record.py tensorrt_cu13_bindings-11.4.0.106-*.whl
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FUNCTIONS = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL"),
    *("createInferRuntime_INTERNAL", "createNvOnnxParserRefitter_INTERNAL"),
    *("createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry", "getNvOnnxParserVersion"),
    *("getPluginRegistry", "initLibNvInferPlugins"),
)


def main() -> None:
    """Write ``VERSION.json`` beside this file for the wheel given: class, then its members."""
    parser = argparse.ArgumentParser(description="Record the names of TensorRT's bindings.")
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        _stand_in(Path(folder))
        sys.path.insert(0, folder)
        names = names_of(importlib.import_module("tensorrt_bindings"))
    version = wheel.name.split("-")[1]
    target = Path(__file__).with_name(f"{version}.json")
    target.write_text(json.dumps(names, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def names_of(module: object) -> dict[str, list[str]]:
    """Return the module's public names under "", and every class's public members under its."""
    found = {"": [name for name in dir(module) if not name.startswith("_")]}
    for name in found[""]:
        value = getattr(module, name)
        if isinstance(value, type):
            found[name] = [member for member in dir(value) if not member.startswith("_")]
    return found


def _stand_in(folder: Path) -> None:
    """Load empty libraries under the names that the bindings want."""
    bindings = (folder / "tensorrt_bindings" / "tensorrt.so").read_bytes()
    source = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS)
    for library in sorted(set(re.findall(rb"libnv[a-z_]+\.so\.\d+", bindings))):
        path = folder / library.decode()
        compiler = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-x", "c", "-"]
        subprocess.run([*compiler, "-o", str(path)], input=source.encode(), check=True)
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


if __name__ == "__main__":
    main()
