"""Tensor names of three formats, the architecture of a state dict, and strict loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.each import each
from tests.model.conftest import rename
from van_deploy.errors import CheckpointError, UsageError, VanDeployError
from van_deploy.model.checkpoint import (
    config_from_state,
    load_van,
    network_from_state,
    read_weights,
)
from van_deploy.model.keys import FORMATS
from van_deploy.model.van import VAN, random_van
from van_deploy.model.variants import VARIANTS, VanConfig

State = dict[str, Tensor]
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
PREFIXES = ("", "module.", "_orig_mod.", "net.", "backbone.", "_forward_module.", "a.b.c.")
LKA = "block1.0.attn.spatial_gating_unit"


@pytest.fixture
def state(tiny: VAN) -> State:
    return {name: tensor.clone() for name, tensor in tiny.state_dict().items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "w.pth"


def load(path: Path, content: object, head: list[str] | None = None) -> VAN:
    torch.save(content, path)
    return load_van(str(path), head=head, layer_norm_eps=1e-6).model


def body(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


def with_prefix(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


# --- names -----------------------------------------------------------------------------------


@each("target", FORMATS, fresh="state")
@each("prefix", PREFIXES, fresh="state")
def test_name_formats(path: Path, state: State, tiny: VAN, prefix: str, target: str) -> None:
    wrapped = with_prefix(prefix, rename(state, target))
    wrapped |= {"n_averaged": torch.tensor(9), "criterion.weight": torch.ones(5)}
    wrapped |= {f"{prefix}total_ops": torch.zeros(1), "val_accuracy.tp": torch.zeros(5)}
    torch.save(wrapped, path)
    checkpoint = read_weights(path)
    assert checkpoint.format == target
    assert all(torch.equal(tensor, state[name]) for name, tensor in checkpoint.tensors.items())
    (note,) = checkpoint.notes
    assert note.endswith(f"n_averaged, criterion.weight, {prefix}total_ops, val_accuracy.tp")
    assert torch.equal(load(path, wrapped)(IMAGES), tiny(IMAGES))


@each(
    ("target", "prefix", "other", "note"),
    [
        ("official", "", "", "a backbone (official names), without a classification head"),
        ("mmpretrain", "", "", "a backbone (mmpretrain names), without"),
        (
            "transformers",
            "",
            "layernorm.weight",
            "in the file that are not the network's: layernorm.w",
        ),
        (
            "official",
            "backbone.",
            "decode_head.conv_seg.weight",
            "not the network's: decode_head.conv_seg",
        ),
        (
            "official",
            "backbone.",
            "rpn_head.rpn_conv.weight",
            "the network's: rpn_head.rpn_conv.weight",
        ),
    ],
    fresh="state",
)
def test_backbones_ignore_other_modules(
    path: Path, state: State, target: str, prefix: str, other: str, note: str
) -> None:
    names = {n.removeprefix("van."): t for n, t in rename(body(state), target).items()}
    torch.save(with_prefix(prefix, names) | ({other: torch.ones(2)} if other else {}), path)
    checkpoint = read_weights(path)
    assert note in checkpoint.notes[-1]
    assert checkpoint.tensors.keys() == {n for n in body(state) if "num_batches" not in n}
    assert all(torch.equal(tensor, state[name]) for name, tensor in checkpoint.tensors.items())


# --- errors ----------------------------------------------------------------------------------


def mixed(state: State, other: str) -> State:
    first = {n: t for n, t in state.items() if n.startswith("block1")}
    return {n: t for n, t in state.items() if n not in first} | rename(first, other)


@each(
    ("wrap", "message"),
    [
        (
            lambda s: with_prefix("model.", s) | {"normalize.mean": torch.ones(3)},
            "not the VAN's: normalize.mean. Save the state dict of one complete VAN, or select it "
            "with --container state_dict.model.",
        ),
        (lambda s: s | {"van.layernorm.weight": torch.ones(24)}, "not the VAN's: van.layernorm"),
        (
            lambda s: with_prefix("backbone.", body(s)) | {"stem2.weight": torch.ones(2)},
            "not the VAN's: stem2.weight.",
        ),
        (
            lambda s: with_prefix("a.", s) | with_prefix("b.", rename(s, "transformers")),
            "official names under 'state_dict.a', transformers names under 'state_dict.b'. "
            "Select one: --container state_dict.a or --container state_dict.b;",
        ),
        (lambda s: mixed(s, "transformers"), "several networks, or one in mixed formats: "),
        (lambda s: mixed(s, "mmpretrain"), "several networks, or one in mixed formats: "),
        (
            lambda _: {"layer1.0.conv1.weight": torch.ones(1), "fc.weight": torch.ones(1)},
            "is not a VAN (2 tensors: layer1.0.conv1.weight, fc.weight).",
        ),
    ],
    fresh="state",
)
def test_unknown_or_ambiguous_names(path: Path, state: State, wrap: Any, message: str) -> None:
    with pytest.raises(VanDeployError) as error:
        load(path, {"state_dict": wrap(state)})
    assert message in " ".join(str(error.value).split())


@each(
    ("changes", "message"),
    [
        ({"block2.0.": None}, "block2.0.mlp.fc1.weight"),
        ({"block4.": None}, "tensors that are not the VAN's: patch_embed4."),
        ({"block1.999999.norm1.weight": torch.ones(8)}, "not the VAN's: block1.999999.norm1"),
        ({"extra.weight": torch.ones(1)}, "not the VAN's: extra.weight."),
        ({"patch_embed1.proj.weight": torch.ones(8, 3, 7)}, "patch_embed1.proj.weight"),
        ({f"{LKA}.conv_spatial.weight": torch.ones(8, 1, 4, 4)}, "are (5, 4); LKA's are odd"),
        ({f"{LKA}.conv0.weight": torch.ones(8, 1, 3, 5)}, f"mismatch for {LKA}.conv0.weight"),
        ({"norm3.bias": None}, 'Missing key(s) in state_dict: "norm3.bias".'),
        ({"block2.1.norm2.running_var": None}, 'Missing key(s) in state_dict: "block2.1.norm2.ru'),
        ({"block2.0.mlp.fc2.weight": torch.ones(12, 47, 1, 1)}, "block2.0.mlp.fc2.weight: copying"),
        ({"head.weight": torch.ones(5)}, "head.weight"),
        ({"head.bias": torch.tensor([0, float("nan"), 0, 0, 0])}, "head.bias contains NaN or i"),
        ({"norm1.bias": torch.full((8,), float("-inf"))}, "norm1.bias contains NaN or inf"),
        ({"head.bias": torch.full((5,), 1e300, dtype=torch.float64)}, "head.bias contains NaN o"),
        (
            {"patch_embed2.norm.running_var": torch.linspace(-1, 1, 12)},
            "norm.running_var is negative",
        ),
        ({"head.weight": torch.ones(5, 24, dtype=torch.int8)}, "head.weight is not floating point"),
    ],
    fresh="state",
)
def test_missing_or_invalid_tensors(path: Path, state: State, changes: Any, message: str) -> None:
    for name, tensor in changes.items():
        state = {n: t for n, t in state.items() if tensor is not None or not n.startswith(name)}
        state |= {} if tensor is None else {name: tensor}
    with pytest.raises(CheckpointError) as error:
        load(path, state)
    assert message in error.value.message
    assert error.value.remedy


def test_expanded_tensors_are_refused(path: Path, state: State) -> None:
    with pytest.raises(CheckpointError, match="claims more elements than the file contains"):
        load(path, state | {"head.weight": torch.ones(1).expand(10**9, 24)})


# --- the architecture ------------------------------------------------------------------------


@each("name", VARIANTS)
def test_config_of_every_variant(name: str) -> None:
    config = VARIANTS[name].config
    with torch.device("meta"):
        model = VAN(config)
    assert config_from_state(model.state_dict()) == (config, ())
    assert config.variant == name
    assert config.parameter_count() == sum(p.numel() for p in model.parameters())
    head = config.embed_dims[-1] * config.num_classes
    assert config.mac_count((64, 128)) - head == 2 * (config.mac_count(64) - head)


@each(
    "config",
    [
        VanConfig((8, 8, 16, 16), (1, 1, 1, 1), (4, 3, 2, 1), num_classes=2, in_chans=1),
        VanConfig((8, 8, 8, 8), (1, 2, 11, 1), (1.5, 2.25, 2, 2), lka_kernels=(7, 9)),
        VanConfig((10, 6, 7, 3), (2, 1, 1, 1), (1.3, 2, 2, 2), in_chans=7, lka_kernels=(3, 5)),
        VanConfig((8, 8, 8, 8), (1, 1, 1, 1), (1, 1, 1, 1), patch_sizes=(4, 2, 5, 3)),
    ],
)
def test_config_of_unusual_architectures(path: Path, config: VanConfig) -> None:
    model = random_van(config, seed=3)
    torch.save(model.state_dict(), path)
    loaded = load_van(str(path))
    assert len(loaded.source.notes) == (config.lka_kernels != (5, 7))
    assert (loaded.config.trunk, loaded.config.patch_sizes) == (config.trunk, config.patch_sizes)
    images = torch.randn(1, config.in_chans, 64, 64)
    assert torch.equal(loaded.model(images), model(images))
    assert loaded.preprocessing.channels == config.in_chans


# --- sequential heads ------------------------------------------------------------------------

LONG = (nn.Flatten(), nn.Linear(24, 9), nn.BatchNorm1d(9), nn.GELU(), nn.Linear(9, 7), nn.SiLU())


@each(
    ("layers", "head", "expected"),
    [
        ((nn.Dropout(0.2), nn.Linear(24, 7)), None, ("dropout", 7)),
        ((nn.BatchNorm1d(24), nn.Linear(24, 7)), None, ("batchnorm", 7)),
        ((nn.Linear(24, 9), nn.Tanh(), nn.Linear(9, 7)), "linear,tanh,linear", (9, "tanh", 7)),
        (
            *(LONG, "flatten,linear,batchnorm,gelu,linear,silu"),
            ("flatten", 9, "batchnorm", "gelu", 7, "silu"),
        ),
    ],
)
def test_sequential_head(path: Path, tiny: VAN, layers: Any, head: Any, expected: Any) -> None:
    module = nn.Sequential(*layers).eval()
    for layer in module:
        if isinstance(layer, nn.BatchNorm1d):
            nn.init.uniform_(layer.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.normal_(layer.running_mean)  # type: ignore[arg-type]
    state = {**body(tiny.state_dict()), **with_prefix("head.", module.state_dict())}
    model = load(path, state, head.split(",") if head else None)
    assert (model.config.head, model.config.num_classes) == (expected, 7)
    features = tiny.forward_head(tiny.forward_features(IMAGES), pre_logits=True)
    assert torch.equal(model(IMAGES), module(features))
    assert model.config.parameter_count() == sum(p.numel() for p in model.parameters())


def test_unknown_head_layers_must_be_given(path: Path, state: State) -> None:
    module = nn.Sequential(nn.Linear(24, 9), nn.Tanh(), nn.Linear(9, 7))
    sequential = {**body(state), **with_prefix("head.", module.state_dict())}
    with pytest.raises(CheckpointError, match=r"^Unknown head: its layers are linear, \?, lin"):
        load(path, sequential)
    for head in ("linear,linear", "linear,relu", "linear,relu,linear,linear", "relu,linear,linear"):
        with pytest.raises(UsageError, match=f"^--head {head} does not match: its layers are lin"):
            load(path, sequential, head.split(","))
    with pytest.raises(UsageError, match="The head is not a sequence of layers"):
        load(path, state, ["linear"])


# --- strict loading --------------------------------------------------------------------------


def test_loaded_network_state(path: Path, state: State, tiny: VAN) -> None:
    random_state = torch.random.get_rng_state()
    counted = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    model = load(path, counted)
    path.write_bytes(b"")
    assert torch.equal(model(IMAGES), tiny(IMAGES))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {(t.device.type, t.dtype) for t in model.parameters()} == {("cpu", torch.float32)}
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert network_from_state(dict(model.state_dict()), model.config)


@each("dtype", [torch.float16, torch.bfloat16, torch.float64], fresh="state")
def test_conversion_to_float32(path: Path, state: State, dtype: torch.dtype) -> None:
    other = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    torch.save(other, path)
    loaded = read_weights(path)
    assert {t.dtype for t in loaded.tensors.values()} == {torch.float32}
    assert loaded.notes == (f"weights converted to float32 from {str(dtype)[6:]}",)
