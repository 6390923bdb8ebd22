"""`unpoison screen`: a model and inputs in, those that look triggered out, in words that `trace` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unpoison import input_detectors, workflow
from unpoison._inputs import Inputs, joined
from unpoison.cli._console import Console
from unpoison.cli._inputs import load_model, load_set, options_of, reference_of, told_of, transform_of
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._options import Screen
from unpoison.cli._session import Session, session
from unpoison.cli._status import DONE, FOUND
from unpoison.cli._suspects import suspect_of
from unpoison.data import SUFFIXES, Examples, Splits
from unpoison.errors import InputError, printable
from unpoison.input_detectors import Screening
from unpoison.threats import PoisonSet

_SHOWN = 10


def screen(options: Screen, console: Console, interrupts: Interrupts) -> int:
    """Screen `--inputs` by what `--model` makes of them."""
    detector = input_detectors.get(options.method, preset=options.preset, **options_of(options.option))
    with session(options, options.out, console, interrupts) as run:
        with run.stage("data"), run.reading() as reading:
            splits, training_set, poison = load_set(options, run.device, progress=reading)
            run.note(splits)
            reference = reference_of(options.reference, options, run.device)
            assert reference is not None
            subject = load_model(options.model, options.architecture, training_set, run.device)
            words, inputs = _named(options, splits, poison)
        with run.stage("screen"), console.progress(f"screen by {options.method}") as progress:
            screening = workflow.screen(
                subject.model,
                inputs,
                reference,
                method=detector,
                false_positive_rate=options.false_positive_rate,
                task=subject.task,
                seed=options.run.seed,
                progress=progress,
            )
        screening.save(run.artefact("screening", "screening"))
        _keep(run, screening, words)
        run.results.update(told_of(training_set))
    flagged = [words[index] for index in screening.flagged.tolist()]
    console.show(screening.summary)
    if flagged:
        more = ", ..." if len(flagged) > _SHOWN else ""
        console.show(f"flagged: {', '.join(map(printable, flagged[:_SHOWN]))}{more}")
        console.show("trace them with unpoison trace --suspect, those with one answer together")
    console.show(f"the screening is {options.out / 'screening'}")
    return FOUND if options.fail_on_findings and flagged else DONE


def _keep(run: Session, screening: Screening, words: list[str]) -> None:
    """Record what was found, by the words that name the inputs."""
    names = screening.class_names
    run.results.update(
        method=screening.method,
        inputs=len(screening),
        flagged=len(screening.flagged),
        flagged_inputs=[words[index] for index in screening.flagged.tolist()],
        suspects=[words[index] for index in screening.suspects().tolist()],
        screened=[
            {"input": word, "score": score, "p_value": p_value, "answer": names[answer]}
            for word, score, p_value, answer in zip(
                words,
                screening.scores.tolist(),
                screening.p_values.tolist(),
                screening.answers.tolist(),
                strict=True,
            )
        ],
        threshold=screening.threshold,
        false_positive_rate=screening.false_positive_rate,
        calibrated_on=screening.calibrated_on,
        summary=screening.summary,
    )


def _named(
    options: Screen, splits: Splits[Examples], poison: PoisonSet | None
) -> tuple[list[str], Examples | Inputs]:
    """The words of all inputs, and the inputs: the test set alone as it is, all others in memory.

    Raises:
        InputError: there are none, or they are of different sizes.
    """
    words = _spelled_out(options.inputs, splits)
    if len(options.inputs) == 1 and _is_test_set(options.inputs[0]):
        assert splits.test is not None
        return words, splits.test
    transform, found = transform_of(options), list[Any]()
    for text in words:
        found.append(suspect_of(text, splits, poison, options.images, transform, option="--inputs").inputs)
    if not found:
        raise InputError("--inputs: name at least one input, an image file, a folder of them or test:INDEX")
    if len({tuple(one.shape) if isinstance(one, Tensor) else tuple(one) for one in found}) != 1:
        raise InputError("--inputs: the inputs are of different sizes")
    inputs = joined(found)
    return words, inputs.contiguous() if isinstance(inputs, torch.Tensor) else inputs


def _spelled_out(texts: tuple[str, ...], splits: Splits[Examples]) -> list[str]:
    """A word for each input: folders and the test set stand for what they hold."""
    found: list[str] = []
    for text in texts:
        folder = Path(text)
        if _is_test_set(text):
            if splits.test is None:
                raise InputError("--inputs test: there is no test set; name one with --test-data")
            found += [f"test:{index}" for index in range(len(splits.test))]
        elif folder.is_dir():
            files = sorted(one for one in folder.rglob("*") if one.suffix.lower() in SUFFIXES)
            if not files:
                raise InputError(f"--inputs {text}: there are no image files in this folder")
            found += map(str, files)
        else:
            found.append(text)
    return found


def _is_test_set(text: str) -> bool:
    return text == "test" and not Path(text).exists()
