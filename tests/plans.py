"""Stand-ins for TensorRT plans with real sidecars: building a plan needs TensorRT and a GPU."""

from collections.abc import Callable
from typing import Any

from tests.manifest_parts import artifact_entry
from van_deploy.bundle import Bundle, Origin, edit_bundle
from van_deploy.config import BatchRange, BuildOptions
from van_deploy.engine.sidecar import SCHEMA, Sidecar, Tensor, write_sidecar
from van_deploy.files import file_sha256
from van_deploy.manifest import EngineInfo

PlanMaker = Callable[..., Bundle]


def add_plan(
    bundle: Bundle, target: str = "sm_89", profiles: str = "1:2:8", graph: str = "fp32", **more: Any
) -> Bundle:
    """Add a stand-in for a plan, ``plan-TARGET``, to a bundle.

    Args:
        bundle: the bundle.
        target: the GPU.
        profiles: batch ranges, separated by commas.
        graph: name of the artifact that the plan was built from.
        more: other fields of the sidecar; ``options`` are further build options.
    """
    ranges = tuple(BatchRange.model_validate(text) for text in profiles.split(","))
    options = BuildOptions(profiles=ranges, targets=(target,), **more.pop("options", {}))
    name, source = f"plan-{target}", bundle.artifact(graph)
    files = [f"engines/{name}.plan", f"engines/{name}.json"]
    with edit_bundle(bundle.path) as draft:
        plan = draft.file(files[0])
        plan.write_bytes(f"plan for {target}".encode())
        fields: dict[str, Any] = {
            **dict.fromkeys(("parse_seconds", "build_seconds", "peak_memory_bytes"), 0),
            "device_memory": {},
            "warnings": {},
            "schema": SCHEMA,
            "name": name,
            "onnx_file": source.file,
            "onnx_sha256": source.sha256,
            "backend": "tensorrt",
            "backend_version": "10.9.0.34",
            "cuda": 12,
            "precision": "fp32",
            "targets": (target,),
            "built_on": "a GPU",
            "parser_layers": 1,
            "fixed_addresses": True,
            "plan_sha256": file_sha256(plan),
            "plan_bytes": plan.stat().st_size,
            "options": options,
            "inputs": (Tensor(name="images", shape=(-1, 3, 64, 64), dtype="float"),),
            "outputs": (Tensor(name="logits", shape=(-1, 10), dtype="float"),),
        }
        sidecar = Sidecar(**{**fields, **more})
        write_sidecar(plan, sidecar)
        label, origin = sidecar.backend_label, Origin(name=graph, sha256=source.sha256)
        facts = EngineInfo(backend=label, targets=(target,), profiles=ranges, parser_layers=1)
        what = (name, "engine", "fp32", files[0], files)
        draft.record(artifact_entry(*what, made_from=origin, engine=facts))
    return Bundle.open(bundle.path)
