"""Many runs: one after another here, each in processes of its own, or on a Ray cluster."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from fastlayers.studies import runner
from fastlayers.studies.results import Job, ResultError, Store
from fastlayers.studies.runner import Machine

Outcome = Literal["done", "done before", "failed"]


@dataclass(frozen=True)
class Finished:
    """What became of a run; `reason` where it failed."""

    job: Job
    outcome: Outcome
    reason: str = ""


def in_turn(jobs: Iterable[Job], machine: Machine, before: Callable[[Job], object]) -> Iterator[Finished]:
    """Does the jobs one after another; what is done already is not done again, and what fails does not stop the rest.

    Calls `before` with each job that it begins.
    """
    store = Store(machine.out)
    for job in jobs:
        finished = _earlier(store, job)
        if finished is None:
            before(job)
            finished = _attempt(job, machine)
        yield finished


def by_ray(jobs: Iterable[Job], machine: Machine, address: str | None) -> Iterator[Finished]:
    """Hands the jobs to the Ray cluster at `address`, or to one on this machine; `machine.out` is on a disk they share.

    Yields them as they finish. Each job takes as many CPUs as the threads that it may use, and a GPU unless `device`
    is "cpu" or the cluster has none.
    """
    import ray

    store = Store(machine.out)
    ray.init(address, log_to_driver=False, ignore_reinit_error=True)
    try:
        resources: dict[str, Any] = {"num_cpus": machine.threads or 1}
        if machine.device != "cpu" and ray.cluster_resources().get("GPU", 0):
            resources["num_gpus"] = machine.devices
        attempt = ray.remote(**resources)(_attempt)
        quiet = machine.model_copy(update={"progress": False, "threads": machine.threads or 1})
        waiting = {}
        for job in jobs:
            finished = _earlier(store, job)
            if finished is None:
                waiting[attempt.remote(job, quiet)] = job
            else:
                yield finished
        while waiting:
            (done,), _ = ray.wait(list(waiting))
            job = waiting.pop(done)
            try:
                yield ray.get(done)
            except ray.exceptions.RayError as error:  # the worker itself died
                yield Finished(job, "failed", str(error).strip().splitlines()[-1])
    finally:
        ray.shutdown()


def _earlier(store: Store, job: Job) -> Finished | None:
    """What became of a job that needs nothing done now: it is done, or something else is in its place."""
    try:
        return Finished(job, "done before") if store.is_finished(job) else None
    except ResultError as error:
        return Finished(job, "failed", f"{error}; remove it, and the run is done again")


def _attempt(job: Job, machine: Machine) -> Finished:
    try:
        if machine.processes > 1:
            _in_processes_of_its_own(job, machine)
        else:
            runner.run(job, machine)
    except Exception as error:
        return Finished(job, "failed", f"{type(error).__name__}: {error}")
    return Finished(job, "done")


def _in_processes_of_its_own(job: Job, machine: Machine) -> None:
    runner.share_of_batch(job.training.batch_size, machine.processes)
    # Lightning starts the other processes by starting this command again.
    command = [sys.executable, "-m", "fastlayers.studies.worker", job.model_dump_json(), machine.model_dump_json()]
    code = subprocess.run(command, check=False).returncode
    if code or not Store(machine.out).is_finished(job):
        reason = Store(machine.out).failures().get(str(job.folder), f"exit status {code}")
        raise ResultError(reason)
