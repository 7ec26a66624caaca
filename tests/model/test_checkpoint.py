"""Loading a network from a variant, a file or a repository, with its metadata and notes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.each import each
from tests.errors import error_of
from tests.manifest_parts import network_info
from tests.model.conftest import FakeHub, has_equal_outputs, rename, save_weights, torch_bytes
from van_deploy.bundle import Bundle, edit_bundle
from van_deploy.describe import NetworkDescription, describe_model
from van_deploy.errors import BundleError, CheckpointError, DownloadError, UsageError
from van_deploy.model.checkpoint import LoadedVan, load_van
from van_deploy.model.files import LICENCE
from van_deploy.model.preprocess import OFFICIAL
from van_deploy.model.van import VAN, random_van
from van_deploy.model.variants import VARIANTS, VanConfig
from van_deploy.runners.network import original_network

# The processor that Transformers' conversion script uploaded with the official weights: ConvNeXt's.
CONVNEXT: dict[str, Any] = {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224}
CONVNEXT |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3}
IMAGENET = "mean 0.485/0.456/0.406, std 0.229/0.224/0.225"


@pytest.fixture
def checkpoint(tiny: VAN, tmp_path: Path) -> Path:
    """Return a checkpoint of the tiny network without metadata."""
    torch.save({"state_dict": tiny.state_dict()}, tmp_path / "mine.pth.tar")
    return tmp_path / "mine.pth.tar"


# --- files -----------------------------------------------------------------------------------


def test_load_from_path(checkpoint: Path, tiny: VAN, tiny_config: VanConfig) -> None:
    random_state = torch.random.get_rng_state()
    loaded = load_van(str(checkpoint))
    (checkpoint.parent / "flowers").mkdir()
    plain = checkpoint.rename(checkpoint.parent / "flowers" / "model_best.pth.tar")
    assert load_van(str(plain)).name == load_van(str(plain.parent)).name == "flowers"
    plain.write_bytes(b"")  # the network does not read its file later
    assert has_equal_outputs(loaded.model, tiny)
    assert not loaded.model.training
    parameters = {(p.device.type, p.dtype, p.requires_grad) for p in loaded.model.parameters()}
    assert parameters == {("cpu", torch.float32, False)}
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert (loaded.name, loaded.config, loaded.class_names) == ("mine", tiny_config, None)
    source = loaded.source
    assert (source.spec, source.path) == (str(checkpoint), str(checkpoint))
    assert (source.format, source.container, source.seed) == ("official", "state_dict", None)
    assert source.notes == ()
    assert loaded.preprocessing.source.startswith("assumed: the official weights'")


# --- variants --------------------------------------------------------------------------------


def test_random_weights() -> None:
    loaded = load_van("van_tiny", weights="random", seed=3, layer_norm_eps=1e-3)
    config = replace(VARIANTS["van_b0"].config, layer_norm_eps=1e-3)
    assert (loaded.name, loaded.config) == ("van_b0", config)
    assert (loaded.source.format, loaded.source.seed, loaded.source.path) == ("random", 3, "")
    assert loaded.source.notes == ("random weights: the outputs are meaningless",)
    assert len(loaded.source.sha256) == 64
    assert loaded.preprocessing.mean == OFFICIAL.mean


def test_variant_with_a_checkpoint(shared_checkpoint: Path, checkpoint: Path) -> None:
    weights = str(shared_checkpoint)
    loaded = load_van("van_b0", weights=weights)
    assert (loaded.name, loaded.config.num_classes, loaded.source.notes) == ("van_b0", 10, ())
    assert str(loaded.preprocessing) == f"64x64 bicubic, crop 1, {IMAGENET}"
    assert loaded.preprocessing.source == "the checkpoint's own training arguments"
    message = error_of(CheckpointError, load_van, "van_b1", weights=weights).message
    assert "not of van_b1 but of van_b0: " in message
    message = error_of(CheckpointError, load_van, "van_b0", weights=str(checkpoint)).message
    assert "not of van_b0 but of another architecture: " in message


@each(
    ("spec", "options", "error", "message"),
    [
        ("van_b4", {}, UsageError, "van_b4 has no public .*mmpretrain .*--weights"),
        ("van_b5", {}, UsageError, "van_b5 has no public .*ImageNet-21K.*--weights"),
        ("van_b9", {}, UsageError, "There is no VAN variant and no file called 'van_b9'"),
        ("./x.pth", {"weights": "random"}, UsageError, "cannot be combined with --weights random"),
        ("van_digits", {"weights": "random"}, UsageError, "cannot be combined with --weights rand"),
        ("van_b0", {"weights": "rnadom"}, UsageError, "is not an existing file, a repos"),
        ("van_b0", {"weights": "random", "container": "m"}, UsageError, "have no digest, contain"),
        ("van_b0", {"layer_norm_eps": 0.0}, UsageError, r"eps 0\.0 is not between 0 and 1"),
        ("van_b0", {"layer_norm_eps": 5.0}, UsageError, r"eps 5\.0 is not between 0 and 1"),
        ("van_digits", {"expect_sha256": "0" * 64}, DownloadError, "is another file: its SHA"),
        ("./absent.pth", {}, CheckpointError, r"absent\.pth cannot be read: No such file"),
        ("weights/absent.pth", {}, CheckpointError, r"weights/absent\.pth cannot be read: No"),
        ("~no-such-user/absent.pth", {}, CheckpointError, r"absent\.pth cannot be read: No such"),
        ("/dev/zero", {}, CheckpointError, "/dev/zero cannot be read: it is not a regular file"),
        (f"./{300 * 'a'}.pth", {}, CheckpointError, "cannot be read: File name too long"),
        (300 * "a", {}, UsageError, "There is no VAN variant and no file called 'aaa"),
    ],
)
def test_invalid_requests(spec: str, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        load_van(spec, **options)


# --- the hub ---------------------------------------------------------------------------------


def test_public_weights_by_name(published: bytes, tmp_path: Path, monkeypatch: Any) -> None:
    loaded = load_van("van_b0")
    assert loaded.preprocessing == OFFICIAL
    assert loaded.class_names is not None
    assert (loaded.class_names[0], len(loaded.class_names)) == ("tench, Tinca tinca", 1000)
    assert LICENCE in loaded.source.notes
    assert has_equal_outputs(load_van("van_b0", offline=True).model, loaded.model)
    message = error_of(DownloadError, load_van, "van_b0", expect_sha256="0" * 64).message
    assert "is another file: its SHA-256 is" in message
    make_bundle(loaded, tmp_path / "van_b0")
    monkeypatch.chdir(tmp_path)
    (note,) = set(load_van("van_b0").source.notes) - set(loaded.source.notes)
    assert note == "the public weights are used, not the path 'van_b0' (give './van_b0')"
    described = describe_model("van_b0")
    assert isinstance(described, NetworkDescription)
    assert (described.kind, describe_model("./van_b0").kind) == ("variant", "bundle")
    assert described.weights_note == "the path 'van_b0' is not described (give './van_b0')"


def test_official_transformers_repository(hub: FakeHub, tiny_config: VanConfig) -> None:
    state = random_van(replace(tiny_config, num_classes=1000), seed=1).state_dict()
    state = rename(state, "transformers") | {"van.layernorm.weight": torch.ones(24)}
    files = {"pytorch_model.bin": torch_bytes(state)}
    files["preprocessor_config.json"] = json.dumps(CONVNEXT).encode()
    hub.repos["Visual-Attention-Network/van-tiny"] = files
    loaded = load_van("Visual-Attention-Network/van-tiny")
    assert (loaded.name, loaded.preprocessing) == ("van-tiny", OFFICIAL)
    *_, tensors, processor = loaded.source.notes
    assert tensors.endswith("not the network's: van.layernorm.weight")
    assert f"has 224x224 bicubic, crop 0.875, {IMAGENET}; the weights were t" in processor
    assert f"with {OFFICIAL}, which is used" in processor


# --- rebuilding the network of a bundle --------------------------------------------------------


def make_bundle(loaded: LoadedVan, path: Path) -> Bundle:
    facts: dict[str, Any] = {"weights": loaded.source, "architecture": loaded.config}
    facts |= {"preprocessing": loaded.preprocessing, "class_names": loaded.class_names}
    with edit_bundle(path, name="mine") as draft:
        draft.description = network_info("mine", **facts)
    return Bundle.open(path)


def assert_rebuilt(loaded: LoadedVan, bundle: Bundle, weights: Path | None = None) -> None:
    rebuilt = original_network(bundle, weights)
    for name in ("config", "preprocessing", "class_names"):
        assert getattr(rebuilt, name) == getattr(loaded, name)
    assert has_equal_outputs(rebuilt.model, loaded.model)


def test_network_is_rebuilt_from_the_manifest(tmp_path: Path, tiny: VAN) -> None:
    body = {k: v for k, v in tiny.state_dict().items() if not k.startswith("head.")}
    head = torch.nn.Sequential(torch.nn.Linear(24, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    student = {**body, **{f"head.{k}": v for k, v in head.state_dict().items()}}
    state = {f"student.{k}": v for k, v in rename(student, "transformers").items()}
    state |= {f"teacher.{k}": v for k, v in rename(tiny.state_dict(), "transformers").items()}
    values = {"layer_norm_eps": 1e-2, "strides": [4, 2, 2, 1], "id2label": {0: "cat", 1: "dog"}}
    config = {"model_type": "van", **values}
    folder = Path(save_weights(tmp_path / "van", state, config=config, processor=CONVNEXT))
    layers = ("linear", "tanh", "linear")
    loaded = load_van(str(folder), container="state_dict.student", head=layers)
    bundle = make_bundle(loaded, tmp_path / "bundle")
    (folder / "config.json").write_text('{"model_type": "van"}')
    assert_rebuilt(loaded, bundle)
    moved = folder.rename(tmp_path / "moved")
    assert "cannot be read from" in error_of(BundleError, original_network, bundle).message
    for place in (moved, moved / "model.pth"):
        assert_rebuilt(loaded, bundle, place)


def test_rebuild_refuses_changed_weights(checkpoint: Path, tmp_path: Path, tiny: VAN) -> None:
    bundle = make_bundle(load_van(str(checkpoint)), tmp_path / "bundle")
    for key in ("model", "state_dict"):
        torch.save({key: tiny.state_dict(), "more": 1}, checkpoint)
        with pytest.raises(BundleError, match=r"does not match|cannot be read from"):
            original_network(bundle)
    random = load_van("van_b0", weights="random", seed=1)
    assert_rebuilt(random, make_bundle(random, tmp_path / "random"))
