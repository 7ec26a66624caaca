"""Which release of Triton loads a model: its ONNX Runtime, TensorRT and Python, as published.

The table is ``releases.toml``, with its sources. What it does not say is *not checked*,
which is told to the user and is never a pass.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from van_deploy.documents import toml_from
from van_deploy.errors import UsageError
from van_deploy.serve.triton_model import TritonModel

MATRIX = "https://docs.nvidia.com/deeplearning/frameworks/support-matrix/"


@dataclass(frozen=True)
class Release:
    """What one of NVIDIA's images carries; "" or 0 where the table does not say.

    Attributes:
        name: such as ``25.08``.
        onnxruntime: version of ONNX Runtime, or ``none`` where there is no such backend.
        python: of the Python backend, such as ``3.12``.
        tensorrt: version of TensorRT.
        opset: the newest opset its ONNX Runtime loads.
        ir_version: the newest IR version its ONNX Runtime loads.
    """

    name: str
    onnxruntime: str = ""
    python: str = ""
    tensorrt: str = ""
    opset: int = 0
    ir_version: int = 0

    def judged(self, model: TritonModel) -> tuple[bool | None, str]:
        """Return whether it loads ``model`` (None: not checked), and why."""
        if model.backend == "python":
            return True, "the execution environment brings ONNX Runtime"
        graph = model.network.bundle.artefact(model.network.name).graph
        if model.sidecar:
            what, has, built = "TensorRT", self.tensorrt, model.sidecar.backend_version
            detail, fits = f"the plan was built by {built}", f"{built}.".startswith(f"{has}.")
        elif self.onnxruntime == "none":
            return False, f"Triton {self.name} was shipped without an ONNX Runtime backend"
        elif graph:
            what, has = "ONNX Runtime", self.onnxruntime
            detail = (
                f"it loads opset {self.opset} and IR version {self.ir_version} at most, the graph "
                f"has opset {graph.opset} and IR version {graph.ir_version}"
            )
            fits = graph.opset <= self.opset and graph.ir_version <= self.ir_version
        if not has:
            return None, f"not checked: no table here says which {what} Triton {self.name} has"
        return fits, f"Triton {self.name} has {what} {has}; {detail}"


@functools.cache
def known_releases() -> dict[str, Release]:
    """Return the releases of the table by name, newest first."""
    table = toml_from(Path(str(resources.files("van_deploy.serve") / "releases.toml")))
    found = {}
    for name, entry in table["releases"].items():
        newest = table["onnx"].get(entry["onnxruntime"].rpartition(".")[0], (0, 0))
        found[name] = Release(name, **entry, opset=newest[0], ir_version=newest[1])
    return found


def release_named(name: str) -> Release:
    """Return what is known of a release; nothing, if the table does not have it.

    Raises:
        UsageError: it is not the name of a release.
    """
    if not re.fullmatch(r"[0-9]{2}\.(0[1-9]|1[0-2])", name):
        raise UsageError(f"'{name}' is not a release of Triton.", "Write one such as 25.08.")
    return known_releases().get(name, Release(name))


def chosen_release(models: Sequence[TritonModel], asked: str = "") -> Release:
    """Return the release that was asked for, or the newest that is known to load every model.

    Raises:
        UsageError: the release cannot load a model, or none is known to.
    """
    known = list(known_releases().values())
    fitting = [release for release in known if all(release.judged(m)[0] for m in models)]
    release = release_named(asked) if asked else (fitting or known)[0]
    for model in models:
        loads, why = release.judged(model)
        if loads is False or not (loads or asked):
            raise UsageError(
                f"Triton {release.name} is not known to load '{model.name}': {why}.",
                f"Choose another --triton-release (NVIDIA lists what each has: {MATRIX}), or take "
                "--backend python, which brings its own ONNX Runtime.",
            )
    return release
