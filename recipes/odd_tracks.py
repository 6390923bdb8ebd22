"""The half of the traffic signs that no setting of the calibrated detector was chosen on.

    python -m recipes.odd_tracks FOLDER

Reads `traffic-signs-train.parquet` and `traffic-signs-test.parquet` in the folder and writes
`traffic-signs-odd-train.parquet` and `traffic-signs-odd-test.parquet` beside them: every second track (all
frames of one sign; the first one is left out) and every second test image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for part in ("train", "test"):
        table = pq.read_table(folder / f"traffic-signs-{part}.parquet")
        names = [row["path"].rpartition("_")[0] or row["path"] for row in table["image"].to_pylist()]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        odd = pa.array([numbers[name] % 2 == 1 for name in names])
        pq.write_table(table.filter(odd), folder / f"traffic-signs-odd-{part}.parquet")


if __name__ == "__main__":
    main()
