"""The page in Chromium, by the keyboard: from a wrong answer to the quarantine and the healed model.

One server and one story for all tests, on a tiny data set whose names are hostile, with a detector from a
plug-in that waits for the test, so that a page can be loaded again in the middle of a trace.
"""

from __future__ import annotations

import csv
import http.client
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from PIL import Image

from chromium import BROWSER, FLAGS, MARKS
from legible import FAINT_TEXT, POINTS, SHAPES, reached_by_tabulator
from legible import MARKS as MARK_CONTRASTS
from trials import TRIAL
from unpoison.cli import main
from unpoison.detectors import Findings
from unpoison.evaluation import Results
from unpoison.evaluation._results import _KEYED

pytest.importorskip("nicegui", reason="the extra app is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

VIEWS = {"1": "Overview", "2": "Poison found", "3": "Map", "4": "Before", "5": "Runs", "6": "Log"}
pytestmark = [
    pytest.mark.timeout(900),  # a few seconds where the cores are free
    *MARKS,
]
OWNED = "document.title='owned'"
CLASSES = (f"<img src=stolen onerror={OWNED}>", f'"><svg onload={OWNED}>', "שלום")
PLUGIN = """
import dataclasses, time
from pathlib import Path
from unpoison.detectors import Detector, Findings, Threshold, register

@register(name="corner", title="White corners", summary="White corners.", paper="ours", cost="none",
          needs_observation=True, can_find_nothing=True)
@dataclasses.dataclass(frozen=True)
class CornerDetector(Detector):
    def find(self, model, training_set, observation=None, *, reference=None, seed=0, progress=None):
        while not Path("go").exists():  # the test lets it go on when it has seen what it wants to see
            progress("scores", 1, 20)
            time.sleep(0.05)
        images = training_set.images.cpu()
        white = (images[:, :, -3:, -3:] == 255).flatten(1).all(1)
        scores = (white & (training_set.labels.cpu() == observation.predicted)).double()
        flagged = scores.nonzero().reshape(-1)
        return Findings(method="corner", configuration={}, fingerprint=training_set.fingerprint,
                        labels=training_set.labels.cpu(), class_names=training_set.class_names,
                        scores=scores, flagged=flagged, threshold=Threshold(0.5, "given", 0.05),
                        poison_found=bool(len(flagged)), p_value=0.01, summary="<b>corners</b>",
                        observation=observation, ids=training_set.ids)
"""


def write_images(folder: Path, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            image = torch.randint(0, 60, (12, 12), generator=generator, dtype=torch.uint8)
            image[:, 4 * label : 4 * label + 4] += 120
            hostile = f"<img src=stolen onerror={OWNED}> {number:03}.png"
            Image.fromarray(image.numpy()).save(folder / name / hostile)


def write_store(place: Path) -> None:
    """A store of results with one trial, whose method has a hostile name."""
    row = {**TRIAL, "attack": f"badnets {OWNED}"}
    table = pa.Table.from_pylist([row], schema=_KEYED)
    (place / "recipes").mkdir(parents=True)
    manifest = {"rows": [row["key"]], "stages": [], "experiment": {}}
    (place / "recipes" / "made.json").write_text(json.dumps(manifest))
    Results("made", table, 1, (), place, {}).pack()


@dataclass
class Page:
    """A window, what it asked for, and what went wrong in it."""

    window: Any
    base: str
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.window.on("request", lambda request: self.requests.append(request.url))
        self.window.on("websocket", lambda socket: self.requests.append(socket.url))
        self.window.on("pageerror", lambda error: self.errors.append(str(error)))

    def press(self, *keys: str) -> None:
        for key in keys:
            self.window.keyboard.press(key)

    def tab_to(self, selector: str) -> None:
        """Press the tabulator until the element has the focus."""
        for _ in range(200):
            self.press("Tab")
            if self.window.evaluate("(s) => document.activeElement.matches(s)", selector):
                return
        raise AssertionError(f"the tabulator does not reach {selector}")

    def sees(self, selector: str, text: str, timeout: float = 120) -> None:
        playwright.expect(self.window.locator(selector)).to_contain_text(
            re.compile(text), timeout=1000 * timeout
        )

    def view(self, key: str, heading: str) -> None:
        self.press(key)
        self.sees("h1", heading)
        self.connected()

    def connected(self) -> None:
        self.window.wait_for_function("() => window.socket && window.socket.connected", timeout=150_000)


@dataclass
class Story:
    """A server, its run directories, and its first window."""

    folder: Path
    address: str
    page: Page
    context: Any
    server: int

    @property
    def out(self) -> Path:
        return self.folder / "model-investigation"

    @property
    def base(self) -> str:
        return self.address.partition("/?")[0]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("app")
    write_images(folder / "images", 60, 0)
    write_images(folder / "test", 20, 1)
    (folder / "corner_plugin.py").write_text(PLUGIN)
    data = ("--data", str(folder / "images"), "--test-data", str(folder / "test"))
    crafted = ("craft", "badnets", *data, "--source", "0", "--target", "2", "--budget-count", "20")
    assert main([*crafted, "--out", str(folder / "poison")]) == 0
    network = ("--model", "resnet9", "--width", "4", "--epochs", "4", "--poison", str(folder / "poison"))
    assert main(["train", *data, *network, "--out", str(folder / "model")]) == 0
    write_store(folder / "bench")
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    log = folder / "server.log"
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "unpoison", "app", str(folder / "model"), "--threads", "1"],
            env={**os.environ, "PYTHONPATH": paths, "UNPOISON_PLUGINS": "corner_plugin"},
            cwd=folder,
            stderr=said,
        )
    try:
        address = None
        while address is None and process.poll() is None:
            time.sleep(0.05)
            address = re.search(r"http\S+(?=\n)", log.read_text())
        assert address, log.read_text()
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=BROWSER,
                args=FLAGS,
            )
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            context.set_default_timeout(150_000)
            page = Page(context.new_page(), address.group(0).partition("/?")[0])
            page.window.goto(address.group(0))
            page.sees("h1", "Overview")
            page.connected()
            yield Story(folder, address.group(0), page, context, process.pid)
            browser.close()
    finally:
        process.terminate()
        process.wait(120)
    assert process.returncode == 0


def test_from_a_wrong_answer_to_the_healed_model_by_the_keyboard(story: Story) -> None:
    page = story.page
    page.sees("#content", "wrong answers, the traced")
    page.tab_to("select[name='Trace by']")
    page.press("c", "o", "r")
    page.tab_to("button[aria-label^='Trace triggered:']")
    page.press("Enter")
    page.sees(".status", "Trace of triggered:.*scores")
    page.window.reload()  # in the middle of the trace
    page.sees(".status", "Trace of triggered:.*scores, 1 of 20")
    (story.folder / "go").touch()
    page.sees(".tile .said.found", "poison found: p = 0.01 ≤ level 0.05")

    page.view("2", "Poison found: 20 of 180 training examples")
    page.sees("#current", "^1 of 180: .*flagged, undecided")
    page.sees("figcaption >> nth=1", r"Training example .*\d\d\d\.png: labelled")
    second = Page(story.context.new_page(), story.base)
    second.window.goto(f"{story.base}/investigation")
    second.connected()
    page.press("b", "b", "c", "u")
    page.sees("#counts", "Blamed 2, cleared 1, unsure 1, undecided 176")
    page.sees("#current", "^5 of 180: ")
    second.sees("#counts", "Blamed 2, cleared 1, unsure 1, undecided 176")
    second.press("z", "z")
    page.sees("#counts", "Blamed 2, cleared 0, unsure 0, undecided 178")
    page.press("y")
    second.sees("#counts", "Blamed 2, cleared 1, unsure 0, undecided 177")
    page.press("p", "p", "n")
    page.sees("#current", "^4 of 180: ")
    fourth = int(Findings.load(story.out / "trace-1" / "findings").flagged[3])
    page.window.wait_for_url(f"**&example={fourth}")
    page.window.reload()
    page.connected()
    page.sees("#current", "^4 of 180: ")
    page.press("z", "Shift+B")
    page.sees("#counts", "Blamed 20, cleared 0, unsure 0, undecided 160")
    assert page.window.locator(".tile.blame").count() == 20
    assert page.window.locator("#example").evaluate("(image) => image.naturalWidth") == 12

    page.press("e")
    page.sees(".results", r"Export of 20 examples as csv: done\.")
    text = (story.out / "quarantine-1.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == 180
    assert sum(row["flagged"] == "True" for row in rows) == 20
    page.press("h")
    page.sees(".results", r"Healing by retrain, 20 examples: done\.")
    healed = json.loads((story.out / "heal-1" / "run.json").read_text())["results"]
    assert healed["removed"] == 20

    page.view("4", "Before and after healing")
    page.sees("#content", "Attack success, before → after")
    page.sees("#content", "answers have changed")
    page.view("6", "Log")
    page.sees("#content", "unpoison heal --model")
    page.sees("#content", "blame: ")
    for name in ("decisions.jsonl", "quarantine-1.csv"):  # what she takes away
        kept = page.window.evaluate("(name) => fetch(`/file/${name}`).then((answer) => answer.text())", name)
        assert kept == (story.out / name).read_bytes().decode()
    second.window.close()
    assert not page.errors + second.errors


def test_a_lasso_is_undone(story: Story) -> None:
    page = story.page
    page.view("3", "Map of the training examples")
    page.sees(".map", "180 points, none selected")
    before = (story.out / "decisions.jsonl").read_text()
    box = page.window.locator("canvas").first.bounding_box()
    left, top = box["x"] + 3, box["y"] + 3
    right, bottom = left + box["width"] - 6, top + box["height"] - 6
    page.window.mouse.move(left, top)
    page.window.mouse.down()
    for x, y in ((right, top), (right, bottom), (left, bottom)):
        page.window.mouse.move(x, y)
    page.window.mouse.up()
    page.sees(".map", "180 of 180 points are selected")
    page.press("c")
    page.sees("#counts", "Blamed 0, cleared 180")
    page.press("z")
    page.sees("#counts", "Blamed 20, cleared 0")
    page.window.locator("canvas").first.focus()
    page.press("Escape")
    page.sees(".map", "none selected")
    page.press("+", "ArrowLeft", "v", "u")
    page.sees(".map", "points are selected")
    page.sees("#counts", "unsure [1-9]")
    page.press("z")
    page.sees("#counts", "Blamed 20, cleared 0, unsure 0")
    page.press("0", "v", "d", "z", "v", "c")  # quickly, and in this order
    page.sees("#counts", "Blamed 0, cleared 180")
    done = [json.loads(line)["do"] for line in (story.out / "decisions.jsonl").read_text().splitlines()[-3:]]
    assert done == ["decide", "undo", "decide"]
    page.press("z")
    page.sees("#counts", "Blamed 20, cleared 0")
    assert (story.out / "decisions.jsonl").read_text().startswith(before)


def test_a_trace_is_cancelled(story: Story) -> None:
    page = story.page
    (story.folder / "go").unlink(missing_ok=True)
    page.view("1", "Overview")
    page.tab_to("select[name='Trace by']")
    page.press("c", "o", "r")
    page.tab_to("button[aria-label^='Trace triggered:']")
    page.press("Enter")
    page.sees(".status", "Trace of triggered:.*scores")
    page.window.locator("#cancel").focus()
    page.press("Enter")
    page.sees(".status", "Trace of .*: cancelled")
    assert not [one for one in story.out.iterdir() if "trace-2" in one.name]


def test_a_trace_that_is_killed_from_outside_says_so(story: Story) -> None:
    page = story.page
    page.tab_to("button[aria-label^='Trace triggered:']")
    page.press("Enter")
    page.sees(".status", "Trace of triggered:.*scores")
    [child] = Path(f"/proc/{story.server}/task/{story.server}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    page.sees(".status", "failed – was ended from outside .signal 9.")


def test_what_the_disk_does_not_take_is_not_decided(story: Story) -> None:
    page, log = story.page, story.out / "decisions.jsonl"
    page.view("2", "Poison found")
    page.sees("#counts", "Blamed 20, cleared 0, unsure 0")
    before = log.read_bytes()
    unlimited = resource.prlimit(
        story.server, resource.RLIMIT_FSIZE, (len(before) + 5, resource.RLIM_INFINITY)
    )
    try:
        page.press("u")
        page.sees("#alert", "decisions.jsonl: cannot be written")
        page.sees("#counts", "Blamed 20, cleared 0, unsure 0")
        assert log.read_bytes() == before
    finally:
        resource.prlimit(story.server, resource.RLIMIT_FSIZE, unlimited)
    page.press("u")
    page.sees("#counts", "Blamed 19, cleared 0, unsure 1")
    assert page.window.locator("#alert").text_content() == ""
    page.press("z")
    page.sees("#counts", "Blamed 20, cleared 0, unsure 0")


def test_an_image_of_ones_own_is_answered_and_what_is_none_is_refused(story: Story) -> None:
    page = story.page
    page.view("1", "Overview")
    suspect = story.folder / "test" / CLASSES[0]
    page.window.set_input_files("#upload", next(suspect.iterdir()))
    page.sees("#own ~ .grid .tile", "suspect-1.png, confidence")
    assert (
        page.window.locator("#own ~ .grid img").evaluate(
            "(image) => image.decode().then(() => image.naturalWidth)"
        )
        == 12
    )
    page.window.select_option("#own ~ .grid select", "1")
    page.sees("#own ~ .grid .truth", re.escape(CLASSES[0]))  # the second by its folder
    drop = """([text, size]) => {
      const data = new DataTransfer();
      data.items.add(new File([text.padEnd(size)], "<b>notes</b>.png"));
      const drop = { dataTransfer: data, bubbles: true, cancelable: true };
      document.body.dispatchEvent(new DragEvent("drop", drop));
    }"""
    for text, size, reason in (
        ("no image", 0, "not an image of a known kind"),
        ("", 17 << 20, "larger than 16 MiB"),
    ):
        page.window.evaluate(drop, [text, size])
        page.sees("#refused", f"^<b>notes</b>.png: is {reason}")
    assert len(list((story.out / "suspects").iterdir())) == 1


def test_runs_and_leaderboards_beside(story: Story) -> None:
    page = story.page
    page.view("5", "Runs")
    page.sees("#beside ~ div", "model.*train.*clean accuracy")
    page.sees("#searches ~ div", "trace-1")
    page.sees("#boards ~ div table", re.escape(f"badnets {OWNED}"))
    page.sees("#boards ~ div table", "80.0 %")
    page.window.get_by_text("All columns, plots and trials").click()
    page.sees("h1", "made")
    page.window.go_back()
    page.sees("h1", "Runs")
    page.connected()


def test_every_view_is_legible_and_by_the_keyboard(story: Story) -> None:
    page = story.page
    marks: dict[str, float] = {}
    for key, heading in VIEWS.items():
        page.view(key, heading)
        if key == "2":  # one of each
            page.press("c", "u", "p", "p")
            page.sees("#counts", "Blamed 18, cleared 1, unsure 1")
        if key == "3":
            page.sees(".map", "none selected")
            assert page.window.evaluate(POINTS) >= 3
            page.window.select_option("select", "decision")
            page.sees(".legend", "unsure")
            shapes = page.window.evaluate(SHAPES)
            assert all(shapes)
            assert len(set(shapes)) == 3
        seen, faint = page.window.evaluate(FAINT_TEXT)
        assert seen > 10
        assert not faint, heading
        marks |= page.window.evaluate(MARK_CONTRASTS)
        assert reached_by_tabulator(page.window) == ([], []), heading
    assert {
        f"{what} {word}" for what in ("mark", "legend") for word in ("blamed", "cleared", "unsure")
    } < set(marks)
    assert min(marks.values()) >= 3, marks
    page.view("2", "Poison found")
    page.press("z", "z")
    page.sees("#counts", "Blamed 20, cleared 0, unsure 0")


def test_names_from_data_are_text_and_nothing_is_asked_of_others(story: Story) -> None:
    page = story.page
    page.window.set_viewport_size({"width": 400, "height": 900})
    for key, heading in VIEWS.items():
        page.view(key, heading)
        assert "owned" not in page.window.title()
        assert (
            page.window.locator("#content img[src='stolen'], #content svg[onload], #content b").count() == 0
        )
        width = page.window.evaluate("() => document.documentElement.scrollWidth")
        assert width <= 400, heading
    page.window.set_viewport_size({"width": 1280, "height": 900})
    page.view("2", "Poison found")
    page.sees("#current", re.escape(f"<img src=stolen onerror={OWNED}>"))
    hosts = {
        re.sub(r"^(http|ws)://", "", url).partition("/")[0] for url in page.requests if url[:4] != "data"
    }
    assert hosts == {story.base.removeprefix("http://")}
    assert not [url for url in page.requests if "stolen" in url.partition("?")[0]]
    assert not page.errors


def test_without_the_token_the_server_gives_nothing(story: Story) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    upgrade |= {"Sec-WebSocket-Key": "x3JJHMbDL1EzLkh9GBhXDw==", "Origin": story.base}
    for path, headers in (
        ("/", {}),
        ("/?token=wrong", {}),
        ("/image/train/0.png", {}),
        ("/static/app.css", {}),
        ("/column/label", {}),
        ("/leaderboard/bench/made", {}),
        ("/_nicegui_ws/socket.io/?EIO=4&transport=polling", {}),
        ("/_nicegui_ws/socket.io/?EIO=4&transport=websocket", upgrade),
    ):
        connection = http.client.HTTPConnection(story.base.removeprefix("http://"), timeout=30)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        assert answer.status == 403, path
        assert len(answer.read()) < 100
        assert answer.getheader("set-cookie") is None
        connection.close()
