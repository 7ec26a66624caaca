"""Packages for Triton: contents, refused input, and detection of changes.

``test_real_triton.py`` loads packages in a real Triton server.
"""

import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from google.protobuf import text_format
from PIL import Image

from tests.artifacts import Copy
from tests.conftest import Cli
from tests.each import each
from tests.json_documents import edit_json
from tests.plans import PlanMaker, add_plan
from tests.serve.conftest import Running, top5_of, write_package
from van_deploy.api import open_bundle
from van_deploy.bundle import Bundle
from van_deploy.config.sizes import SizeRange
from van_deploy.data.images import open_image
from van_deploy.errors import ConversionError, InputError, UsageError
from van_deploy.model.preprocess import pixels_from_image
from van_deploy.runners.network import Network
from van_deploy.serve import triton
from van_deploy.serve.package import check_package, render_client, write_environment

schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")

NAME = "van_digits-fp32-uint8"


def config_of(package: Path, name: str = NAME) -> Any:
    """Return ``config.pbtxt`` parsed as Triton's own message."""
    text = (package / "models" / name / "config.pbtxt").read_text()
    return text_format.Parse(text, schema.ModelConfig())


def yaml_of(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


GRAPH = """
name: "van_digits-fp32-uint8" backend: "onnxruntime" max_batch_size: 8
input { name: "pixels" data_type: TYPE_UINT8 dims: [64, 64, 3] }
output { name: "logits" data_type: TYPE_FP32 dims: 10 label_filename: "labels.txt" }
output { name: "probabilities" data_type: TYPE_FP32 dims: 10 label_filename: "labels.txt" }
output { name: "top5_classes" data_type: TYPE_INT64 dims: 5 }
output { name: "top5_probabilities" data_type: TYPE_FP32 dims: 5 }
version_policy { specific { versions: 7 } }
instance_group { count: 3 kind: KIND_CPU }
default_model_filename: "model.onnx"
dynamic_batching { preferred_batch_size: [2, 8] max_queue_delay_microseconds: 1000
  default_queue_policy { max_queue_size: 256 default_timeout_microseconds: 50000 } }
parameters { key: "intra_op_thread_count" value { string_value: "4" } }
model_warmup { name: "batch of 1" batch_size: 1 inputs { key: "pixels" value {
  data_type: TYPE_UINT8 dims: [64, 64, 3] zero_data: true } } }
model_warmup { name: "batch of 8" batch_size: 8 inputs { key: "pixels" value {
  data_type: TYPE_UINT8 dims: [64, 64, 3] zero_data: true } } }
"""
PLANS = """
backend: "tensorrt" max_batch_size: 32 default_model_filename: "model.plan"
cc_model_filenames { key: "8.6" value: "model.plan" }
cc_model_filenames { key: "12.0" value: "model-1.plan" }
instance_group { count: 1 kind: KIND_GPU profile: ["0", "1"] }
optimization { cuda { graphs: true graph_spec { batch_size: 1
  input { key: "images" value { dim: [3, 64, 64] } } } } }
"""


def test_configuration_of_a_graph(digits: Bundle, dynamic_size: Bundle, tmp_path: Path) -> None:
    options = {"instances": 3, "threads": 4, "queue_timeout_ms": 50, "model_version": 7}
    package = write_package(tmp_path, digits, "fp32-uint8", **options)
    assert config_of(package) == text_format.Parse(GRAPH, schema.ModelConfig())
    served = package / "models" / NAME / "7/model.onnx"
    assert served.read_bytes() == (digits.path / "model.uint8.onnx").read_bytes()
    on_gpu = config_of(write_package(tmp_path, digits, gpu=True, threads=4))
    assert str(on_gpu.instance_group[0]) == "count: 1\nkind: KIND_GPU\n"
    assert not on_gpu.parameters  # the runtime sets the threads
    config = config_of(write_package(tmp_path, dynamic_size))
    assert list(config.input[0].dims) == [-1, -1, 3]
    assert list(config.model_warmup[1].inputs["pixels"].dims) == [64, 96, 3]


def test_configuration_of_plans_with_static_and_dynamic_profiles(
    with_plans: PlanMaker, tmp_path: Path
) -> None:
    bundle = with_plans("sm_86", "sm_120", profiles="1:1:1,2:8:32")
    models = write_package(tmp_path, bundle, "plan-sm_86", "plan-sm_120") / "models"
    config = config_of(models.parent, "van_digits-fp32")
    for file, target in (("model.plan", "sm_86"), ("model-1.plan", "sm_120")):
        plan = models / "van_digits-fp32/1" / file
        assert plan.read_bytes() == f"plan for {target}".encode()
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 2, 32]
    for field in ["name", "input", "output", "version_policy", "dynamic_batching", "model_warmup"]:
        config.ClearField(field)
    assert config == text_format.Parse(PLANS, schema.ModelConfig())


def test_warm_up_of_a_plan_that_was_not_built_for_the_native_size(
    dynamic_size: Bundle, copy_bundle: Copy, tmp_path: Path
) -> None:
    """TensorRT refuses sizes outside the profile, and Triton then does not load the model."""
    folder = copy_bundle(dynamic_size)
    for target, sizes in (("sm_86", "64:64x96:96x128"), ("sm_89", "96:96x128:128")):
        options = {"dynamic_size": SizeRange.model_validate(sizes)}
        bundle = add_plan(Bundle.open(folder), target, options=options)
    for name, dims in (("plan-sm_86", [3, 64, 96]), ("plan-sm_89", [3, 96, 128])):
        config = config_of(write_package(tmp_path / name, bundle, name), "van_digits-fp32")
        assert [list(one.inputs["images"].dims) for one in config.model_warmup] == [dims] * 2
    with pytest.raises(UsageError, match="their sidecars differ in dynamic_size"):
        write_package(tmp_path, bundle, "plan-sm_86", "plan-sm_89")


def test_preferred_batch_sizes_come_from_the_benchmark(with_plans: PlanMaker) -> None:
    rates = {"ort-cpu/fp32": (100, 195, 200), "ort-cuda/fp32": (7, 9, 5)}
    rates |= {"tensorrt/plan-sm_89": (9, 8, 0), "openvino/fp32": (999, 0, 0)}
    rates |= {"ort-cpu/int8": (999, 0, 0)}
    rows = [
        {"contender": name, "batch": batch, "images_per_s": rate}
        for name, of_name in rates.items()
        for batch, rate in zip((2, 4, 8), of_name, strict=True)
    ]
    bundle = with_plans()
    checks = {**bundle.manifest.checks, "bench": {"rows": rows}}
    measured = Bundle(bundle.path, bundle.manifest.model_copy(update={"checks": checks}))
    assert triton.preferred_batches(Network(measured, "fp32-uint8")) == [4, 8]
    assert triton.preferred_batches(Network(measured, "fp32"), gpu=True) == [4]
    assert triton.preferred_batches(Network(measured, "plan-sm_89")) == [2]


def test_unservable_plans_are_refused(with_plans: PlanMaker, tmp_path: Path) -> None:
    def refused(message: str, bundle: Bundle, *artifacts: str, **options: Any) -> None:
        names = artifacts or ("plan-sm_89",)
        with pytest.raises((InputError, UsageError), match=re.escape(message)):
            open_bundle(bundle.path).package(tmp_path / "out", artifacts=names, **options)
        assert not (tmp_path / "out").exists()

    gaps = {"8:8:8": "takes batches of 8:8:8, and none of 1: T", "1:2:4,8:8:16": "and none of 5"}
    for profiles, message in gaps.items():
        refused(message, with_plans(profiles=profiles))
    static = with_plans()
    edit_json(static.path / "manifest.json", "batch", {"min": 4, "opt": 4, "max": 4})
    refused("'fp32' takes batches of 4:4:4, and none of 1", static, "fp32")
    edit_json(static.path / "manifest.json", "artifacts fp32 precision", "bf16")
    refused("ONNX Runtime has no BF16 convolution on CPUs", static, "fp32")
    rtx = with_plans(backend="tensorrt-rtx", backend_version="1.7.1.116")
    refused("cannot load 'plan-sm_89': it was built by tensorrt-rtx 1.7.1.116", rtx)
    refused("the TensorRT version of Triton", with_plans(backend_version="11.4.0.106"))
    sound = with_plans()
    refused("would have one model name", sound, "fp32", "plan-sm_89")
    message = "Triton 24.11 has TensorRT 10.6.0.26; the plan needs 10.9.0.34."
    refused(message, sound, triton_release="24.11")
    unlike = add_plan(sound, "sm_86", backend_version="10.6.0.26")
    both = ("plan-sm_86", "plan-sm_89")
    refused("cannot be one Triton model: their sidecars differ in backend_v", unlike, *both)
    (sound.path / "engines/plan-sm_89.json").unlink()
    refused("plan-sm_89.json' is in the manifest, but the file is missing", sound)


@each(
    ("words", "message"),
    [
        ("--backend python --gpu", "--backend python brings ONNX Runtime for CPUs"),
        (
            "--triton-release 23.04",
            f"Triton 23.04 is not known to load '{NAME}': Triton 23.04 has ONNX Runtime 1.14.1; it "
            "loads opset 18 and IR version 8 at most, the graph has opset 20 and IR version 9.",
        ),
        ("--triton-release 24.02", "Triton 24.02 was shipped without an ONNX Runtime backend"),
        ("--triton-release 25.13", "is '25.13': it should match"),
        ("", "exists and is not a package"),
    ],
)
def test_invalid_package_commands_write_nothing(
    digits: Bundle, tmp_path: Path, cli: Cli, words: str, message: str
) -> None:
    thesis = tmp_path / "out/thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    assert message in cli.fails(2, f"package triton {words}", digits.path, "-o", thesis.parent)
    assert list(tmp_path.rglob("*")) == [thesis.parent, thesis]


def test_default_release_is_the_newest_that_loads_the_models(
    digits: Bundle,
    tmp_path: Path,
    with_plans: PlanMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (compose,) = yaml_of(write_package(tmp_path, digits) / "compose.yaml")
    newest = next(iter(triton.releases()["releases"]))
    assert compose["services"]["triton"]["image"] == f"nvcr.io/nvidia/tritonserver:{newest}-py3"
    plan = with_plans(backend_version="10.6.0.26")
    (kserve,) = yaml_of(write_package(tmp_path, plan, "plan-sm_89") / "kserve.yaml")
    assert kserve["spec"]["predictor"]["model"]["runtimeVersion"] == "24.11-py3"
    (model,) = triton.triton_models(digits, ["fp32-uint8"])  # of opset 20 and IR version 9
    for newest_loaded, fits in (((20, 9), True), ((19, 9), False), ((20, 8), False)):
        monkeypatch.setitem(triton.releases()["onnx"], "1.27", newest_loaded)
        assert triton.check_release("26.07", model).outcome is fits
    write_package(tmp_path, digits, triton_release="31.07")
    unknown = triton.check_release("31.07", model)
    assert (unknown.outcome, unknown.detail[:11]) == (None, "not checked")


def test_python_backend_packages_onnx_runtime(
    digits: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConversionError, match=r"pip cannot get onnxruntime==.* for Python 3.1:"):
        write_environment(tmp_path / "e.tar.gz", "3.1")
    assert list(tmp_path.iterdir()) == []

    def write_version(archive: Path, python: str) -> None:
        archive.write_text(python)

    monkeypatch.setattr("van_deploy.serve.package.write_environment", write_version)
    # The release's own ONNX Runtime cannot load the graph.
    package = write_package(tmp_path, digits, backend="python", triton_release="23.04")
    assert (package / "models/environment-python3.8.tar.gz").read_text() == "3.8"
    config = config_of(package)
    assert (config.backend, config.default_model_filename) == ("python", "model.py")
    path = "$$TRITON_MODEL_DIRECTORY/../environment-python3.8.tar.gz"
    assert config.parameters["EXECUTION_ENV_PATH"].string_value == path
    files = (package / "models" / NAME / "1").iterdir()
    assert sorted(file.name for file in files) == ["model.onnx", "model.py"]


def test_package_command_and_detection_of_changes(
    digits: Bundle, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed() -> dict[str, str]:
        findings = check_package(package, digits).findings
        return {finding.name: finding.detail for finding in findings if not finding.outcome}

    package = tmp_path / "out"
    words = ("package triton", digits.path, "-o", package)
    cli.document(*words, "--artifact", "fp32")
    cli.passes(*words)  # replaces it
    assert [p.name for p in (package / "models").iterdir()] == [NAME]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    cli.passes(*words, "--check")
    other = cli.fails(2, *words, "--check", "--gpu", "--artifact", "fp32")
    assert "takes no option that makes one: artifacts, gpu." in " ".join(other.split())
    (package / "models/package.json").write_text("{}")
    assert failed() == {"files": "models/package.json: missing, changed or added"}
    (package / "models/package.json").unlink()
    edit_json(package / "package.json", "artifacts fp32-uint8", "0" * 64)
    assert failed() == {"artifact fp32-uint8": "rebuilt in the bundle since"}
    edit_json(package / "package.json", "batch", "1:2:64")
    assert failed()["batch sizes"] == "1:2:64; the bundle has 1:2:8"
    cli.passes(*words)
    file = f"models/{NAME}/1/model.onnx"
    for change in (lambda: (package / file).write_bytes(b"#"), (package / file).unlink):
        change()
        assert failed() == {"files": f"{file}: missing, changed or added"}
    assert "does not match the bundle: files." in cli.fails(1, *words, "--check")
    cli.passes(*words)
    added = package / "models/added"
    for is_link in (True, False):
        added.symlink_to(digits.path) if is_link else os.mkfifo(added)
        assert failed() == {"files": "models/added: missing, changed or added"}
        added.unlink()
    (tmp_path / "current").symlink_to(digits.path)
    (tmp_path / "latest").symlink_to(tmp_path / f"{digits.path.name}-triton")
    linked = open_bundle(tmp_path / "current").package()
    (linked.path / "client.py").unlink()
    open_bundle(tmp_path / "current").package(tmp_path / "latest")
    assert linked.path == (tmp_path / "latest").readlink()
    assert (linked.path / "client.py").is_file()
    monkeypatch.chdir(linked.path)
    assert "the working folder is in it" in cli.fails(2, "package triton -o .", digits.path)
    edit_json(package / "package.json", "bundle", "other")
    with pytest.raises(InputError, match="was made from 'other', not 'van_digits'"):
        check_package(package, digits)
    with pytest.raises(InputError, match=r"The package record '.*' cannot be read: No such file"):
        check_package(tmp_path / "nowhere", digits)


def test_deployment_manifests(digits: Bundle, tmp_path: Path, with_plans: PlanMaker) -> None:
    """KServe's runtime listens on 8080; all three mount the package's folder models/."""
    validate = pytest.importorskip("kubernetes_validate")
    compatible = with_plans(profiles="1:8:32", options={"version_compatible": True})
    flag, gpu = "--backend-config=tensorrt,version-compatible=true", {"nvidia.com/gpu": "1"}
    cpu = ("12", "2056Mi", {"type": "Resource", "resource": {"name": "cpu"}})
    waiting = {"metric": {"name": "nv_inference_pending_request_count"}}
    waiting["target"] = {"type": "AverageValue", "averageValue": "32"}
    for bundle, artifacts, options, (cpus, memory, metric) in (
        (digits, ("fp32-uint8", "fp32"), {"instances": 2, "threads": 3}, cpu),
        (compatible, ["plan-sm_89"], {}, ("2", "2048Mi", {"type": "Pods", "pods": waiting})),
    ):
        package = write_package(tmp_path, bundle, *artifacts, **options)
        for path in (*package.rglob("*.yaml"), *package.rglob("*.py")):
            assert not re.findall(r"\$|#if", path.read_text()), "an unfilled template field"
        (compose,), (kserve,) = (yaml_of(package / f"{n}.yaml") for n in ("compose", "kserve"))
        resources = yaml_of(package / "kubernetes.yaml")
        for resource in resources:
            validate.validate(resource, "1.30", strict=True)
        on_gpu, (deployment, service, scaler) = metric["type"] == "Pods", resources
        pod, model = deployment["spec"]["template"]["spec"], kserve["spec"]["predictor"]["model"]
        triton_server, (volume, _) = compose["services"]["triton"], pod["volumes"]
        (container,) = pod["containers"]
        for command in (container["args"], triton_server["command"], model["args"]):
            assert (flag in command) is on_gpu
            assert command is model["args"] or command[1] == "--model-repository=/models"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] == "http"
        ports = {port["name"] for port in container["ports"]}
        assert ports == {port["targetPort"] for port in service["spec"]["ports"]}
        mount = {"name": "models", "mountPath": "/models", "subPath": "models", "readOnly": True}
        assert container["volumeMounts"][0] == mount
        assert volume["persistentVolumeClaim"]["claimName"] == "van-digits-models"
        assert model["storageUri"] == "pvc://van-digits-models/models"
        served = [model[probe]["httpGet"]["port"] for probe in ("readinessProbe", "livenessProbe")]
        assert served == [model["ports"][0]["containerPort"]] * 2 == [8080] * 2
        assert triton_server["volumes"] == ["./models:/models:ro"]
        limits = {"memory": memory, **(gpu if on_gpu else {})}
        for given in (container["resources"], model["resources"]):
            assert given == {"requests": {"cpu": cpus, **limits}, "limits": limits}
        devices = triton_server["deploy"]["resources"]["reservations"].get("devices", [])
        assert [device["capabilities"] for device in devices] == [["gpu"]] * on_gpu
        (scaling,) = scaler["spec"]["metrics"]
        scaling.get("resource", {}).pop("target", None)
        assert scaling == metric


@each("artifact", ["fp32-uint8", "fp32"])
def test_client_prints_the_golden_prediction(
    digits: Bundle, tmp_path: Path, server: Running, golden_image: Path, artifact: str
) -> None:
    client = write_package(tmp_path, digits, artifact) / "client.py"
    words = [sys.executable, str(client), "--url", server.address, str(golden_image)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    expected = top5_of(digits)
    assert [row[2] for row in rows] == [str(item.index) for item in expected]
    shares = [float(row[1]) for row in rows]
    np.testing.assert_allclose(shares, [i.probability for i in expected], atol=6e-5)


@each("rounding", ["even", "floor"])
@each("mode", ["center", "squash", "border"])
@each("sizes", [(64, 64), (64, 73), ((64, 96), 100), ((64, 96), (70, 99)), (64, (70, 90))])
def test_client_preprocessing_matches_the_library(
    digits: Bundle, tmp_path: Path, mode: Any, sizes: Any, rounding: Any
) -> None:
    resized = {"image_size": sizes[0], "resize_size": sizes[1], "crop_mode": mode}
    network, file = Network(digits, "fp32-uint8"), tmp_path / "client.py"
    preprocessing = digits.manifest.preprocessing.override(**resized, mean=0.3)
    preprocessing = replace(preprocessing, crop_rounding=rounding)
    network.preprocessing = preprocessing
    file.write_text(render_client(triton.TritonModel(NAME, "onnxruntime", network)))
    pixels_from_file = runpy.run_path(str(file))["pixels_from_file"]
    rng, path = np.random.default_rng(0), tmp_path / "a.png"
    for width, height in ((50, 70), (301, 200), (64, 64), (65, 67)):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        expected = pixels_from_image(open_image(path), preprocessing)
        assert np.array_equal(pixels_from_file(path), expected)
    Image.fromarray(rng.integers(0, 65536, (8, 8), dtype=np.uint16)).save(path)
    with pytest.raises(SystemExit, match="mode I;16; convert it to 8 bits"):
        pixels_from_file(path)
