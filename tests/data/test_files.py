"""Pictures as people have them: sizes, orientation, tables, shards, folders one level too high."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from unpoison.data import Preparation, load, read_image
from unpoison.errors import InputError


def save(path: Path, size: tuple[int, int] = (4, 4), color: int = 0, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (color, color, color)).save(path, **options)  # type: ignore[arg-type]


def test_the_shorter_side_is_resized_and_the_middle_cut_out() -> None:
    columns = np.arange(12, dtype=np.uint8).repeat(2) * 20  # 24 wide, pairs of equal columns
    picture = Image.fromarray(np.tile(columns, (8, 1)))
    found = read_image(picture, preparation=Preparation())
    assert tuple(found.shape) == (1, 8, 24)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    small = read_image(stream.getvalue(), preparation=Preparation(size=4))
    assert torch.equal(small, torch.from_numpy(np.tile(np.arange(4, 8, dtype=np.uint8) * 20, (4, 1)))[None])
    large = read_image(stream.getvalue(), preparation=Preparation(size=20))
    assert tuple(large.shape) == (1, 20, 20)
    with pytest.raises(InputError, match="at least 1 pixel"):
        Preparation(size=0)


def test_orientation_is_applied_when_asked(tmp_path: Path) -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    stored = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "a.png"), stored)
    turned = read_image(tmp_path / "a.png", preparation=Preparation(orient=True))
    assert torch.equal(turned, stored.rot90(-1, (1, 2)))


def test_what_is_passed_over_is_counted_and_named(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / name / "1.png")
    (tmp_path / "a" / "readme.txt").write_text("a")
    (tmp_path / "a" / "labels.json").write_text("{}")
    splits = load(tmp_path)
    assert splits.train.ids == ("a/1.png", "b/1.png")
    [note] = splits.notes
    assert "2 files passed over" in note
    assert "labels.json, readme.txt" in note


@pytest.mark.parametrize("names", [("Train", "TEST"), ("training", "testing"), ("train", "Valid")])
def test_splits_are_known_in_any_case(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        for label in "ab":
            save(tmp_path / name / label / "1.png")
    splits = load(tmp_path)
    assert splits.test is not None
    assert splits.train.class_names == splits.test.class_names == ("a", "b")
    assert splits.train.ids == ("a/1.png", "b/1.png")


def test_a_folder_one_level_too_high_is_refused(tmp_path: Path) -> None:
    for place in ("summer", "winter"):
        for label in ("cat", "dog", "fox"):
            save(tmp_path / "photos" / place / label / "1.png")
    with pytest.raises(InputError, match=r"look like splits one level above the classes; give .*summer"):
        load(tmp_path / "photos")
    # Parts of classes are no classes.
    for label in ("cat", "dog", "fox"):
        for part in range(4):
            save(tmp_path / "parts" / label / f"part{part}" / "1.png")
    assert load(tmp_path / "parts").train.class_names == ("cat", "dog", "fox")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_tables_of_paths_and_labels(tmp_path: Path, separator: str, mark: str) -> None:
    rows = [("file_name", "label"), ("b/2.png", "dog"), ("a/1.png", "cat"), ("a/3.png", "dog")]
    for place, (name, _) in enumerate(rows[1:]):
        save(tmp_path / name, color=place * 50)
    text = mark + "".join(f"{separator.join(row)}\r\n" for row in rows)
    (tmp_path / "set.csv").write_text(text, encoding="utf-8", newline="")
    train = load(tmp_path / "set.csv").train
    assert train.ids == ("b/2.png", "a/1.png", "a/3.png")
    assert train.class_names == ("cat", "dog")
    assert train.labels.tolist() == [1, 0, 1]
    assert train.images[:, 0, 0, 0].tolist() == [0, 50, 100]
    pq.write_table(pa.table({"path": ["b/2.png", "a/1.png"], "label": [0, 1]}), tmp_path / "set.parquet")
    assert load(tmp_path / "set.parquet").train.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,label\nmissing.png,a\nmissing.png,b\n", "no such file"),
        ("path,species\na.png,cat\n", "no column 'label'"),
        ("path,label\na.png\n", "line 2"),
        ("path,label\n", "no rows"),
        ("path,label\na.png,-1\na.png,0\n", "label"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, text: str, words: str) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "set.csv").write_text(text)
    with pytest.raises(InputError, match=words) as error:
        load(tmp_path / "set.csv")
    assert "\n" not in str(error.value)


def test_tar_shards(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as archive:
            for row in range(2):
                stream = io.BytesIO()
                Image.new("L", (3, 3), 10 * shard + row).save(stream, "PNG")
                label = b'{"label": 1}' if row else b"0"
                parts = {"png": stream.getvalue(), "json" if row else "cls": label}
                for ending, content in parts.items():
                    entry = tarfile.TarInfo(f"{shard}{row}.{ending}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    train = load(tmp_path).train
    assert train.ids == ("00", "01", "10", "11")
    assert train.labels.tolist() == [0, 1, 0, 1]
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 10, 11]
    (tmp_path / "train-0.tar").write_bytes(b"no tar")
    with pytest.raises(InputError, match=r"train-0\.tar: cannot be read as a tar file"):
        load(tmp_path)


def test_sizes_are_for_image_files() -> None:
    with pytest.raises(InputError, match="no folder or list of image files"):
        load("sample", size=16)
