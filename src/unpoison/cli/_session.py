"""`session`: what every verb does around its work.

It refuses a bad `--out` first, then imports torch and chooses device and threads, opens the run directory,
and in the end writes `run.json` into it, renames it into place and prints the record under `--json`. The run
directory gets its final name when the verb is done, and is removed when it is not.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from unpoison._artefacts import atomic_directory
from unpoison._memory import as_bytes, explained, limited
from unpoison._progress import Progress
from unpoison.cli._console import Console, per_cent
from unpoison.cli._interrupts import Interrupts
from unpoison.cli._options import Verb, configuration
from unpoison.errors import InputError
from unpoison.runs import Recorder, check_out

if TYPE_CHECKING:
    import torch

    from unpoison._statistics import Proportion
    from unpoison.data import Examples, Splits
    from unpoison.tasks import ClassificationTask
    from unpoison.threats import PoisonSet
    from unpoison.workflow import Model

# What a fingerprint that begins with such a word is made of.
_IDENTITIES: Final = {
    "files": "the names, sizes and times of the training set's files, its labels and 64 of its images",
    "source": "what the training set says of itself, its labels and 64 of its inputs",
    "rows": "the training set's labels and 64 of its inputs",
}


@final
@dataclass(frozen=True)
class Session:
    """One run of a verb, under way.

    Arguments:
        recorder: takes down stages, results and artefacts.
        directory: the run directory as long as it is written; it has its final name only afterwards.
        out: that final name.
        device: where to compute.
        console: where words go.
    """

    recorder: Recorder
    directory: Path
    out: Path
    device: torch.device
    console: Console

    @property
    def results(self) -> dict[str, Any]:
        """What goes into `results` of run.json."""
        return self.recorder.results

    def stage(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Count the block's seconds to the stage `name`."""
        return self.recorder.stage(name)

    def artefact(self, name: str, place: str) -> Path:
        """Where to write the artefact `name`; noted in run.json with its place in the run directory."""
        self.recorder.artefacts[name] = place
        return self.directory / place

    @contextlib.contextmanager
    def reading(self) -> Iterator[Progress]:
        """Yield a `Progress` for what is read before the work, of which nothing is shown where nothing is."""
        with contextlib.ExitStack() as stack:
            shown: list[Progress] = []

            def report(stage: str, done: int, total: int, /, **metrics: float) -> None:
                if not shown:
                    shown.append(stack.enter_context(self.console.progress("data")))
                shown[0](stage, done, total, **metrics)

            yield report

    def note(self, splits: Splits[Any]) -> None:
        """Say and take down what was done in reading the data: files passed over, images resized."""
        if splits.notes:
            self.results["notes"] = list(splits.notes)
        for line in splits.notes:
            self.console.say(line)
        kind, colon, _ = splits.train.fingerprint.partition(":")
        if colon and kind != "content":
            self.console.say(
                f"findings are tied to {_IDENTITIES[kind]}, not to its whole content (--fingerprint content)"
            )

    def rate(self, name: str, proportion: Proportion | None) -> None:
        """Note a rate as the number `name`, and with its n and interval under `measured`."""
        self.results[name] = None if proportion is None else proportion.rate
        if proportion is not None:
            self.results.setdefault("measured", {})[name] = proportion.to_dict()

    def measure(
        self,
        model: Model,
        test_set: Examples | None,
        poison: PoisonSet | None,
        *,
        when: str = "",
        task: ClassificationTask | None = None,
    ) -> None:
        """Note accuracy, and attack success where the poison is known; null without a test set.

        Arguments:
            model: what to measure.
            test_set: clean test images.
            poison: what was put into the training set.
            when: "before" or "after" healing, to tell the numbers apart.
            task: how the model's logits are read.
        """
        from unpoison import workflow

        measured = None
        if test_set is not None:
            goal = None if poison is None else poison.goal
            measured = workflow.measure(model, test_set, goal, task=task)
        suffix = f"_{when}" if when else ""
        self.rate(f"clean_accuracy{suffix}", None if measured is None else measured.clean_accuracy)
        self.rate(f"attack_success{suffix}", None if measured is None else measured.attack_success)
        if measured is not None and measured.certified:
            self.results[f"certified{suffix}"] = [one.to_dict() for one in measured.certified]

    def compared(self) -> list[str]:
        """What `measure` noted before and after healing, in lines."""
        found = []
        for name, words in (("clean_accuracy", "clean accuracy"), ("attack_success", "attack success")):
            before, after = (self.results[f"{name}_{when}"] for when in ("before", "after"))
            if before is not None:
                found.append(f"{words}: {per_cent(before)} before, {per_cent(after)} after")
        return found


@contextlib.contextmanager
def session(options: Verb, out: Path | None, console: Console, interrupts: Interrupts) -> Iterator[Session]:
    """Yield the `Session` of one verb; without `out` it has no run directory and writes no run.json.

    Raises:
        InputError: `out` may not be written, or the device or number of threads is impossible.
    """
    run = options.run
    given = getattr(options, "data", None)
    if given is not None and not given.strip():
        raise InputError("--data: is empty; name a data set")
    target = None if out is None else check_out(out, run.overwrite)
    recorder = Recorder(type(options).__name__.lower(), configuration(options), run.seed, console.since)
    if run.threads is not None and run.threads < 1:
        raise InputError(f"--threads {run.threads}: must be at least 1")
    memory = None if run.memory is None else as_bytes(run.memory, called="--memory")
    with contextlib.ExitStack() as stack:
        stack.enter_context(limited(memory))
        stack.enter_context(explained(recorder.verb, "give smaller settings, or a part of the data"))
        import torch

        device = device_named(run.device)
        if run.threads is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(run.threads)
        if device.type == "cuda":
            torch.cuda.init()  # type: ignore[no-untyped-call]
            torch.cuda.reset_peak_memory_stats(device)
        # Mostly the import of torch.
        recorder.seconds["start"] = time.perf_counter() - console.since
        if target is None:
            yield Session(recorder, Path(), Path(), device, console)
            record = recorder.record()
        else:
            with run_directory(target, interrupts) as staging:
                yield Session(recorder, staging, target, device, console)
                record = recorder.record()
                record.save(staging)
        if run.json:
            print(json.dumps(record.to_dict(), indent=2, allow_nan=False))  # noqa: T201


def device_named(name: str) -> torch.device:
    """The device that `--device` names; of auto, the GPU when there is one."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device here; use --device cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextlib.contextmanager
def run_directory(out: Path, interrupts: Interrupts) -> Iterator[Path]:
    """Yield a directory that becomes `out` when the block ends without an error, else is removed."""
    with contextlib.ExitStack() as stack:
        with interrupts.shielded():
            staging = stack.enter_context(atomic_directory(out))
        yield staging
        # All the work is done: a Ctrl-C that comes while the directory is renamed comes too late.
        with interrupts.shielded(forget=True):
            stack.close()
