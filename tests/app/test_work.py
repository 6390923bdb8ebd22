"""What the page works on: sets that are not held, texts, an index, findings alone; and what goes wrong."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from unpoison import influence
from unpoison.app import Case, Listening, Named, listen
from unpoison.app._content import column_for, nearest_to, picture_for, text_for
from unpoison.app._jobs import Job, Jobs
from unpoison.app._shown import text_of
from unpoison.app._work import Work
from unpoison.cli import main
from unpoison.cli._main import parse
from unpoison.cli._options import Trace
from unpoison.detectors import Findings, Observation, Threshold
from unpoison.errors import InputError
from unpoison.runs import Recorder

pytest.importorskip("nicegui", reason="the extra app is not installed")

MODULE = """
import numpy as np
import torch
from torch import nn
from unpoison.data import DatasetExamples


def signed(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3), nn.ReLU(), nn.Linear(3, 3))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.words(input_ids).mean(1))


class Reviews:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        return {"text": f"review {row}", "input_ids": torch.tensor([row % 9, 3]), "label": row % 2}


def reviews():
    return tuple(DatasetExamples(Reviews(count), inputs="input_ids") for count in (20, 6))


def tokens():
    return [({"input_ids": torch.tensor([row % 9, 3, 0]), "attention_mask": torch.tensor([1, 1, 0])}, row % 2)
            for row in range(20)]
"""


Open = Callable[..., Work]
IMAGES = {"model": "appnets:network", "weights": "w.safetensors", "data": "photos", "test_data": "held out"}
TEXTS = {"model": "appnets:Words", "data": "appnets:reviews"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with folders of images, the module `appnets` and a run without findings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "appnets.py").write_text(MODULE)
    generator = torch.Generator().manual_seed(0)
    for part, count in (("photos", 8), ("held out", 3)):
        for label in range(3):
            folder = tmp_path / part / f"class {label}"
            folder.mkdir(parents=True)
            for row in range(count):
                pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{row}.png")
    weights = {"1.weight": torch.randn(3, 192, generator=generator), "1.bias": torch.zeros(3)}
    weights |= {"3.weight": torch.eye(3), "3.bias": torch.zeros(3)}
    save_file(weights, tmp_path / "w.safetensors")
    keep(tmp_path / "begun", "heal", {})
    return tmp_path


@pytest.fixture
def opened(here: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """What the command hands to the server, and what that makes of it; without the server."""
    cases: list[Case] = []

    def served(case: Case, at: Listening, **_: Any) -> None:
        cases.append(case)

    monkeypatch.setattr("unpoison.cli._app.serve", served)

    def call(*words: str, out: str = "work") -> Work:
        assert main(["app", *words, "--out", out]) == 0
        return Work(cases[-1])

    return call


def words_of(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def keep(folder: Path, verb: str, configuration: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    Recorder(verb, configuration, 0).record().save(folder)


def save_findings(folder: Path, work: Work) -> None:
    """Findings about the set of `work`, with its fourth example as the suspect."""
    scores = torch.linspace(0, 1, len(work.training_set)).double()
    inputs = work.shown.inputs(3)
    assert inputs is not None
    Findings(
        method="made up",
        configuration={},
        fingerprint=work.training_set.fingerprint,
        labels=torch.from_numpy(work.labels),
        class_names=work.names,
        scores=scores,
        flagged=scores.argsort(descending=True)[:4],
        threshold=Threshold(0.8, "made up", 0.05),
        poison_found=True,
        p_value=0.01,
        summary="made up",
        observation=Observation(inputs, 1, count=1),
        ids=None if work.training_set.ids is None else tuple(work.training_set.ids),
    ).save(folder)


def test_a_folder_behind_a_transform_is_asked_as_the_run_did(here: Path, opened: Open) -> None:
    read = {**IMAGES, "transform": "appnets:signed", "workers": 0}
    work = opened("begun", *words_of(read), "--task", "values=logits")
    asked = {"suspect": ["test:0"], "method": "delta-influence", "modules": ["3"], "reference": "held out"}
    asked |= {"option": ["level=0.1"], "task": ["values=logits"]}
    save_findings(here / "run" / "findings", work)
    keep(here / "run", "trace", {**read, **asked})
    work = opened("run/findings")
    assert work.case.method == "delta-influence"
    assert work.search_of("test:0") is work.searches[0]
    # What a job is given is read by the command as what the run was given.
    line = ["trace", *work.case.options, "--suspect", "test:1", "--method", "delta-influence"]
    line += [*work.case.tracing("delta-influence"), "--out", "x"]
    found = parse(line)
    assert isinstance(found, Trace)
    assert (found.model, found.data, found.test_data) == ("appnets:network", "photos", "held out")
    assert (found.reading.transform, found.reading.workers) == ("appnets:signed", 0)
    assert (found.architecture.weights, found.architecture.task) == (
        Path("w.safetensors"),
        ("values=logits",),
    )
    assert (found.tracing.modules, found.tracing.option) == (("3",), ("level=0.1",))
    assert found.tracing.reference == "held out"
    other = work.case.tracing("calibrated")
    assert "--modules" not in other
    assert "--reference" in other


def test_pictures_of_a_set_that_is_not_held(here: Path, opened: Open) -> None:
    work = opened("begun", *words_of({**IMAGES, "held_share": 0, "workers": 0}))
    save_findings(here / "run" / "findings", work)
    keep(here / "run", "trace", {})
    work.add(here / "run")
    file = here / "photos" / "class 0" / "5.png"
    exact = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    assert torch.equal(picture_for(work, "train", 5), exact)
    assert torch.equal(picture_for(work, "suspect", 0), picture_for(work, "train", 3))
    assert (picture_for(work, "difference", 3) == 128).all()
    assert picture_for(work, "train", 24) is None
    assert nearest_to(work, 0, "") is None  # the set is not read for it
    asyncio.run(work.prepare())
    assert set(work.answers) == {"test"}
    assert work.features.rows is None

    async def laid_out() -> None:
        work.lay_out()
        await work._laying

    asyncio.run(laid_out())
    plane = column_for(work, "plane")
    assert len(plane) == 24 * 2 * 4
    nearest, by = nearest_to(work, 0, "")
    assert by == "features of the model"
    assert nearest not in work.searches[0].data.flagged
    file.unlink()
    with pytest.raises(InputError, match=r"5\.png"):
        picture_for(work, "train", 5)


def test_an_upload_is_answered_or_refused_in_one_line(here: Path, opened: Open) -> None:
    work = opened("begun", *words_of(IMAGES))
    content = (here / "photos" / "class 1" / "2.png").read_bytes()
    found = asyncio.run(work.upload("../../<b>cat</b>.png", content))
    assert found.path == here / "work" / "suspects" / "suspect-1.png"
    assert found.path.read_bytes() == content
    assert torch.equal(picture_for(work, "upload", 0), picture_for(work, "train", 10))
    large = Image.new("RGB", (9, 9))
    large.save(here / "large.png")
    for name, data, reason in (
        ("a.png", b"", "is empty"),
        ("a.png", b"<svg/>", "not an image of a known kind"),
        ("a.png", content[:60], "does not decode"),
        ("a.png", (here / "large.png").read_bytes(), "9 pixels wide"),
    ):
        with pytest.raises(InputError, match=reason) as caught:
            asyncio.run(work.upload(name, data))
        assert "\n" not in str(caught.value)
        assert str(here) not in str(caught.value)

    def failing(path: Path) -> Any:
        raise RuntimeError(f"shapes\ndo not fit: {path}")

    work.case = replace(work.case, read_input=failing)
    with pytest.raises(InputError, match=r"^shapes do not fit: a\.png$"):
        asyncio.run(work.upload("a.png", content))
    assert [one.name for one in (here / "work" / "suspects").iterdir()] == ["suspect-1.png"]
    again = opened("begun", *words_of(IMAGES))
    asyncio.run(again.prepare())
    assert [one.path for one in again.uploads] == [found.path]
    # What class it is, is said afterwards, kept, and given to a trace.
    assert again.uploads[0].label is None
    with pytest.raises(InputError, match="no class 3"):
        again.label_upload(0, 3)
    again.label_upload(0, 2)
    again.label_upload(0, 1)
    later = opened("begun", *words_of(IMAGES))
    later.decisions.note("true class", out="suspect-1.png", label="of a forged line")
    assert later._labelled(found.path) is None
    later.decisions.note("true class", out="suspect-1.png", label=1)
    asyncio.run(later.prepare())
    assert later.uploads[0].label == 1
    job = started(later, lambda: later.trace(str(found.path), "calibrated"))
    asked = parse(list(job.words))
    assert isinstance(asked, Trace)
    assert (asked.tracing.true, asked.tracing.suspect) == ("1", (str(found.path),))


def started(work: Work, start: Callable[[], Job]) -> Job:
    """A job that is cancelled before it begins."""

    async def begin() -> Job:
        job = start()
        work.jobs.cancel(job)
        await work.jobs.close()
        return job

    return asyncio.run(begin())


def test_a_folder_of_links_and_the_rest_are_exported(here: Path, opened: Open) -> None:
    work = opened("begun", *words_of(IMAGES))
    assert work.can_link
    work.decide([3, 5], "blame")
    places = {}
    for form in ("folder", "unflagged-list"):
        job = started(work, lambda form=form: work.export(form))
        places[form] = job.out
        assert (job.writes, job.out.suffix) == (("folder", "") if form == "folder" else ("file", ".txt"))
        assert main(list(job.words)) == 0
    linked = sorted(str(one.relative_to(places["folder"])) for one in places["folder"].rglob("*.png"))
    assert linked == [work.name_of(3), work.name_of(5)]
    assert len(places["unflagged-list"].read_text().splitlines()) == 22


def test_texts_are_shown_as_texts(here: Path, opened: Open) -> None:
    shapes = {"words.weight": (9, 4), "head.weight": (2, 4), "head.bias": (2,)}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, "t.safetensors")
    work = opened("begun", *words_of({**TEXTS, "weights": "t.safetensors"}))
    assert work.shown.kind == "text"
    assert text_for(work, "train", 7) == "review 7"
    assert picture_for(work, "train", 7) is None
    asyncio.run(work.prepare())
    assert text_for(work, "test", 2) == "review 2"
    save_findings(here / "run" / "findings", work)
    keep(here / "run", "trace", {})
    work.add(here / "run")
    assert text_for(work, "suspect", 0) == "3 3"
    assert picture_for(work, "difference", 0) is None
    bare = opened(
        "begun", *words_of({**TEXTS, "data": "appnets:tokens", "weights": "t.safetensors"}), out="tokens"
    )

    assert text_for(bare, "train", 7) == "7 3"  # without the padding
    ids = {"input_ids": torch.tensor([[4, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    assert text_of(ids, lambda numbers: "-".join(map(str, numbers))) == "4-2"
    assert text_of({"pixels": torch.zeros(1, 2, 5)}, None) == "pixels [2, 5]"


def test_an_index_makes_the_map(here: Path, opened: Open) -> None:
    work = opened("begun", *words_of(IMAGES))
    influence.InfluenceIndex.build(here / "idx", work.case.model, work.case.training_set, numbers=8)
    keep(here / "idx", "index", {**IMAGES, "modules": ["no such"], "reference": "held out"})
    work = opened("idx")
    assert work.searches == []
    assert work.case.tracing("calibrated") == ("--reference", "held out", "--index", "idx")

    async def prepared() -> None:
        await work.prepare()
        await work._laying

    asyncio.run(prepared())
    rows = work.case.index._column("coordinates", None)
    values = torch.linalg.svdvals(rows - rows.mean(0))[:2]
    plane = work.features.rows[:, :2].double()
    torch.testing.assert_close(plane.norm(dim=0), values, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(plane.mean(0), torch.zeros(2).double(), atol=1e-4, rtol=0)


def test_findings_alone_can_be_decided_about(here: Path, opened: Open, capsys: Any) -> None:
    save_findings(here / "bare", opened("begun", *words_of(IMAGES)))
    shutil.rmtree(here / "work")
    work = opened("bare")
    assert isinstance(work.training_set, Named)
    assert not work.can_ask
    work.decide([3, 5], "blame")
    assert work.decided(work.searches[0]).flagged.tolist() == [5, 3]
    assert picture_for(work, "train", 3) is None
    for refused in (
        lambda: work.trace("test:0", "calibrated"),
        work.heal,
        lambda: work.report(work.searches[0]),
    ):
        with pytest.raises(InputError):
            refused()
    assert main(["app", "bare", "--data", "photos"]) == 2
    assert "give --model" in capsys.readouterr().err
    assert main(["app", "photos"]) == 2
    assert "run.json" in capsys.readouterr().err


def test_what_goes_wrong_while_it_is_worked_on(here: Path, opened: Open) -> None:
    words = words_of(IMAGES)
    work, other = opened("begun", *words), opened("begun", *words)
    # Two servers on one directory see each other's decisions and runs, and take no place twice.
    work.decide([1], "blame")
    assert other.refresh()
    assert other.decisions.decided("blame").tolist() == [1]
    first, second = work._reserved("trace"), other._reserved("trace")
    assert first != second
    save_findings(first / "findings", work)
    keep(first, "trace", {"suspect": ["test:1"]})
    work.decisions.note("trace done")
    assert other.refresh()
    assert other.search_of("test:1") is not None
    # A line that was damaged is passed over and counted.
    log = work.decisions.path
    with log.open("a") as file:
        file.write('{"at":"now","do":"decide","as":"blame","examples":[99]}\n{"at": tr\n')
    work.decide([2], "blame")
    assert work.decisions.damaged == 2
    assert work.decisions.decided("blame").tolist() == [1, 2]
    # The disk is full: nothing is decided, and the log is as it was.
    before = log.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be written"):
            work.decide([3, 4], "clear")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.read_bytes() == before
    assert work.decisions.codes[[3, 4]].tolist() == [0, 0]
    work.decide([3], "clear")
    assert work.decisions.codes[[3, 4]].tolist() == [2, 0]
    # The directory is deleted: it is said, nothing is decided, and nothing is made anew in its place.
    shutil.rmtree(here / "work")
    assert work.refresh()
    assert "No such file" in work.trouble
    with pytest.raises(InputError, match="cannot be written"):
        work.decide([5], "blame")
    with pytest.raises(InputError, match="cannot be written"):
        work.heal()
    assert not (here / "work").exists()


def test_a_job_that_is_ended_from_outside_says_so() -> None:
    ended: list[Job] = []

    async def killed() -> None:
        jobs = Jobs(lambda: None, ended.append)
        jobs.start("Help", ["trace", "--help"], Path("nowhere"))
        while jobs.all[0].process is None:
            await asyncio.sleep(0.01)
        os.kill(jobs.all[0].process.pid, signal.SIGKILL)
        while not ended:
            await asyncio.sleep(0.01)
        await jobs.close()

    asyncio.run(killed())
    assert ended[0].state == "failed"
    assert ended[0].message == "was ended from outside (signal 9), perhaps for want of memory"


def test_an_address_that_cannot_be_listened_on_is_refused_before_anything_is_read() -> None:
    at = listen()
    taken = at.socket.getsockname()[1]
    at.socket.listen()
    try:
        for host, port, reason in (
            ("127.0.0.1", taken, "Address already in use"),
            ("localhost", 70_000, "up to 65535"),
            ("LOCALHOST", taken, "Address already in use"),
            ("", 0, "is empty"),
        ):
            with pytest.raises(InputError, match=reason):
                listen(host, port)
        with pytest.raises(InputError, match="such-a-host"):
            listen("no-such-a-host.invalid", 0, "a-token-of-my-own")
    finally:
        at.socket.close()
    six = listen("[::1]")
    assert six.host == "::1"
    six.socket.close()
