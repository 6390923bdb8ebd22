"""`choose_targets`: test images that clean networks predict correctly.

An image that is predicted as another class without any poison says nothing about an attack. By default the
clean networks are the controls of the experiment, so training them first costs nothing; but then the control
"no attack" can only miss. With `targets.networks` they are others, and the control says how often a correctly
predicted image is missed anyway.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from unpoison._artefacts import read_json
from unpoison.errors import InputError, UnpoisonError
from unpoison.evaluation._executors import Executor
from unpoison.evaluation._plan import controls
from unpoison.evaluation._schema import Experiment
from unpoison.evaluation._sections import TargetImage, Targets
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
        experiment: returned as it is where it has no `targets.correct`.
        store: where its clean networks are, or will be.
        executor: trains them.
        device: where.
        watch: called with the progress.

    Raises:
        InputError: as `plan`; or a class has too few images that all of them predict correctly.
        UnpoisonError: a clean network could not be trained.
    """
    targets = experiment.targets
    if targets is None or targets.correct is None:
        return experiment
    work = controls(experiment, device=device)
    found = Store(Path(store))
    failures = make(work, found, executor, watch=watch)
    if failures:
        raise UnpoisonError(f"targets.correct: a clean network could not be trained: {failures[0]}")
    answers = [
        read_json(found.place(stage.key) / "right.json") for stage in work.stages if stage.kind == "measure"
    ]
    names: list[str] = answers[0]["class_names"]
    images: list[TargetImage] = []
    for source, target in targets.pairs:
        label = source if isinstance(source, int) else names.index(source)
        shared = sorted(set.intersection(*(set(each["right"][label]) for each in answers)))
        if len(shared) < targets.correct:
            raise InputError(
                f"targets.correct: all clean networks predict {len(shared)} test images of class {source!r} "
                f"correctly, fewer than {targets.correct}"
            )
        images += [
            TargetImage(test_index=(index,), target=target, source=source)
            for index in shared[: targets.correct]
        ]
    return dataclasses.replace(experiment, targets=Targets(images=tuple(images)))
