"""One function over many tasks on a Ray cluster, each result as it comes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from van_deploy.errors import MissingDependency, require_extra


@dataclass(frozen=True)
class RayTask:
    """One call of the function, and how it ended.

    Attributes:
        tag: what its result is told by.
        arguments: of the call, after what all calls share.
        options: Ray's, such as ``num_cpus`` and ``accelerator_type``.
        result: what the function returned.
        failure: why it did not return, one line; "" where it did.
    """

    tag: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    failure: str = ""


def require_ray() -> Any:
    """Return the ``ray`` module.

    Raises:
        MissingDependency: it is not installed.
    """
    with require_extra("A Ray cluster", "ray"):
        import ray
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no report to its makers
    return ray


def run_on_ray(
    function: Callable[..., Any],
    tasks: Iterable[RayTask],
    *,
    shared: Any = None,
    address: str | None = None,
) -> Iterator[RayTask]:
    """Call ``function(shared, *arguments)`` for each task, and yield each as it ends.

    Args:
        function: of a module that the machines of the cluster have, too.
        tasks: taken one by one; a task is not tried a second time.
        shared: the same for all of them, sent once.
        address: of the cluster; None joins the one this machine is in, or starts one of this
            machine alone. A cluster joined before is used as it is.

    Raises:
        MissingDependency: Ray is not installed, or the cluster does not answer.
    """
    ray = require_ray()
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise MissingDependency(
                f"The Ray cluster at '{address or 'this machine'}' does not answer: {error}",
                "Start one with `ray start --head`, or give --ray-address.",
            ) from error
    try:
        remote, given = ray.remote(function), ray.put(shared)
        most = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes()), default=1)
        waiting: dict[Any, RayTask] = {}
        for task in tasks:
            options = {"max_retries": 0, **task.options}
            if "num_cpus" in options:  # no more than the largest machine has
                options["num_cpus"] = min(options["num_cpus"], max(1, most))
            waiting[remote.options(**options).remote(given, *task.arguments)] = task
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            task = waiting.pop(done)
            try:
                yield replace(task, result=ray.get(done))
            except ray.exceptions.RayError as error:
                lines = str(error).strip().splitlines()
                yield replace(task, failure=lines[-1] if lines else type(error).__name__)
    finally:
        if started:
            ray.shutdown()
