"""Runs one function for many tasks on a Ray cluster and yields results as they complete."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from van_deploy.errors import MissingDependency, require_extra


@dataclass(frozen=True)
class RayTask:
    """One call of the function, and its result.

    Attributes:
        tag: identifies the task.
        arguments: of the call, after the shared argument.
        options: Ray's, such as ``num_cpus`` and ``accelerator_type``.
        result: return value of the function.
        failure: the error in one line; "" if the function returned.
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
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # sends no usage report
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
        function: from a module that is installed on every machine of the cluster.
        tasks: read one by one; a failed task is not retried.
        shared: the first argument of all calls, sent once.
        address: of the cluster; None joins the cluster of this machine, or starts one on this
            machine alone. An existing connection is used.

    Raises:
        MissingDependency: Ray is not installed, or the cluster does not respond.
    """
    ray = require_ray()
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise MissingDependency(
                f"The Ray cluster at '{address or 'this machine'}' does not respond: {error}",
                "Start one with `ray start --head`, or give --ray-address.",
            ) from error
    try:
        remote, shared_ref = ray.remote(function), ray.put(shared)
        max_cpus = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes()), default=1)
        pending: dict[Any, RayTask] = {}
        for task in tasks:
            options = {"max_retries": 0, **task.options}
            if "num_cpus" in options:  # no more than the largest machine has
                options["num_cpus"] = min(options["num_cpus"], max(1, max_cpus))
            pending[remote.options(**options).remote(shared_ref, *task.arguments)] = task
        while pending:
            (done,), _ = ray.wait(list(pending), num_returns=1)
            task = pending.pop(done)
            try:
                yield replace(task, result=ray.get(done))
            except ray.exceptions.RayError as error:
                lines = str(error).strip().splitlines()
                yield replace(task, failure=lines[-1] if lines else type(error).__name__)
    finally:
        if started:
            ray.shutdown()
