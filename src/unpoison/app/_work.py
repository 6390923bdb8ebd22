"""`Work`: what all windows of one server share: searches, answers, decisions, jobs, healed models.

Nothing here knows of the page. What is shown is asked of `unpoison.report`, what is done is done by the
command in a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import torch

from unpoison.app._case import Case
from unpoison.app._features import Features
from unpoison.app._inputs import InputSet, Upload, input_sets, read_upload
from unpoison.app._jobs import Job, Jobs
from unpoison.app._places import free, hashed_files, kept, short
from unpoison.app._searches import Beside, Healed, Search, list_beside, read_healed, read_search
from unpoison.app._shown import Named, Shown
from unpoison.data import TrainingSet
from unpoison.detectors import Findings
from unpoison.errors import InputError, UnpoisonError, one_line
from unpoison.evaluation import Results
from unpoison.report import (
    Answers,
    Decisions,
    Verdict,
    decided_findings,
    plain,
)

LOG = "decisions.jsonl"
_OF_THE_USERS_CODE = (UnpoisonError, RuntimeError, ValueError, TypeError)
"""What networks, transforms and datasets that are not ours raise, besides what is refused before."""
_SUFFIXES = {"list": "txt", "unflagged-list": "txt", "cyclonedx": "json", "markdown": "md", "folder": ""}


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
        self.training_set = case.training_set
        self.shown = Shown(case.training_set, case.words)
        self.names = self.training_set.class_names
        self.labels = self.training_set.labels.cpu().numpy()
        self.decisions = Decisions(case.out / LOG, self.training_set.fingerprint, len(self.training_set))
        self.jobs = Jobs(lambda: self.changed(), self._ended)
        self._named: dict[Path, str] = {}
        self.searches: list[Search] = []
        self.healed: list[Healed] = []
        self.inputs = input_sets(case)
        self.answers: dict[str, Answers] = {}
        self.uploads: list[Upload] = []
        self.features = Features(case, lambda: self.changed())
        self.trouble = ""
        self.version = secrets.token_hex(4)  # in addresses of images, so that no other case's are shown
        self._laying: asyncio.Task[None] | None = None
        for folder in case.runs:
            self.add(folder)
        self._adopt()

    @property
    def can_ask(self) -> bool:
        """Whether there is a model to ask, trace and heal."""
        return self.case.model is not None and not isinstance(self.training_set, Named)

    @property
    def can_link(self) -> bool:
        """Whether the training set is a folder of files, of which a folder of links can be made."""
        files = dict(pairwise(self.case.options)).get("--data")
        return self.training_set.ids is not None and files is not None and Path(files).is_dir()

    async def prepare(self) -> None:
        """Ask the model about the test inputs and lay out the map, in the background."""
        if not self.can_ask:
            return
        for one in self.inputs:
            with self._telling():
                self.answers[one.kind] = await asyncio.to_thread(self._answers, self.case.model, one)
        for path in sorted(self.case.out.glob("suspects/*")):
            with self._telling():
                found = await asyncio.to_thread(read_upload, self.case, path)
                self.uploads.append(replace(found, label=self._labelled(path)))
        with self._telling():
            await self._ask_healed()
        if self.case.index is not None or isinstance(self.training_set, TrainingSet):
            self.lay_out()

    def lay_out(self) -> None:
        """Begin to make the map, where that has not been begun: a pass over the set, if there is no index."""
        if self._laying is None and self.can_ask:
            self._laying = asyncio.get_running_loop().create_task(self._lay_out())

    async def close(self) -> None:
        """End what is done in the background."""
        self.features.closed = True
        await self.jobs.close()

    # --- what is known

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

    # --- what is decided and done

    def decide(self, examples: Any, verdict: Verdict) -> None:
        """Decide about examples, and tell all windows.

        Raises:
            InputError: the log cannot be written; nothing is decided then.
        """
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
        before, trouble = self.trouble, ""
        try:
            if new := self.decisions.refresh():
                self._adopt()
        except UnpoisonError as error:
            new, trouble = False, str(error)
        if trouble or before.startswith(str(self.decisions.path)):  # of this log; other trouble stays
            self.trouble = trouble
        return new or self.trouble != before

    def trace(self, suspect: str, method: str) -> Job:
        """Trace an answer in a process of its own, unless that is being done."""
        if (job := self.job_of(suspect)) is not None:
            return job
        self._check_can_ask()
        out = self._reserved("trace")
        words = ["trace", *self.case.options, "--suspect", suspect, "--method", method]
        true = next((one.label for one in self.uploads if str(one.path) == suspect), None)
        words += [] if true is None else ["--true", self._class_word(true)]
        words += [*self.case.tracing(method), "--out", str(out)]
        self.decisions.note("trace", suspect=suspect, method=method, out=out.name)
        return self.jobs.start(f"Trace of {short(suspect)}", words, out, suspect)

    def heal(self, method: str = "retrain", search: Search | None = None) -> Job:
        """Heal the model of the examples that are decided to be blamed, in a process of its own.

        Raises:
            InputError: none is.
        """
        self._check_can_ask()
        findings = self.decided(search)
        out = self._reserved("heal")
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
        suffix = _SUFFIXES.get(form, form)
        out = self._free("quarantine", suffix and f".{suffix}")
        place = self.case.out / f"decided-{out.stem}"
        findings.save(place)
        self.decisions.note("export", form=form, examples=len(findings.flagged), out=out.name)
        words = ["export", str(place), "--as", form, *hashed_files(self.case.options), "--out", str(out)]
        return self.jobs.start(f"Export of {len(findings.flagged):,} examples as {form}", words, out)

    def report(self, search: Search) -> Job:
        """Write the report of a search.

        Raises:
            InputError: it is of findings alone.
        """
        if not search.is_run:
            raise InputError(f"{search.folder}: a report is of a run directory, and these are findings alone")
        out = self._free("report", ".html")
        return self.jobs.start(
            f"Report of {search.name}", ["report", str(search.folder), "--out", str(out)], out
        )

    def decided(self, search: Search | None = None) -> Findings:
        """What is decided, as findings to save, heal by and export."""
        return decided_findings(
            self.decisions, self.training_set, None if search is None else search.findings
        )

    async def upload(self, name: str, content: bytes) -> Upload:
        """Take an image of the user's own in, and ask the model about it.

        Raises:
            InputError: it does not decode, or is no input of this model.
        """
        called = plain(name, limit=60) or "the image"
        suffix = Path(name).suffix if re.fullmatch(r"\.[A-Za-z0-9]{1,5}", Path(name).suffix) else ""
        place = self._free("suspects/suspect", suffix)
        try:
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(content)
            found = await asyncio.to_thread(read_upload, self.case, place)
            self.decisions.note("upload", name=called, out=place.name)
        except OSError as error:
            place.unlink(missing_ok=True)
            raise InputError(f"{place}: cannot be written ({error.strerror})") from None
        except _OF_THE_USERS_CODE as error:
            place.unlink(missing_ok=True)
            raise InputError(_told(error).replace(str(place), called)) from None
        self.uploads.append(found)
        self.changed()
        return found

    def label_upload(self, number: int, label: int | None) -> None:
        """Say which class an uploaded image is of; None where that is not known."""
        given = self.uploads[number]
        if label is not None and not 0 <= label < len(self.names):
            raise InputError(f"there is no class {label}")
        self.decisions.note("true class", out=given.path.name, label=label)
        self.uploads[number] = replace(given, label=label)
        self.changed()

    def add(self, folder: Path) -> None:
        """Take in the findings and the healed model of a run directory, whichever it has.

        Raises:
            InputError: they cannot be read, or are of another training set.
        """
        if folder.resolve() in self._named:
            return  # given on the command line, and kept by an earlier server as well
        name = folder.name
        if not name or name in self._named.values():
            name = str(folder.resolve())
        search = read_search(folder, name, self.training_set.fingerprint)
        device = torch.device("cpu") if isinstance(self.training_set, Named) else self.training_set.device
        healed = read_healed(folder, name, device)
        self._named[folder.resolve()] = name
        self.searches += [search] if search is not None else []
        self.healed += [healed] if healed is not None else []

    def has(self, folder: Path) -> bool:
        """Whether a run directory is worked on."""
        return folder.resolve() in self._named

    def beside(self) -> list[Beside]:
        """The runs and stores in the directory of the first one that is worked on."""
        return list_beside((self.case.runs[0] if self.case.runs else self.case.out).resolve().parent)

    def results(self, store: str, recipe: str) -> Results:
        """The results of a recipe in a store beside the runs.

        Raises:
            InputError: there is no such store or recipe.
        """
        found = next((one for one in self.beside() if one.folder.name == store), None)
        if found is None or recipe not in found.recipes:
            raise InputError(f"{store}: has no results of {recipe}")
        return Results.read(found.folder, recipe)

    # --- how it is done

    def _adopt(self) -> None:
        """Take in what is kept: by an earlier server, or by another one on the same directory."""
        for verb in ("trace", "heal"):
            for folder in kept(self.case.out, verb):
                self.add(folder)

    def _check_can_ask(self) -> None:
        if not self.can_ask:
            raise InputError("the model and its data are not known; give unpoison app --model and --data")

    def _labelled(self, upload: Path) -> int | None:
        """The class of an uploaded image, as the log has it."""
        said = [
            entry.facts.get("label")
            for entry in self.decisions.audit
            if entry.do == "note" and entry.what == "true class" and entry.facts.get("out") == upload.name
        ]
        label = said[-1] if said else None
        return label if isinstance(label, int) and 0 <= label < len(self.names) else None

    def _class_word(self, label: int) -> str:
        """A class on a command line: its number, but where that is the name of another one."""
        word = f"{label}"
        return word if word not in self.names or self.names[label] == word else self.names[label]

    def _answers(self, model: Any, given: InputSet) -> Answers:
        examples = given.shown.examples
        assert not isinstance(examples, Named)
        return Answers.of(model, examples)

    async def _lay_out(self) -> None:
        with self._telling():
            await asyncio.to_thread(self.features.read)

    @contextlib.contextmanager
    def _telling(self) -> Any:
        """What goes wrong in the background is shown, and does not end the server."""
        try:
            yield
        except (*_OF_THE_USERS_CODE, OSError) as error:
            self.trouble = _told(error)
        self.changed()

    def _free(self, what: str, suffix: str = "") -> Path:
        """A place that no job has had; that of a cancelled job is not used again."""
        return free(self.case.out, what, suffix, [job.out for job in self.jobs.all])

    def _reserved(self, what: str) -> Path:
        """A free place with an empty directory, which another server on the same work does not take."""
        while True:
            place = self._free(what)
            try:
                place.mkdir()
            except FileExistsError:
                continue
            except OSError as error:
                raise InputError(f"{place}: cannot be written ({error.strerror})") from None
            return place

    def _ended(self, job: Job) -> None:
        with contextlib.suppress(OSError):
            job.out.rmdir()  # the place of a job that left nothing
        with self._telling():
            if job.state == "done" and job.writes == "run":
                try:
                    self.add(job.out)
                except UnpoisonError as error:
                    job.state, job.message = "failed", str(error)
            self.decisions.note(
                f"{job.words[0]} {job.state}", out=job.out.name, seconds=round(job.seconds, 1)
            )
        if job.words[0] == "heal" and job.state == "done":
            self._asking = asyncio.get_running_loop().create_task(self._ask_healed())

    async def _ask_healed(self) -> None:
        for healed in self.healed:
            if healed.model is None or healed.answers:
                continue
            for one in self.inputs:
                healed.answers[one.kind] = await asyncio.to_thread(self._answers, healed.model, one)
        self.changed()


def _told(error: Exception) -> str:
    """What went wrong, on one line."""
    return str(error) if isinstance(error, UnpoisonError) else one_line(error)
