"""Names of three formats, the architecture read back, and the strict load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from tests.each import each
from van_deploy.errors import CheckpointError, UsageError, VanDeployError
from van_deploy.model.files import read_weights
from van_deploy.model.keys import FORMATS
from van_deploy.model.random_weights import random_van
from van_deploy.model.state import config_from_state_dict, network_from_state, official_state
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANTS, VanConfig, variant_of

if TYPE_CHECKING:
    from tests.model.conftest import Rename

State = dict[str, Tensor]
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
PREFIXES = ("", "module.", "_orig_mod.", "net.", "backbone.", "_forward_module.", "a.b.c.")
GATE = "block1.0.attn.spatial_gating_unit"


@pytest.fixture
def state(tiny: VAN) -> State:
    return {name: tensor.clone() for name, tensor in tiny.state_dict().items()}


def load(state: State, head: list[str] | None = None) -> VAN:
    tensors = official_state(state).tensors
    return network_from_state(tensors, config_from_state_dict(tensors, head)[0])


def body(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


# --- names -----------------------------------------------------------------------------------


@each("target", FORMATS, fresh="state")
@each("prefix", PREFIXES, fresh="state")
def test_a_network_is_found_in_every_format_behind_any_prefix(
    state: State, tiny: VAN, renamed: Rename, prefix: str, target: str
) -> None:
    wrapped = under(prefix, renamed(state, target))
    wrapped |= {"n_averaged": torch.tensor(9), "criterion.weight": torch.ones(5)}
    wrapped |= {f"{prefix}total_ops": torch.zeros(1), "val_accuracy.tp": torch.zeros(5)}
    found = official_state(wrapped)
    assert (found.format, list(found.tensors)) == (target, list(tiny.state_dict()))
    assert found.notes == (
        "left by training, no part of the network: n_averaged, criterion.weight, "
        f"{prefix}total_ops, val_accuracy.tp",
    )
    assert torch.equal(load(wrapped)(IMAGES), tiny(IMAGES))


def test_real_weights_in_three_formats(shared_checkpoint: Path, renamed: Rename) -> None:
    tensors = read_weights(shared_checkpoint).tensors
    logits = [load(renamed(tensors, target))(IMAGES) for target in FORMATS]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@each(
    ("target", "prefix", "beside", "notes"),
    [
        ("official", "", "", ("a backbone (official names), without",)),
        ("mmpretrain", "", "", ("a backbone (mmpretrain names), without",)),
        (
            *("transformers", "", "layernorm.weight"),
            ("a backbone (transformers names), without", "layernorm.weight: in the file, but"),
        ),
        (
            *("official", "backbone.", "decode_head.conv_seg.weight"),
            ("a backbone of a segmenter (official", "not the backbone's, left out: 1 tensors of d"),
        ),
        (
            *("official", "backbone.", "rpn_head.rpn_conv.weight"),
            ("a backbone of a detector (official", "not the backbone's, left out: 1 tensors of r"),
        ),
    ],
    fresh="state",
)
def test_backbones_are_read_without_what_surrounds_them(
    state: State, renamed: Rename, target: str, prefix: str, beside: str, notes: tuple[str, ...]
) -> None:
    names = {n.removeprefix("van."): t for n, t in renamed(body(state), target).items()}
    found = official_state(under(prefix, names) | ({beside: torch.ones(2)} if beside else {}))
    assert len(found.notes) == len(notes)
    assert all(told.startswith(note) for told, note in zip(found.notes, notes, strict=True))
    assert found.tensors.keys() == body(state).keys()


# --- what is refused -------------------------------------------------------------------------


@each(
    ("wrap", "told"),
    [
        (
            lambda s: under("model.", s) | {"normalize.mean": torch.ones(3)},
            "tensors beside the VAN's: normalize.mean. Nothing is dropped unasked: save the state "
            "dict of one whole VAN, or name the network's own alone: --container state_dict.model.",
        ),
        (
            lambda s: s | {"van.layernorm.weight": torch.ones(24)},
            "tensors beside the VAN's: van.layernorm.weight. Nothing is dropped unasked: save the "
            "state dict of one whole VAN.",
        ),
        (
            lambda s: under("backbone.", body(s)) | {"stem2.weight": torch.ones(2)},
            "beside the VAN's: stem2.weight.",
        ),
        (
            lambda s: under("student.", s) | under("teacher.", s),
            "holds 2 networks: official names under 'student.', official names under 'teacher.'. "
            "Say which: --container state_dict.student or --container state_dict.teacher.",
        ),
        (
            lambda s: {"layer1.0.conv1.weight": torch.ones(1), "fc.weight": torch.ones(1)},
            "The checkpoint is not a VAN: no tensor is called as its Large Kernel Attention is. "
            "Its 2 tensors begin with layer1.0.conv1.weight, fc.weight.",
        ),
    ],
    fresh="state",
)
def test_names_that_are_not_one_network(
    state: State, wrap: Callable[[State], State], told: str
) -> None:
    with pytest.raises(VanDeployError) as error:
        official_state(wrap(state), "state_dict")
    assert told in " ".join(str(error.value).split())


@each("other", ["transformers", "mmpretrain"], fresh="state")
def test_mixed_formats_are_refused(state: State, renamed: Rename, other: str) -> None:
    mixed = {n: t for n, t in state.items() if not n.startswith("block1")}
    mixed |= renamed({n: t for n, t in state.items() if n.startswith("block1")}, other)
    with pytest.raises(CheckpointError, match=f"mixes formats, and is whole in none: .*{other}"):
        official_state(mixed)


@each(
    ("changes", "told"),
    [
        ({"block2.0.": None}, "lacks block2.0.mlp.fc1.weight, which tells the architecture"),
        ({"block4.": None}, "tensors beside the VAN's: patch_embed4."),
        ({"block1.999999.norm1.weight": torch.ones(8)}, "beside the VAN's: block1.999999.norm1"),
        ({"extra.weight": torch.ones(1)}, "beside the VAN's: extra.weight."),
        ({"patch_embed1.proj.weight": torch.ones(8, 3, 7)}, "of the shape (8, 3, 7), which tells"),
        ({f"{GATE}.conv_spatial.weight": torch.ones(8, 1, 4, 4)}, "are 5 and 4; LKA's are odd"),
        (
            {f"{GATE}.conv0.weight": torch.ones(8, 1, 3, 5)},
            f"size mismatch for {GATE}.conv0.weight",
        ),
        ({"norm3.bias": None}, 'Missing key(s) in state_dict: "norm3.bias".'),
        ({"block2.1.norm2.running_var": None}, 'Missing key(s) in state_dict: "block2.1.norm2.ru'),
        ({"block2.0.mlp.fc2.weight": torch.ones(12, 47, 1, 1)}, "block2.0.mlp.fc2.weight: copying"),
        ({"head.weight": torch.ones(5)}, "has head.weight of the shape (5,)"),
        (
            {"head.bias": torch.tensor([0, float("nan"), 0, 0, 0])},
            "head.bias holds NaN or infinite",
        ),
        ({"norm1.bias": torch.full((8,), float("-inf"))}, "norm1.bias holds NaN or infinite"),
        (
            {"head.bias": torch.full((5,), 1e300, dtype=torch.float64)},
            "head.bias holds NaN or infinite",
        ),
        ({"patch_embed2.norm.running_var": -torch.ones(12)}, "norm.running_var is negative"),
        ({"head.weight": torch.ones(5, 24, dtype=torch.int8)}, "head.weight is not floating point"),
        ({"head.weight": torch.ones(1).expand(10**9, 24)}, "head.weight claims more elements than"),
    ],
    fresh="state",
)
def test_tensors_that_are_no_whole_van(state: State, changes: dict[str, Any], told: str) -> None:
    for name, tensor in changes.items():
        state = {n: t for n, t in state.items() if tensor is not None or not n.startswith(name)}
        state |= {} if tensor is None else {name: tensor}
    with pytest.raises(CheckpointError) as error:
        load(state)
    assert told in error.value.message
    assert error.value.remedy


# --- the architecture ------------------------------------------------------------------------


@each("name", VARIANTS)
def test_every_variant_is_read_back(name: str) -> None:
    config = VARIANTS[name].config
    with torch.device("meta"):
        state = VAN(config).state_dict()
    assert config_from_state_dict(state) == (config, ())
    assert variant_of(config) == name


@each(
    "config",
    [
        VanConfig((8, 8, 16, 16), (1, 1, 1, 1), (4, 3, 2, 1), num_classes=2, in_chans=1),
        VanConfig((8, 8, 8, 8), (1, 2, 11, 1), (1.5, 2.25, 2, 2), lka_kernels=(7, 9)),
        VanConfig((10, 6, 7, 3), (2, 1, 1, 1), (1.3, 2, 2, 2), in_chans=7, lka_kernels=(3, 5)),
        VanConfig((8, 8, 8, 8), (1, 1, 1, 1), (1, 1, 1, 1), patch_sizes=(4, 2, 5, 3)),
    ],
)
def test_unusual_architectures_are_read_back(config: VanConfig) -> None:
    model = random_van(config, seed=3)
    tensors = official_state(model.state_dict()).tensors
    read, notes = config_from_state_dict(tensors)
    assert [note.partition(":")[0] for note in notes] == (
        [] if config.lka_kernels == (5, 7) else ["kernels {} and {}".format(*config.lka_kernels)]
    )
    assert (read.body, read.patch_sizes) == (config.body, config.patch_sizes)
    assert (read.num_classes, read.in_chans) == (config.num_classes, config.in_chans)
    images = torch.randn(1, config.in_chans, 64, 64)
    assert torch.equal(network_from_state(tensors, read)(images), model(images))


# --- sequential heads ------------------------------------------------------------------------


def with_head(tiny: VAN, *layers: nn.Module) -> tuple[State, nn.Module]:
    """Return the tiny network's state dict with another head, and that head fitted to data."""
    torch.manual_seed(3)
    head = nn.Sequential(*layers)
    for layer in head:
        if isinstance(layer, nn.BatchNorm1d):
            nn.init.uniform_(layer.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.normal_(layer.running_mean)  # type: ignore[arg-type]
    return {**body(tiny.state_dict()), **under("head.", head.state_dict())}, head.eval()


@each(
    ("layers", "said", "read"),
    [
        ((nn.Dropout(0.2), nn.Linear(24, 7)), None, ("dropout", 7)),
        ((nn.BatchNorm1d(24), nn.Linear(24, 7)), None, ("batchnorm", 7)),
        ((nn.Linear(24, 9), nn.Tanh(), nn.Linear(9, 7)), "linear,tanh,linear", (9, "tanh", 7)),
        (
            (
                nn.Flatten(),
                nn.Linear(24, 9),
                nn.BatchNorm1d(9),
                nn.GELU(),
                nn.Linear(9, 7),
                nn.SiLU(),
            ),
            "flatten,linear,batchnorm,gelu,linear,silu",
            ("flatten", 9, "batchnorm", "gelu", 7, "silu"),
        ),
    ],
)
def test_a_sequential_head_is_part_of_the_network(
    tiny: VAN, layers: tuple[nn.Module, ...], said: str | None, read: tuple[int | str, ...]
) -> None:
    state, own = with_head(tiny, *layers)
    tensors = official_state(state).tensors
    config, notes = config_from_state_dict(tensors, said.split(",") if said else None)
    assert (config.head, config.num_classes) == (read, 7)
    assert len(notes) == (read[0] == "dropout")
    model = network_from_state(tensors, config)
    features = tiny.forward_head(tiny.forward_features(IMAGES), pre_logits=True)
    assert torch.equal(model(IMAGES), own(features))
    assert config.parameter_count() == sum(p.numel() for p in model.parameters())


def test_what_a_head_does_not_tell_is_asked(tiny: VAN, state: State) -> None:
    wide, _ = with_head(tiny, nn.Linear(24, 9), nn.Tanh(), nn.Linear(9, 7))
    with pytest.raises(CheckpointError, match=r"^The head is not told: it is linear, \?, linear, "):
        load(wide)
    for said in ("linear,linear", "linear,relu", "linear,relu,linear,linear", "relu,linear,linear"):
        with pytest.raises(
            UsageError, match=f"^--head {said} is not the checkpoint's: it is linea"
        ):
            load(wide, said.split(","))
    with pytest.raises(UsageError, match="The head is no sequence of layers"):
        load(state, ["linear"])


# --- the strict load -------------------------------------------------------------------------


def test_the_network_is_ready_and_its_own(state: State, tiny: VAN) -> None:
    random_state = torch.random.get_rng_state()
    counted = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    model = load(counted)
    state["head.bias"].add_(1)
    assert torch.equal(model(IMAGES), tiny(IMAGES))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {(t.device.type, t.dtype) for t in model.parameters()} == {("cpu", torch.float32)}
    assert torch.equal(torch.random.get_rng_state(), random_state)


@each("dtype", [torch.float16, torch.bfloat16, torch.float64], fresh="state")
def test_other_precisions_are_converted_and_noted(state: State, dtype: torch.dtype) -> None:
    other = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    loaded = official_state(other)
    assert {t.dtype for t in loaded.tensors.values()} == {torch.float32, torch.int64}
    assert loaded.notes == (f"weights converted to float32 from {str(dtype)[6:]}",)
