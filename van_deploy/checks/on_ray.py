"""An evaluation spread over a Ray cluster, batch by batch, with the figures of one machine.

Every actor opens the bundle and the weights by their paths, so the machines
need a common file system. The batches are those of one machine, and their
answers are entered by the machine that started it all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from van_deploy.bundle import Bundle
from van_deploy.data import ImageSet
from van_deploy.engine.on_ray import require_ray
from van_deploy.errors import ConversionError, MissingDependency

if TYPE_CHECKING:
    from van_deploy.checks.evaluate import Settings

__all__ = ["entries_on_ray"]

CORES_AN_ACTOR = 1
BATCHES_A_TASK = 4  # so that decoding runs ahead of the network inside a task


class _Worker:
    """Lives on a machine of the cluster, its networks loaded once."""

    def __init__(
        self, bundle: str, weights: str | None, names: Sequence[str], settings: Settings
    ) -> None:
        import torch

        from van_deploy.bundle.original import original_network
        from van_deploy.checks.contestants import Contestants

        torch.set_num_threads(CORES_AN_ACTOR)
        opened = Bundle.open(bundle)
        self.loaded = original_network(opened, weights)
        self.settings = settings
        self.contestants = Contestants(
            opened, self.loaded, names, settings.execution, threads=CORES_AN_ACTOR
        ).__enter__()

    def answer(self, labelled: ImageSet, indices: Sequence[int]) -> list[dict[str, Any]]:
        from van_deploy.checks.evaluate import answered_batches

        return list(
            answered_batches(
                labelled, indices, self.contestants, self.loaded, self.settings.batch, 1
            )
        )


def entries_on_ray(
    bundle: Bundle,
    labelled: ImageSet,
    left: Sequence[int],
    names: Sequence[str],
    settings: Settings,
) -> Iterator[dict[str, Any]]:
    """Yield a journal entry for each batch of the images ``left``, as the cluster answers them.

    Args:
        bundle: the bundle, under a path that every machine sees.
        labelled: the images, likewise.
        left: which images.
        names: the artefacts.
        settings: batch size, runner, and the cluster's address.

    Raises:
        MissingDependency: Ray is not installed, or the cluster does not answer.
        ConversionError: a machine of the cluster failed.
    """
    ray = require_ray()
    started = _join(ray, settings.ray_address)
    try:
        step = settings.batch * BATCHES_A_TASK
        chunks = [left[start : start + step] for start in range(0, len(left), step)]
        actors = [
            ray.remote(_Worker)
            .options(num_cpus=CORES_AN_ACTOR)
            .remote(str(bundle.path.absolute()), settings.weights, list(names), settings)
            for _ in range(min(len(chunks), _cores(ray)))
        ]
        yield from _gather(ray, actors, labelled, chunks)
    finally:
        if started:
            ray.shutdown()


def _gather(
    ray: Any, actors: list[Any], labelled: ImageSet, chunks: list[Sequence[int]]
) -> Iterator[dict[str, Any]]:
    """Keep every actor busy; yield entries as they come."""
    images = ray.put(labelled)
    waiting = list(reversed(chunks))
    busy = {actor.answer.remote(images, waiting.pop()): actor for actor in actors}
    while busy:
        (done,), _ = ray.wait(list(busy), num_returns=1)
        actor = busy.pop(done)
        try:
            entries: list[dict[str, Any]] = ray.get(done)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ConversionError(
                f"A machine of the Ray cluster failed: {reason}",
                "Every machine must see the bundle, the weights and the images under the "
                "same paths. Go on with --resume.",
            ) from error
        if waiting:
            busy[actor.answer.remote(images, waiting.pop())] = actor
        yield from entries


def _join(ray: Any, address: str | None) -> bool:
    """Join or start a cluster; return whether it is to be left at the end."""
    if ray.is_initialized():
        return False
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise MissingDependency(
            f"The Ray cluster at '{address or 'this machine'}' does not answer: {error}",
            "Start one with `ray start --head`, or give --ray-address.",
        ) from error
    return True


def _cores(ray: Any) -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)) // CORES_AN_ACTOR)
