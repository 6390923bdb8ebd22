"""`unpoison index` and `unpoison similar`: read the training set once, show which examples are alike."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from unpoison import detectors, workflow
from unpoison.cli._console import Console
from unpoison.cli._executors import check_place, ray_executor
from unpoison.cli._inputs import load_model, load_set, reference_of, told_of
from unpoison.cli._interrupts import Interrupts, Terminated
from unpoison.cli._options import Index, Similar
from unpoison.cli._session import Session, session
from unpoison.cli._status import DONE, stopped
from unpoison.data import Examples
from unpoison.errors import InputError
from unpoison.influence import IndexEstimate, InfluenceIndex


def index(options: Index, console: Console, interrupts: Interrupts) -> int:
    """Make an index of the model's training set, or say what it would take."""
    check_place(options.place)
    if not options.estimate:
        _check_directory(options.out, overwrite=options.run.overwrite)
    try:
        return _index(options, console, interrupts)
    except (KeyboardInterrupt, Terminated) as end:
        if options.estimate or not options.out.exists():
            raise
        return stopped(end, options.out, console)


def _index(options: Index, console: Console, interrupts: Interrupts) -> int:
    place = options.out
    with session(options, None, console, interrupts) as run:
        with run.stage("data"):
            with run.reading() as progress:
                splits, training_set, _ = load_set(options, run.device, progress=progress)
            run.note(splits)
            reference = splits.test
            if options.reference is not None:
                reference = reference_of(options.reference, options, run.device)
            subject = load_model(options.model, options.architecture, training_set, run.device)
            network = workflow.network_of(subject.model)
        shared: dict[str, Any] = {"modules": list(options.modules) or None, "numbers": options.numbers}
        for name in ("covariance_examples", "eigenvalue_examples"):
            if (given := getattr(options, name)) is not None:
                shared[name] = given
        if options.estimate:
            with run.stage("estimate"):
                found = InfluenceIndex.estimate(network, training_set, **shared)
            run.results.update(_told(found, options))
            console.show(*_lines(found, options))
            return DONE
        with run.stage("index"), console.progress("index") as progress:
            with (
                ray_executor(options.place, options.processes, options.run.threads or 1)
                or nullcontext() as ray
            ):
                made = workflow.index(
                    place,
                    network,
                    training_set,
                    append=options.append,
                    processes=options.processes or 1,
                    executor=ray,
                    seed=options.run.seed,
                    progress=progress,
                    **shared,
                )
            if not options.append:
                _calibrate(made, network, training_set, reference, options, run, progress)
        run.results.update(
            **{**told_of(training_set), "examples": len(made)}, directory=str(place), **made.settings
        )
        run.recorder.record().save(place)
    console.show(
        f"an index of {len(made)} examples, {made.numbers} numbers each, is in {place}: give it to "
        "unpoison trace --index and unpoison similar --index"
    )
    return DONE


def similar(options: Similar, console: Console, interrupts: Interrupts) -> int:
    """Show the training examples whose gradients resemble those of the given ones."""
    with session(options, options.out, console, interrupts) as run:
        with run.stage("similar"):
            known = InfluenceIndex.open(options.index)
            ids, classes = known.names()
            chosen = [_example(text.strip(), ids) for text in options.examples.split(",")]
            if options.count < 1:
                raise InputError(f"--count {options.count}: must be at least 1")
            found, cosines = known.similar(chosen, count=options.count)
            labels = known.labels()

        def name(example: int) -> str:
            own = str(example) if ids is None else ids[example]
            return f"{own} ({classes[int(labels[example])]})"

        run.results["similar"] = [
            {"example": example, "examples": others, "cosines": values}
            for example, others, values in zip(chosen, found.tolist(), cosines.tolist(), strict=True)
        ]
        lines = []
        for example, others, values in zip(chosen, found.tolist(), cosines.tolist(), strict=True):
            lines.append(f"most similar to {name(example)}:")
            lines += [f"  {value:.3f}  {name(other)}" for other, value in zip(others, values, strict=True)]
    console.show(*lines)
    return DONE


def _calibrate(
    made: InfluenceIndex,
    network: Any,
    training_set: Examples,
    reference: Examples | None,
    options: Index,
    run: Session,
    progress: Any,
) -> None:
    """Calibrate `calibrated` through the index, where there is anything held out to calibrate on."""
    detector = detectors.Calibrated()
    given: dict[str, Any] = {"seed": options.run.seed, "index": made}
    usable = reference is not None and made.modules is None
    if not usable or detector.kept(made.calibration, network, training_set, reference, **given) is not None:
        return
    try:
        calibration = workflow.calibrate(
            network, training_set, reference, method=detector, progress=progress, **given
        )
    except InputError as error:
        run.console.say(f"not calibrated yet: {error}")
        return
    calibration.save(made.calibration)
    run.results["calibration"] = calibration.source


def _check_directory(place: Path, *, overwrite: bool) -> None:
    """That the directory is new, or holds an index."""
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not (place / "index.json").is_file():
        raise InputError(f"--out {place}: exists and holds no index; name another directory")
    if overwrite:
        shutil.rmtree(place)


def _example(text: str, ids: list[str] | None) -> int:
    if text.isascii() and text.isdigit():
        return int(text)
    if ids is None or text not in ids:
        raise InputError(f"--examples {text}: no training example has this name")
    return ids.index(text)


def _told(found: IndexEstimate, options: Index) -> dict[str, Any]:
    """An estimate, for run.json."""
    return {
        "examples": found.examples,
        "measured": found.measured,
        "numbers": found.numbers,
        "sketch": found.sketch,
        "estimated_seconds": {str(n): found.seconds(n) for n in sorted({1, options.processes or 1})},
        "estimated_peak_bytes": found.peak_bytes,
        "estimated_disk_bytes": found.disk_bytes,
    }


def _lines(found: IndexEstimate, options: Index) -> list[str]:
    lines = [
        f"{found.examples} examples, measured on {found.measured}; {found.numbers} numbers an example from "
        f"sketches of {found.sketch}",
        f"memory {found.peak_bytes / 1e9:.2f} GB, disk {found.disk_bytes / 1e9:.2f} GB",
    ]
    for count in sorted({1, options.processes or 1}):
        seconds = found.seconds(count)
        cost = "" if options.price is None else f", costs {seconds / 3600 * options.price:.2f}"
        words = "1 process" if count == 1 else f"{count} processes, each with a core of its own"
        lines.append(f"{words}: {seconds / 3600:.2f} h ({seconds:.0f} s){cost}")
    return lines
