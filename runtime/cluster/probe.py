"""Whether every machine of a cluster can load the model, found out before work is begun.

Otherwise the first machine that lacks it would end a batch half-way, and a server's replica there
could answer nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsgnn.runtime.errors import ArtifactError, BackendError, DsgnnError

Told = tuple[Mapping[str, Any], str]  # what ranks, for records and for a person
OTHERS_S = 60.0  # seconds that the other machines have, after one has answered
SAME = "put the same file at the same path, and the same libraries, on every machine"


def probe(
    ray: Any, describe: Callable[..., Told], arguments: Sequence[Any], needs: Mapping[str, float]
) -> Told:
    """Load the model on all machines that have what a worker needs, and give what it is.

    describe: a function that loads the model and lets go of it. needs: `num_cpus` and `num_gpus` of
    a worker. A machine that does not answer in time, or is lost meanwhile, is passed over if
    another one answers.

    Raises BackendError if a machine cannot load the model, or none can begin, ArtifactError if it
    is not the same on all machines, and what `describe` raises if it raises that everywhere.
    """
    answers: dict[str, Told] = {}
    failures: dict[str, OSError | DsgnnError] = {}
    lost = None
    asked = _ask(ray, describe, arguments, needs)
    waiting, patience_s = list(asked), None
    while waiting:
        heard, waiting = ray.wait(waiting, timeout=patience_s)
        if not heard:
            break
        machine, patience_s = asked[heard[0]], OTHERS_S
        try:
            answers[machine] = ray.get(heard[0])
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, OSError | DsgnnError):
                raise
            failures[machine] = error.cause
        except ray.exceptions.RayError as error:
            lost = error
    for reference in waiting:
        ray.cancel(reference)
    if failures:
        raise _failure(failures, everywhere=not answers)
    if not answers:
        raise BackendError(f"a worker could not start: {lost}") from lost
    (first, told), *others = answers.items()
    for machine, (model, _) in others:
        if model != told[0]:
            raise ArtifactError(f"the model on {machine} is {model}, on {first} {told[0]}: {SAME}")
    return told


def _ask(
    ray: Any, describe: Callable[..., Told], arguments: Sequence[Any], needs: Mapping[str, float]
) -> dict[Any, str]:
    """The answers to come, and which machine each is from."""
    on = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    resources = {"CPU": needs["num_cpus"], "GPU": needs["num_gpus"]}
    task = ray.remote(**needs, max_retries=0)(describe)
    asked = {}
    for node in ray.nodes():
        if node["Alive"] and all(node["Resources"].get(k, 0) >= n for k, n in resources.items()):
            there = on(node["NodeID"], soft=False)
            # It takes no CPU of the machine's, so that it need not wait for other people's work.
            answer = task.options(scheduling_strategy=there, num_cpus=0).remote(*arguments)
            asked[answer] = node["NodeManagerHostname"]
    return asked or {task.remote(*arguments): "a machine that joins"}


def _failure(failures: Mapping[str, OSError | DsgnnError], everywhere: bool) -> Exception:
    """One error that tells of all. On every machine the same one is as on this machine alone."""
    first = next(iter(failures.values()))
    if everywhere and len({str(error) for error in failures.values()}) == 1:
        if isinstance(first, DsgnnError):
            return first
        return BackendError(f"a worker cannot load the model: {first}")
    return lacking(failures)


def lacking(failures: Mapping[str, OSError | DsgnnError]) -> BackendError:
    """The error that names the machines which cannot load the model, why, and what to do."""
    told = "; ".join(f"on {machine}: {error}" for machine, error in sorted(failures.items()))
    return BackendError(f"not every machine can load the model: {told}: {SAME}")
