"""`choose_targets`: test images that the clean networks of an experiment answer rightly.

An image that is taken for another class without any poison tells nothing about an attack. Which are not is
known only when the clean networks of an experiment are trained; they are its controls, so training them first
costs nothing.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from unpoison._artefacts import read_json
from unpoison.errors import InputError, UnpoisonError
from unpoison.evaluation._executors import Executor
from unpoison.evaluation._experiment import Experiment, TargetImage, Targets
from unpoison.evaluation._plan import controls
from unpoison.evaluation._store import Store
from unpoison.evaluation._sweep import Watcher, make


def choose_targets(
    experiment: Experiment,
    store: str | os.PathLike[str],
    executor: Executor,
    *,
    device: str = "cpu",
    watch: Watcher | None = None,
) -> Experiment:
    """The experiment with `targets.images` in place of `targets.pairs` and `targets.correct`.

    Arguments:
        experiment: given back as it is where it names no `targets.correct`.
        store: where its clean networks are, or will be.
        executor: who trains them.
        device: where.
        watch: told how far it has come.

    Raises:
        InputError: as `plan`; or a class has too few images that all of them answer rightly.
        UnpoisonError: a clean network could not be trained.
    """
    wanted = experiment.targets.correct
    if wanted is None:
        return experiment
    work = controls(experiment, device=device)
    found = Store(Path(store))
    failures = make(work, found, executor, watch=watch)
    if failures:
        raise UnpoisonError(f"targets.correct: a clean network could not be had: {failures[0]}")
    answers = [
        read_json(found.place(stage.key) / "right.json") for stage in work.stages if stage.kind == "measure"
    ]
    names: list[str] = answers[0]["class_names"]
    images: list[TargetImage] = []
    for source, target in experiment.targets.pairs:
        label = source if isinstance(source, int) else names.index(source)
        shared = sorted(set.intersection(*(set(each["right"][label]) for each in answers)))
        if len(shared) < wanted:
            raise InputError(
                f"targets.correct: the clean networks all answer {len(shared)} test images of class "
                f"{source!r} rightly, fewer than {wanted}"
            )
        images += [TargetImage(test_index=index, target=target, source=source) for index in shared[:wanted]]
    return dataclasses.replace(experiment, targets=Targets(images=tuple(images)))
