"""`Work`: what all windows of one server share: searches, answers, decisions, jobs, healed models.

Nothing here knows of the page. What is shown is asked of `unpoison.report`, what is done is done by the
command in a process of its own.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from unpoison.app._case import Case
from unpoison.app._jobs import Job, Jobs
from unpoison.data import TrainingSet
from unpoison.detectors import Findings, principal_plane
from unpoison.errors import InputError, UnpoisonError
from unpoison.report import (
    Answers,
    Decisions,
    ReportData,
    Verdict,
    decided_findings,
    difference_image,
    nearest_example,
    plain,
)
from unpoison.runs import RunRecord
from unpoison.threats import TriggeredGoal
from unpoison.training import Trained

LOG = "decisions.jsonl"
_SUFFIXES = {"list": "txt", "clean-list": "txt", "cyclonedx": "json", "markdown": "md"}


@final
@dataclass(frozen=True, eq=False)
class InputSet:
    """Inputs to look for wrong answers in.

    Arguments:
        kind: "test", or "triggered" for test images with the trigger of a known backdoor.
        title: for people.
        examples: the inputs and their right labels.
        numbers: Int64[m], their places in the test set.
    """

    kind: str
    title: str
    examples: TrainingSet
    numbers: npt.NDArray[np.int64]

    def suspect(self, row: int) -> str:
        """What the command calls an input."""
        return f"{self.kind}:{int(self.numbers[row])}"


@final
@dataclass(frozen=True, eq=False)
class Search:
    """The findings of one run directory.

    Arguments:
        name: the name of the directory; its path where another one has that name.
        folder: the directory.
        data: the content of its report.
        findings: as saved.
        order: Int64[n], all examples, the flagged ones first and then by score.
        suspects: what the command called the inputs that were traced.
    """

    name: str
    folder: Path
    data: ReportData
    findings: Findings
    order: npt.NDArray[np.int64]
    suspects: tuple[str, ...]


@final
@dataclass(eq=False)
class Healed:
    """A healed model, from a run directory.

    Arguments:
        name: the name of the directory; its path where another one has that name.
        data: its record.
        model: None where its network is not one of ours.
        answers: by the kind of the inputs, when they are known.
    """

    name: str
    record: RunRecord
    model: Trained | None
    answers: dict[str, Answers] = field(default_factory=dict)


@final
class Work:
    """The state of one server.

    Arguments:
        case: what it is about.
        changed: called after each change, in any thread or task of the server.

    Raises:
        InputError: a run directory cannot be read, or the log of decisions not be written.
        MismatchError: a run or the log is about another training set.
    """

    def __init__(self, case: Case, changed: Callable[[], None] = lambda: None) -> None:
        self.case, self.changed = case, changed
        self.training_set = case.training_set.to("cpu")
        self.names = self.training_set.class_names
        self.decisions = Decisions(case.out / LOG, self.training_set.fingerprint, len(self.training_set))
        self.jobs = Jobs(lambda: self.changed(), self._ended)
        self._named: dict[Path, str] = {}
        self.searches: list[Search] = []
        self.healed: list[Healed] = []
        self.inputs = list(_input_sets(case))
        self.answers: dict[str, Answers] = {}
        self.plane: npt.NDArray[np.float32] | None = None
        self.trouble = ""
        self.version = secrets.token_hex(4)  # in addresses of images, so that no other case's are shown
        for folder in (*case.runs, *_kept(case.out, "trace"), *_kept(case.out, "heal")):
            self._add(folder)

    async def prepare(self) -> None:
        """Ask the model about the test inputs and lay out the map, in the background."""
        try:
            for one in self.inputs:
                self.answers[one.kind] = await asyncio.to_thread(Answers.of, self.case.model, one.examples)
                self.changed()
            await self._ask_healed()
            network = self.case.model.model if isinstance(self.case.model, Trained) else self.case.model
            plane = await asyncio.to_thread(principal_plane, network, self.case.training_set)
            self.plane = np.ascontiguousarray(plane.numpy())
        except UnpoisonError as error:
            self.trouble = str(error)
        self.changed()

    def class_name(self, label: int) -> str:
        """The name of a class on one line; as reports have it."""
        name = plain(self.names[label], limit=60) if 0 <= label < len(self.names) else ""
        return name or f"class {label}"

    def name_of(self, index: int) -> str:
        """What people call a training example."""
        ids = self.training_set.ids
        return f"{index}" if ids is None else plain(ids[index], limit=200)

    def input_set(self, kind: str) -> InputSet | None:
        """The inputs of a kind."""
        return next((one for one in self.inputs if one.kind == kind), None)

    def search_of(self, suspect: str) -> Search | None:
        """The last search that started from this input alone."""
        return next((one for one in reversed(self.searches) if one.suspects == (suspect,)), None)

    def job_of(self, suspect: str) -> Job | None:
        """The open job that traces this input."""
        return next((job for job in self.jobs.all if job.open and job.about == suspect), None)

    def search_named(self, name: str) -> Search | None:
        """The search of that name, or else the last one."""
        found = next((one for one in self.searches if one.name == name), None)
        return found or (self.searches[-1] if self.searches else None)

    def decide(self, examples: Any, verdict: Verdict) -> None:
        """Decide about examples, and tell all windows."""
        self.decisions.decide(examples, verdict)
        self.changed()

    def undo(self) -> None:
        """Take the last decision back."""
        if self.decisions.undo():
            self.changed()

    def redo(self) -> None:
        """Decide again what was taken back."""
        if self.decisions.redo():
            self.changed()

    def refresh(self) -> bool:
        """Read what other processes have decided; whether there is anything to tell the windows."""
        try:
            return self.decisions.refresh()
        except (OSError, UnpoisonError) as error:
            new = self.trouble != str(error)
            self.trouble = str(error)
            return new

    def trace(self, suspect: str, method: str = "calibrated") -> Job:
        """Trace an answer in a process of its own, unless that is being done."""
        if (job := self.job_of(suspect)) is not None:
            return job
        out = self._free("trace")
        words = ["trace", *self.case.options, "--suspect", suspect, "--method", method, "--out", str(out)]
        self.decisions.note("trace", suspect=suspect, method=method, out=out.name)
        return self.jobs.start(f"Trace of {suspect}", words, out, suspect)

    def heal(self, method: str = "retrain", search: Search | None = None) -> Job:
        """Heal the model of the examples that are decided to be blamed, in a process of its own.

        Raises:
            InputError: none is.
        """
        out = self._free("heal")
        findings = self.decided(search)
        place = self.case.out / f"decided-{out.name}"
        findings.save(place)
        words = ["heal", *self.case.options, "--findings", str(place), "--method", method, "--out", str(out)]
        self.decisions.note("heal", method=method, removed=len(findings.flagged), out=out.name)
        return self.jobs.start(f"Healing by {method}, {len(findings.flagged):,} examples", words, out)

    def export(self, form: str, search: Search | None = None) -> Job:
        """Write the examples that are decided to be blamed, as `unpoison export` writes findings.

        Raises:
            InputError: none is.
        """
        findings = self.decided(search)
        out = self._free("quarantine", f".{_SUFFIXES.get(form, form)}")
        place = self.case.out / f"decided-{out.stem}"
        findings.save(place)
        self.decisions.note("export", form=form, examples=len(findings.flagged), out=out.name)
        words = ["export", str(place), "--as", form, *self._files(), "--out", str(out)]
        return self.jobs.start(f"Export of {len(findings.flagged):,} examples as {form}", words, out)

    def report(self, search: Search) -> Job:
        """Write the report of a search."""
        out = self._free("report", ".html")
        return self.jobs.start(
            f"Report of {search.name}", ["report", str(search.folder), "--out", str(out)], out
        )

    def decided(self, search: Search | None = None) -> Findings:
        """What is decided, as findings to save, heal by and export."""
        return decided_findings(
            self.decisions, self.training_set, None if search is None else search.findings
        )

    def picture(self, kind: str, number: int, search: str = "") -> Tensor | None:
        """UInt8[c h w]: a training image, an input, a suspect, or a suspect minus a training image."""
        if kind == "train":
            return self.training_set.images[number] if 0 <= number < len(self.training_set) else None
        if kind in ("suspect", "difference"):
            found = self.search_named(search)
            seen = None if found is None else found.data.observation
            if seen is None or not len(seen):
                return None
            suspect = torch.from_numpy(seen[0])
            if kind == "suspect":
                return suspect
            other = self.picture("train", number)
            return None if other is None else difference_image(suspect, other)
        given = self.input_set(kind)
        return (
            given.examples.images[number] if given is not None and 0 <= number < len(given.numbers) else None
        )

    def column(self, name: str, search: str = "") -> bytes | None:
        """A column of the map, as bytes.

        "plane" is Float32[n 2], "label" UInt16[n], "score" Float32[n] and "decision" UInt8[n]; None for a
        column that is not there (yet).
        """
        if name == "plane":
            return None if self.plane is None else self.plane.tobytes()
        if name == "label":
            return self.training_set.labels.numpy().astype(np.uint16).tobytes()
        if name == "decision":
            return self.decisions.codes.tobytes()
        found = self.search_named(search) if name == "score" else None
        return None if found is None else found.data.scores.astype(np.float32).tobytes()

    def nearest(self, index: int, search: str) -> int | None:
        """The example nearest to this one that is neither flagged nor blamed now."""
        excluded = self.decisions.codes == 1
        found = self.search_named(search)
        if found is not None:
            excluded = excluded | found.data.is_flagged
        return nearest_example(self.training_set, index, excluded)

    def _files(self) -> list[str]:
        """The options of export that name the files of data and model, to be hashed; where there are such."""
        given = dict(pairwise(self.case.options))
        found = [("--files", given.get("--data"))]
        if (model := given.get("--model")) is not None and (
            Path(model) / "model/model.safetensors"
        ).is_file():
            found.append(("--model", model))
        return [
            word
            for name, place in found
            if place is not None and Path(place).exists()
            for word in (name, place)
        ]

    def _free(self, what: str, suffix: str = "") -> Path:
        """A place that no job has had; that of a cancelled job is not used again."""
        used = [*self.case.out.glob(f"*{what}-*"), *(job.out for job in self.jobs.all)]
        tails = [one.stem.rpartition("-")[2] for one in used if f"{what}-" in one.stem]
        last = max((int(tail) for tail in tails if tail.isdigit()), default=0)
        return self.case.out / f"{what}-{last + 1}{suffix}"

    def _add(self, folder: Path) -> None:
        """Take in the findings and the healed model of a run directory, whichever it has."""
        if folder.resolve() in self._named:
            return  # given on the command line, and kept by an earlier server as well
        record = RunRecord.load(folder)
        name = folder.name
        if not name or name in self._named.values():
            name = str(folder.resolve())
        self._named[folder.resolve()] = name
        if (folder / "findings").is_dir():
            findings = Findings.load(folder / "findings")
            if findings.fingerprint != self.training_set.fingerprint:
                raise InputError(
                    f"{folder}: its findings are of another training set than {self.training_set.name}; give "
                    "the --data and --poison that were searched"
                )
            data = ReportData.from_runs([folder])
            scores = np.where(data.is_flagged, np.inf, data.scores)
            order = np.argsort(-scores, kind="stable").astype(np.int64)
            order = np.concatenate([data.flagged, order[len(data.flagged) :]])
            self.searches.append(Search(name, folder, data, findings, order, _suspects(record)))
        place = folder / ("healed" if record.verb == "demo" else "model")
        if record.verb in ("heal", "repair", "demo") and place.is_dir():
            try:
                model: Trained | None = Trained.load(place, device=self.case.training_set.device)
            except UnpoisonError:
                model = None  # of a network of the user's own: only what its record says can be shown
            self.healed.append(Healed(name, record, model))

    def _ended(self, job: Job) -> None:
        if job.state == "done" and not job.is_file:
            try:
                self._add(job.out)
            except UnpoisonError as error:
                job.state, job.message = "failed", str(error)
        self.decisions.note(f"{job.words[0]} {job.state}", out=job.out.name, seconds=round(job.seconds, 1))
        if job.words[0] == "heal" and job.state == "done":
            self._asking = asyncio.get_running_loop().create_task(self._ask_healed())

    async def _ask_healed(self) -> None:
        for healed in self.healed:
            if (model := healed.model) is None or healed.answers:
                continue
            for one in self.inputs:
                healed.answers[one.kind] = await asyncio.to_thread(Answers.of, model, one.examples)
        self.changed()


def _input_sets(case: Case) -> list[InputSet]:
    if case.test_set is None:
        return []
    test = case.test_set.to("cpu")
    found = [InputSet("test", "Test set", test, np.arange(len(test)))]
    if case.poison is not None and isinstance(case.poison.goal, TriggeredGoal):
        images, indices = case.poison.goal.victims(test)
        labels = test.labels[indices.cpu()]
        triggered = TrainingSet(images.cpu(), labels, test.class_names, "test images with the trigger")
        found.append(
            InputSet("triggered", "Test set with the known trigger", triggered, indices.cpu().numpy())
        )
    return found


def _suspects(record: RunRecord) -> tuple[str, ...]:
    """What the command called the inputs that a run traced."""
    given = record.configuration.get("suspect")
    if record.verb == "demo":
        return (f"triggered:{record.results['observed']}",)
    return tuple(str(one) for one in given) if isinstance(given, list) else ()


def _kept(out: Path, verb: str) -> list[Path]:
    """The run directories of earlier jobs, in their order."""
    found = [one for one in out.glob(f"{verb}-*") if (one / "run.json").is_file()]
    return sorted(found, key=lambda one: (len(one.name), one.name))
