"""Write the images of docs/app.md and of the report, and measure the page on a large set.

    make demo && python docs/app_screens.py pictures demo      # docs/images/app_*.png
    python docs/app_screens.py report demo                     # docs/images/report.png and report_head.png
    python docs/app_screens.py speed                           # benchmarks/results/app.json

Needs the extra `app`, playwright, and chromium on the PATH.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[1]
EXAMPLES, LASSO, MANY, REPEATS = 50_000, 10_000, 1_000_000, 3
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]


@contextlib.contextmanager
def server(*arguments: str) -> Iterator[str]:
    """The address of a server that is started by these arguments of Python."""
    process = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"http\S+", line):
                yield found[0]
                return
        raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def window(address: str, width: int = 1280, height: int = 900) -> Iterator[Any]:
    """A window of a browser, let in by the token."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(300_000)
        page.goto(address)
        page.wait_for_selector("h1")
        yield page
        browser.close()


def pictures(run: Path) -> None:
    """The four views, of the run directory of a demo; its decisions are made anew."""
    with tempfile.TemporaryDirectory() as folder:
        command = ("-m", "unpoison", "app", str(run), "--out", f"{folder}/work")
        with server(*command) as address, window(address, 1200, 860) as page:
            base = address.partition("/?")[0]
            page.wait_for_selector(".tile .said.found")
            shoot(page, "app_overview")
            page.goto(f"{base}/investigation")
            page.wait_for_selector(".tile img")
            page.wait_for_function(CONNECTED)
            for key in "bbbcu":
                page.keyboard.press(key)
            page.wait_for_function("document.querySelector('#current').textContent.startsWith('6 of')")
            page.wait_for_function(
                "/Nearest/.test([...document.querySelectorAll('figcaption')].at(3).textContent)"
            )
            shoot(page, "app_investigation")
            page.goto(f"{base}/map")
            page.wait_for_function(LOADED)
            page.wait_for_function(CONNECTED)
            box = page.locator("canvas").first.bounding_box()
            at = [(0.5, 0.66), (0.6, 0.62), (0.6, 0.9), (0.48, 0.9), (0.47, 0.7)]
            points = [(box["x"] + a * box["width"], box["y"] + b * box["height"]) for a, b in at]
            page.mouse.move(*points[0])
            page.mouse.down()
            for point in points[1:]:
                page.mouse.move(*point, steps=4)
            page.mouse.up()
            page.wait_for_selector("a.tile img")
            shoot(page, "app_map")
            page.goto(f"{base}/compare")
            page.wait_for_selector(".tile img")
            shoot(page, "app_compare")


CONNECTED = "() => window.socket && window.socket.connected"
DRAWN = """() => [...document.images].every((one) =>
  one.getBoundingClientRect().top > innerHeight || (one.complete && one.naturalWidth))"""


def report(run: Path) -> None:
    """The page of a run directory, the whole of it and its beginning."""
    with window((run / "report.html").resolve().as_uri(), 1200, 950) as page:
        shoot(page, "report", full_page=True)
        shoot(page, "report_head", clip={"x": 0, "y": 30, "width": 1200, "height": 920})


def shoot(page: Any, name: str, **part: Any) -> None:
    """What is in view, or another part of the page, in 256 colours."""
    page.evaluate("document.activeElement.blur()")
    page.wait_for_function(DRAWN)
    page.wait_for_timeout(500)
    image = Image.open(io.BytesIO(page.screenshot(**part))).convert("RGB")
    image.quantize(256).save(ROOT / "docs" / "images" / f"{name}.png", optimize=True)


def large() -> None:
    """Serve a made-up case of `EXAMPLES` images of 32 pixels, until it is stopped."""
    import torch

    from unpoison.app import Case, listen, serve
    from unpoison.data import TrainingSet
    from unpoison.detectors import Findings, Observation, Threshold
    from unpoison.models import build
    from unpoison.runs import Recorder

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (EXAMPLES, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(EXAMPLES) % 10
    training_set = TrainingSet(images, labels, tuple(f"class {label}" for label in range(10)), "made up")
    scores = torch.randn(EXAMPLES, generator=generator).double()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "trace"
        run.mkdir()
        Findings(
            method="made up",
            configuration={},
            fingerprint=training_set.fingerprint,
            labels=labels,
            class_names=training_set.class_names,
            scores=scores,
            flagged=scores.argsort(descending=True)[:500],
            threshold=Threshold(2.3, "made up", 0.01),
            poison_found=True,
            p_value=0.005,
            summary="made up",
            observation=Observation(images[0], 1),
        ).save(run / "findings")
        Recorder("trace", {"suspect": ["test:0"]}, 0).record().save(run)
        case = Case(
            model=build("convnet-bn", num_classes=10, seed=0, width=8).eval(),
            training_set=training_set,
            test_set=training_set.subset(torch.arange(2_000)),
            poison=None,
            runs=(run,),
            out=Path(folder) / "work",
        )
        with contextlib.suppress(KeyboardInterrupt):
            serve(case, listen(), ready=lambda address: print(address, file=sys.stderr, flush=True))


def speed() -> dict[str, Any]:
    """Seconds and frames a second, with `EXAMPLES` examples; the best of the repeats."""
    seconds: dict[str, float] = {}
    with server(__file__, "large") as address, window(address) as page:
        base = address.partition("/?")[0]
        page.goto(f"{base}/map")
        page.wait_for_function(LOADED)  # the server has read the set, and the browser has started
        found = page.evaluate(SCRIPT, {"lasso": LASSO, "many": MANY, "repeats": REPEATS})
        print(found, file=sys.stderr)
        for name, path, ready in (
            ("overview", "/", "() => document.querySelectorAll('#wrong ~ .grid .tile').length == 48"),
            (
                "investigation",
                "/investigation",
                "() => document.querySelectorAll('.grid .tile').length == 48",
            ),
            ("map", "/map", LOADED),
        ):
            seconds[f"first view: {name}"] = min(opened(page, base + path, ready) for _ in range(REPEATS))
            print(seconds, file=sys.stderr)
        page.goto(f"{base}/investigation")
        page.wait_for_selector(".grid .tile:nth-child(48)")
        page.wait_for_function(CONNECTED)
        turns = []
        for number in range(1, 2 * REPEATS):
            start = time.perf_counter()
            page.keyboard.press("]")
            page.wait_for_function(TURNED, arg=f"{48 * number + 1:,} to", polling=5)
            turns.append(time.perf_counter() - start)
        seconds["next page of 48, until its images are there"] = min(turns)
    assert abs(found["selected"] - LASSO) < 200, found
    seconds["lasso_10k"] = found["lasso"] / 1000
    seconds["decision on 10k, until it is on the disk"] = found["decide"] / 1000
    seconds["first_view"] = max(value for name, value in seconds.items() if name.startswith("first view"))
    frames = {f"{int(n):,} points": rate for n, rate in found["frames"].items()}
    frames["300 frames on end of the largest number"] = found["sustained"]
    return {"seconds": seconds, "frames": frames}


LOADED = "() => /none selected/.test(document.querySelector('.map p')?.textContent)"
TURNED = """(text) => document.querySelector(".controls .quiet").textContent.startsWith(text)
  && [...document.querySelectorAll(".grid img")].every((one) => one.complete)"""
SCRIPT = """async ({ lasso, many, repeats }) => {
  const p = map.columns.plane, x = [];
  for (let i = 0; i < p.length; i += 2) x.push(p[i]);
  x.sort((a, b) => a - b);
  const edge = map.view.x + x[lasso] * map.view.scale, h = map.$refs.canvas.height;
  const times = [], saved = [];
  for (let i = 0; i < 2 * repeats; i++) {
    map.select([[0, 0], [edge, 0], [edge, h], [0, h]]);
    times.push(map.times.lasso);
    await map.decide("blame");
    saved.push(map.times.decide);
  }
  const selected = map.selected;
  map.clear();
  const best = async () => {
    let most = 0;
    for (let i = 0; i < 2 * repeats; i++) most = Math.max(most, await map.measure(10));
    return most;
  };
  const frames = { [p.length / 2]: await best() };
  const old = map.colours;
  for (let n = many; n > p.length / 2; n /= 2) {  // the largest number that is panned smoothly
    const plane = new Float32Array(2 * n);
    for (let i = 0; i < 2 * n; i++) plane[i] = p[i % p.length] * (1 + 0.2 * Math.random());
    map.columns.plane = plane;
    map.colours = Uint32Array.from({ length: n }, (_, i) => old[i % old.length]);
    frames[n] = await best();
    if (frames[n] >= 20) break;
  }
  const sustained = await map.measure(300);  // of as many, without a pause
  return { lasso: Math.min(...times), decide: Math.min(...saved), selected, frames, sustained };
}"""


def opened(page: Any, address: str, ready: str) -> float:
    """Seconds from asking for a view until it is there."""
    start = time.perf_counter()
    page.goto(address, wait_until="commit")
    page.wait_for_function(ready, polling=5)
    return time.perf_counter() - start


def keep(found: dict[str, Any], load: float) -> None:
    """Store the record where those of the benchmarks are."""
    sys.path.insert(0, str(ROOT))
    from benchmarks._harness import provenance

    origin = {**provenance("app", 1), "command": "python docs/app_screens.py speed"}
    origin["machine"] = {**origin["machine"], "load": load}
    record = {"ratios": {}, "agreement": {}, "peak_bytes": {}, "rates": {}, **found, **origin}
    text = json.dumps(record, indent=1) + "\n"
    print(text)
    (ROOT / "benchmarks" / "results" / "app.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("pictures", "report", "speed", "large"))
    parser.add_argument("run", type=Path, nargs="?", default=ROOT / "demo")
    arguments = parser.parse_args()
    if arguments.what == "pictures":
        pictures(arguments.run)
    elif arguments.what == "report":
        report(arguments.run)
    elif arguments.what == "large":
        large()
    else:
        load = os.getloadavg()[0]
        keep(speed(), load)
