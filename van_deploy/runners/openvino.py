"""OpenVINO on the CPU: reads the same ONNX files, INT8 included."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy.typing as npt

from van_deploy.environment.packages import imported_quietly
from van_deploy.errors import ConversionError, needs_extra
from van_deploy.runners.base import Outputs, Runner


class OpenVinoRunner(Runner):
    """Runs an ONNX graph on the CPU.

    OpenVINO computes in bfloat16 by default on processors that have it, whatever
    the file says. Here the arithmetic is what ``precision`` says.

    Args:
        model: an ONNX file.
        threads: threads for one inference; None lets OpenVINO choose.
        precision: ``f32`` or ``bf16``; quantised parts run as INT8 with either.
    """

    def __init__(self, model: Path, *, threads: int | None = None, precision: str = "f32") -> None:
        self.model = model
        self.settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": precision,
        }
        if threads is not None:
            self.settings["INFERENCE_NUM_THREADS"] = threads

    def _load(self, stack: ExitStack) -> None:
        """Compile the graph.

        Raises:
            MissingDependency: OpenVINO is not installed.
            ConversionError: it refuses the graph.
        """
        with needs_extra("OpenVINO", "openvino"):
            ov: Any = imported_quietly("openvino")
        try:
            compiled = ov.Core().compile_model(str(self.model), "CPU", self.settings)
        except RuntimeError as error:
            raise ConversionError(
                f"OpenVINO {ov.__version__} cannot compile the graph: {str(error).strip()[-300:]}",
                "Look at the file with `van-deploy inspect`, or use ONNX Runtime.",
            ) from error
        self._request = compiled.create_infer_request()
        stack.callback(self.__dict__.pop, "_request")

    def run_all(self, batch: npt.NDArray[Any]) -> Outputs:
        """Return every output by name, for a batch in the graph's own input type."""
        results = self._request.infer({0: batch}, share_inputs=True)
        return {
            port.get_any_name() if port.get_names() else f"output.{index}": value.copy()
            for index, (port, value) in enumerate(results.to_dict().items())
        }
