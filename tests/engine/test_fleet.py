"""Bundles x precisions x targets: failures do not stop it, and it resumes; here and on Ray."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli
from tests.each import each
from tests.engine.conftest import BundleMaker
from van_deploy.bundle import Bundle
from van_deploy.config import BatchRange, BuildOptions, Profiling
from van_deploy.engine.backend import Backend
from van_deploy.engine.fleet import FleetHost, build_here, read_fleet
from van_deploy.engine.host import Host
from van_deploy.engine.on_ray import build_on_ray, task_resources
from van_deploy.errors import RecipeError

FLEET = """
[fleet]
bundles = ["dist/van_digits", "dist/van_none"]
precisions = ["fp32"]
targets = ["sm_86", "sm_80+sm_89"]
"""


@pytest.fixture
def fleet_file(tmp_path: Path, new_bundle: BundleMaker) -> Path:
    new_bundle("van_digits")
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET)
    return path


def test_a_file_becomes_cells(fleet_file: Path) -> None:
    fleet_file.write_text(
        FLEET + '[options]\nbatch = ["1:1:1", "2:8:16"]\nworkspace = "1GiB"\ntf32 = false\n'
        'profiling = "detailed"\noptimization_level = 2\n'
        '[hosts.sm_86]\nbackend = "tensorrt"\naccelerator_type = "A10G"\n'
    )
    cells = read_fleet(fleet_file)
    assert [(c.bundle.name, c.target) for c in cells] == [
        ("van_digits", "sm_86"),
        ("van_digits", "sm_80+sm_89"),
        ("van_none", "sm_86"),
        ("van_none", "sm_80+sm_89"),
    ]
    assert cells[0].host == FleetHost(backend="tensorrt", accelerator_type="A10G")
    assert cells[1].host == FleetHost()
    assert cells[0].bundle == fleet_file.parent / "dist" / "van_digits"
    assert cells[1].options == BuildOptions(
        profiles=(BatchRange(1, 1, 1), BatchRange(2, 8, 16)),
        targets=("sm_80", "sm_89"),
        workspace_bytes=1 << 30,
        optimization_level=2,
        tf32=False,
        profiling=Profiling.DETAILED,
    )
    assert task_resources(cells[0])["accelerator_type"] == "A10G"
    assert task_resources(cells[0])["num_gpus"] == 1
    assert "num_gpus" not in task_resources(cells[1])


@each(
    ("text", "words"),
    [
        ("[fleet", "is not TOML"),
        ("", "'fleet' is missing"),
        (FLEET + "[flete]\n", "the key 'flete' is unknown"),
        (FLEET.replace('["fp32"]', '"fp32"'), "'fleet.precisions' is 'fp32': it should be a list"),
        (FLEET.replace("sm_86", "ada"), "'fleet.targets.0' is 'ada': it should be compute"),
        (FLEET + "[options]\nworkspce = 1\n", "the key 'options.workspce' is unknown"),
        (FLEET + "[options]\nworkspace = true\n", "'options.workspace' is True: it should be"),
        (FLEET + "[options]\noptimization_level = true\n", "is True: it should be a whole number"),
        (FLEET + '[options]\nprofiling = "loud"\n', "'options.profiling' is 'loud': it should be"),
        (FLEET + '[options]\nbatch = ["8:4:1"]\n', "range 8:4:1 is not min <= opt <= max"),
        (FLEET + '[hosts.sm_75]\nbackend = "auto"\n', "hosts.sm_75 is for no target"),
        (FLEET + '[hosts.sm_86]\ngpu = "L4"\n', "the key 'hosts.sm_86.gpu' is unknown"),
    ],
)
def test_a_file_that_is_wrong(fleet_file: Path, text: str, words: str) -> None:
    fleet_file.write_text(text)
    with pytest.raises(RecipeError, match=words) as caught:
        read_fleet(fleet_file)
    assert str(fleet_file) in caught.value.message


@pytest.mark.slow
def test_it_goes_on_after_a_failure_and_resumes(rtx: Backend, fleet_file: Path) -> None:
    cells = read_fleet(fleet_file)
    first = list(build_here(cells, host=Host()))
    assert [outcome.outcome for outcome in first] == ["built", "built", "failed", "failed"]
    assert str(first[2].error).startswith("There is no bundle at")
    assert first[0].sidecar is not None
    assert first[0].sidecar.profiles == (BatchRange(1, 2, 4),), "the bundle's own batch range"
    second = list(build_here(cells, host=Host()))
    assert [outcome.outcome for outcome in second] == ["reused", "reused", "failed", "failed"]
    assert second[1].engine == f"van_digits-fp32-sm80+sm89-rtx{rtx.release}"


@pytest.mark.slow
def test_the_command_prints_a_table_and_fails(rtx: Backend, fleet_file: Path, cli: Cli) -> None:
    result = cli("build", "--matrix", fleet_file)
    assert result.exit_code == 4
    assert f"van_digits-fp32-sm86-rtx{rtx.release}" in result.stdout
    assert "1:2:4" in result.stdout
    assert "FAIL  van_none fp32 sm_86: There is no bundle at" in result.stdout
    assert "[1/4] van_digits fp32 sm_86: built" in result.stderr
    assert "error: 2 of 4 engines failed." in result.stderr
    assert "Run the same command again to resume." in result.stderr


class TestOnRay:
    """The same, as tasks of a Ray cluster of this machine alone."""

    @pytest.fixture(scope="class")
    def ray(self) -> Iterator[Any]:
        if importlib.util.find_spec("ray") is None:
            pytest.skip("ray is not installed (pip install 'van-deploy[ray]')")
        import warnings

        import ray

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Ray's own start
            ray.init(
                num_cpus=1,
                include_dashboard=False,
                log_to_driver=False,
                object_store_memory=100 << 20,
                configure_logging=False,
            )
        yield ray
        ray.shutdown()

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    def test_a_fleet(self, ray: Any, rtx: Backend, fleet_file: Path) -> None:
        cells = read_fleet(fleet_file)
        outcomes = {(o.cell.bundle.name, o.cell.target): o for o in build_on_ray(cells)}
        assert len(outcomes) == 4
        made = outcomes["van_digits", "sm_86"]
        assert made.outcome == "built", made.error
        assert made.where
        assert outcomes["van_none", "sm_86"].outcome == "failed"
        bundle = Bundle.open(fleet_file.parent / "dist" / "van_digits")
        assert bundle.problems() == []
        assert made.engine in bundle.artefacts
        again = list(build_on_ray(cells))
        assert sorted(o.outcome for o in again) == ["failed", "failed", "reused", "reused"]
        here = list(build_here(cells[:2], host=Host()))
        assert [o.outcome for o in here] == ["reused", "reused"]
