"""OpenVINO on the CPU: reads the same ONNX files, INT8 included."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from van_deploy.environment.packages import imported_quietly
from van_deploy.errors import ConversionError, MissingDependency
from van_deploy.runners.base import Images, Logits

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["OpenVinoRunner", "require_openvino"]


def require_openvino() -> Any:
    """Return the ``openvino`` module.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        return imported_quietly("openvino")
    except ImportError as error:
        raise MissingDependency(
            f"OpenVINO is not installed: {error}.",
            "Install it with `pip install 'van-deploy[openvino]'`.",
        ) from error


class OpenVinoRunner:
    """Runs an ONNX graph on the CPU.

    OpenVINO computes in bfloat16 by default on processors that have it, whatever
    the file says. Here the arithmetic is what ``precision`` says.

    Args:
        model: an ONNX file, a graph in memory, or a model OpenVINO has converted.
        threads: threads for one inference; None lets OpenVINO choose.
        precision: ``f32`` or ``bf16``; quantised parts run as INT8 with either.
        name: what reports call it.
    """

    def __init__(
        self,
        model: Path | ModelProto | Any,
        *,
        threads: int | None = None,
        precision: str = "f32",
        name: str = "openvino-cpu",
    ) -> None:
        self.model = model
        self.threads = threads
        self.precision = precision
        self.name = name
        self._request: Any = None

    def __enter__(self) -> OpenVinoRunner:
        """Compile the graph.

        Raises:
            MissingDependency: OpenVINO is not installed.
            ConversionError: it refuses the graph.
        """
        ov = require_openvino()
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": self.precision,
        }
        if self.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self.threads
        try:
            core = ov.Core()
            compiled = core.compile_model(self._read(ov, core), "CPU", settings)
        except RuntimeError as error:
            raise ConversionError(
                f"OpenVINO {ov.__version__} cannot compile the graph: {str(error).strip()[-300:]}",
                "Look at the file with `van-deploy inspect`, or use ONNX Runtime.",
            ) from error
        self._request = compiled.create_infer_request()
        return self

    def _read(self, ov: Any, core: Any) -> Any:
        """Return the model as OpenVINO's own."""
        if isinstance(self.model, ov.Model):
            return self.model
        if isinstance(self.model, Path):
            return core.read_model(str(self.model))
        return core.read_model(self.model.SerializeToString())

    def __exit__(self, *_: object) -> None:
        """Release the compiled graph."""
        self._request = None

    def run(self, images: Images) -> Logits:
        """Return the logits ``(N, K)`` of ``images (N, C, S, S)``."""
        logits: Logits = next(iter(self.run_all(images).values()))
        return logits

    def run_all(self, batch: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return every output by name, for a batch in the graph's own input type."""
        results = self._request.infer({0: batch}, share_inputs=True)
        return {
            port.get_any_name() if port.get_names() else f"output.{index}": value.copy()
            for index, (port, value) in enumerate(results.to_dict().items())
        }
