"""Write docs/images/report.png and report_head.png from the page of the demo.

    make demo && python scripts/screenshots.py

Needs chromium on the PATH.
"""

from __future__ import annotations

import io
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT, HEAD = 1200, 6000, 950


def screenshot(page: Path) -> Image.Image:
    """The whole page, cut where its content ends."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += ["--hide-scrollbars", f"--user-data-dir={folder}/profile", f"--screenshot={shot}"]
        flags += [f"--window-size={WIDTH},{HEIGHT}"]
        subprocess.run(["chromium", *flags, page.as_uri()], check=True, capture_output=True)
        image = Image.open(io.BytesIO(shot.read_bytes())).convert("RGB")
    rows = np.flatnonzero((np.asarray(image) != 255).any(axis=(1, 2)))
    return image.crop((0, 0, WIDTH, int(rows.max()) + 30))


if __name__ == "__main__":
    image = screenshot(ROOT / "demo" / "report.html")
    for name, shown in {"report": image, "report_head": image.crop((0, 30, WIDTH, HEAD))}.items():
        shown.quantize(256).save(ROOT / "docs" / "images" / f"{name}.png", optimize=True)
