"""Image files that are decoded as they are read: the same bits as in memory, whatever holds the files."""

from __future__ import annotations

import csv
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from unpoison.data import DatasetExamples, ImageFiles, TrainingSet, load, load_examples, write_npz
from unpoison.data import _cache as cache_module
from unpoison.data import _load as load_module
from unpoison.errors import InputError

COUNT = 30


def picture(row: int) -> Image.Image:
    """One of many sizes; every third is grey, row 5 is a palette."""
    draws = np.random.default_rng(row)
    shape = (14 + row % 5, 12 + row % 7, 3)
    pixels = draws.integers(0, 256, shape[: 2 if row % 3 == 0 else 3], dtype=np.uint8)
    return Image.fromarray(pixels) if row != 5 else Image.fromarray(pixels).quantize(16)


def encoded(row: int) -> bytes:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6 if row % 4 == 1 else 1
    picture(row).save(stream, "PNG", exif=exif)
    return stream.getvalue()


def folder(root: Path) -> Path:
    for row in range(COUNT):
        place = root / "abc"[row % 3] / f"{row:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(row))
    return root


def splits(root: Path) -> Path:
    folder(root / "train")
    for row in range(6):  # grey ones alone
        place = root / "test" / "abc"[row % 3] / f"{row}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(3 * row))
    return root


def test_a_second_test_folder_is_passed_over_and_named(tmp_path: Path) -> None:
    splits(tmp_path)
    shutil.copytree(tmp_path / "test", tmp_path / "Val")
    read = load(tmp_path, size=8)
    assert read.test is not None
    assert read.test.name == str(tmp_path / "test")
    assert read.notes[1:] == (f"{tmp_path}: 'Val' passed over; 'test' is the test set",)


def manifest(root: Path) -> Path:
    folder(root / "files")
    with (root / "set.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "label"))
        rows.writerows((f"files/{'abc'[row % 3]}/{row:02}.png", "abc"[row % 3]) for row in range(COUNT))
    return root / "set.csv"


def parquet(root: Path) -> Path:
    folder(root)
    names = [f"{'abc'[row % 3]}/{row:02}.png" for row in range(COUNT)]
    pq.write_table(
        pa.table({"path": names, "label": [row % 3 for row in range(COUNT)]}), root / "set.parquet"
    )
    return root / "set.parquet"


def shards(root: Path) -> Path:
    root.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as archive:
            for row in range(shard, COUNT, 2):
                for ending, content in (("png", encoded(row)), ("cls", str(row % 3).encode())):
                    member = tarfile.TarInfo(f"{row:02}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return root


LAYOUTS = [folder, splits, manifest, parquet, shards]


@pytest.mark.parametrize("make", LAYOUTS)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_bits_are_read_lazily(tmp_path: Path, make: Callable[[Path], Path], workers: int) -> None:
    place = make(tmp_path / "set")
    held = load(place, size=8, orient=True)
    read = load_examples(place, size=8, orient=True, held_share=0, workers=workers)
    assert isinstance(read.train, DatasetExamples)
    assert held.notes == read.notes[:-1]
    for one, other in ((held.train, read.train), (held.test, read.test)):
        if one is None:
            assert other is None
            continue
        assert other is not None
        assert torch.equal(one.labels, other.labels)
        assert (one.class_names, one.name, one.input_shape) == (
            other.class_names,
            other.name,
            other.input_shape,
        )
        assert tuple(one.ids or ()) == tuple(other.ids or ())
        assert torch.equal(one.batch(0, COUNT)[0], torch.cat([inputs for inputs, *_ in other.in_batches(7)]))
    assert read.train.reading.rows >= COUNT


def test_grey_sets_stay_grey(tmp_path: Path) -> None:
    for row in range(0, 30, 3):
        place = tmp_path / "ab"[row % 2] / f"{row}.png"
        place.parent.mkdir(exist_ok=True)
        picture(row).save(place)
    held, read = load(tmp_path, size=8).train, load_examples(tmp_path, size=8, held_share=0).train
    assert held.input_shape == read.input_shape == (1, 8, 8)
    assert torch.equal(held.batch(0, 10)[0], read.batch(0, 10)[0])


def test_what_does_not_fit_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path)
    bytes_of_all = COUNT * 3 * 8 * 8
    monkeypatch.setattr(load_module, "allowed_memory", lambda: 4 * bytes_of_all)
    fits = load_examples(tmp_path, size=8)
    assert isinstance(fits.train, TrainingSet)
    assert fits.notes == load(tmp_path, size=8).notes
    assert torch.equal(fits.train.images, load(tmp_path, size=8).train.images)
    monkeypatch.setattr(load_module, "allowed_memory", lambda: 4 * bytes_of_all - 4)
    read = load_examples(tmp_path, size=8)
    assert isinstance(read.train, DatasetExamples)
    assert "more than 0.25 of what may be taken" in read.notes[-1]


def signed(image: Any) -> Tensor:
    """A transform: 6 pixels wide, values from -1 to 1."""
    assert image.mode == "RGB"
    pixels = np.array(image.resize((6, 6), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


@pytest.mark.parametrize("make", [folder, manifest, shards])
def test_a_transform_is_given_pictures_in_rgb(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    read = load_examples(make(tmp_path / "set"), transform=signed).train
    assert isinstance(read, DatasetExamples)
    for place, name in enumerate(read.ids or ()):
        row = int(Path(name).stem)
        expected = signed(Image.open(io.BytesIO(encoded(row))).convert("RGB"))
        assert torch.equal(read.at([place])[0][0], expected)


def test_a_transform_of_images_in_memory(tmp_path: Path) -> None:
    held = load(folder(tmp_path / "files"), size=8).train
    write_npz(tmp_path / "set.npz", held, held.subset([0, 1, 2]))
    read = load_examples(tmp_path / "set.npz", transform=signed)
    assert read.test is not None
    expected = torch.stack([signed(Image.fromarray(one.permute(1, 2, 0).numpy())) for one in held.images])
    assert torch.equal(read.train.batch(0, COUNT)[0], expected)
    assert torch.equal(read.test.batch(0, 3)[0], expected[:3])
    assert read.train.fingerprint.startswith("source:")


def test_transparency_is_dropped_by_a_transform_alone(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGBA", (6, 6), (10, 20, 30, 40)).save(tmp_path / name / "1.png")
    for size in (None, 4):
        with pytest.raises(InputError, match="alpha"):
            load_examples(tmp_path, held_share=0, size=size)
        with pytest.raises(InputError, match="alpha"):
            load(tmp_path, size=size)
    read = load_examples(tmp_path, transform=signed).train
    assert torch.equal(read.at([0])[0][0], signed(Image.new("RGB", (6, 6), (10, 20, 30))))


def refused(words: str, place: Path, **options: Any) -> None:
    def read() -> None:
        for _ in load_examples(place, **options).train.in_batches(8):
            pass

    with pytest.raises(InputError, match=words) as error:
        read()
    assert "\n" not in str(error.value)


def test_what_is_wrong_is_named_by_its_file(tmp_path: Path) -> None:
    folder(tmp_path)
    damaged = tmp_path / "b" / "13.png"

    def failing(image: Any) -> Tensor:
        if image.size == picture(13).size:
            raise ValueError("too\nwide")
        return signed(image)

    refused(r"b/\d\d.png: the transform failed \(ValueError: too wide\)", tmp_path, transform=failing)
    refused("leave out size", tmp_path, transform=signed, size=8)
    refused(r"must lie in \[0, 1\]", tmp_path, held_share=1.5)
    refused("12x14 pixels, but|but .*12x14", tmp_path, held_share=0)
    refused("changes when it is read again", tmp_path, transform=lambda image: torch.rand(3))
    damaged.write_bytes(damaged.read_bytes()[:60])
    for options in ({"held_share": 0, "size": 8}, {"transform": signed}, {"size": 8}):
        refused("b/13.png: does not decode", tmp_path, **options)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(damaged)
    refused("b/13.png: has 16 bits", tmp_path, transform=signed)
    damaged.unlink()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a" / "00.png", "00.png")
    refused("has no whole number as .cls", tmp_path / "a.tar", held_share=0)


def test_the_fingerprint_is_of_names_sizes_times_and_some_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "set")

    def of(place: Path | str = tmp_path / "set", **options: Any) -> str:
        return load_examples(place, size=8, held_share=0, **options).train.fingerprint

    first = of()
    assert first.startswith("files:")
    shutil.copytree(tmp_path / "set", tmp_path / "moved", copy_function=shutil.copy2)
    assert of(tmp_path / "moved") == first
    monkeypatch.chdir(tmp_path)
    assert of("set") == first
    assert of(orient=True) != first
    content = of(identity="content")
    assert content.startswith("content:")
    # One that is kept in memory, as small ones are with a transform, has the same.
    kept, not_kept = (
        load_examples(tmp_path / "set", transform=signed, held_share=share).train for share in (0.25, 0.0)
    )
    assert kept.fingerprint == not_kept.fingerprint
    kept.reading.rows = not_kept.reading.rows = 0
    assert torch.equal(kept.at(range(COUNT))[0], not_kept.at(range(COUNT))[0])
    assert (kept.reading.rows, not_kept.reading.rows) == (0, COUNT)
    os.utime(tmp_path / "set" / "b" / "13.png", (1, 1))
    assert of() != first
    assert of(identity="content") == content
    (tmp_path / "set" / "b" / "13.png").write_bytes(encoded(14))
    assert of(identity="content") != content


class Counted:
    """A transform that counts its calls."""

    calls = 0

    def __call__(self, image: Any) -> Any:
        type(self).calls += 1
        return signed(image)


def entry_of(cache: Path) -> Path:
    [entry] = cache.iterdir()
    return entry


def test_a_cache_is_read_in_place_of_the_files(tmp_path: Path) -> None:
    place, cache = folder(tmp_path / "set"), tmp_path / "cache"
    expected = load_examples(place, transform=signed).train.at(range(COUNT))[0]
    told: list[tuple[str, int, int]] = []
    load_examples(
        place, transform=signed, cache=cache, progress=lambda *stage, **_: told.append(stage), workers=2
    )
    assert told[-1] == ("caching", COUNT, COUNT)
    Counted.calls = 0
    read = load_examples(place, transform=Counted(), cache=cache).train
    assert Counted.calls <= 2 * COUNT + 1  # the rows that are always read twice
    before = Counted.calls
    assert torch.equal(torch.cat([one for one, *_ in read.in_batches(7)]), expected)
    order = torch.tensor([3, 4, 29, 0, 1, 1])
    assert torch.equal(read.at(order)[0], expected[order])
    part = read.subset([28, 2, 3])
    assert torch.equal(part.batch(0, 3)[0], expected[[28, 2, 3]])
    assert Counted.calls == before
    entry_of(cache)
    # Another transform, and changed files, are other entries.
    load_examples(place, transform=lambda image: -signed(image), cache=cache)
    assert len(list(cache.iterdir())) == 2
    os.utime(place / "a" / "00.png", (1, 1))
    load_examples(place, transform=signed, cache=cache)
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("name", ["0.bin", "sums.bin"])
def test_damaged_rows_of_a_cache_are_made_again(tmp_path: Path, name: str) -> None:
    place, cache = folder(tmp_path / "set"), tmp_path / "cache"
    expected = load_examples(place, transform=signed, cache=cache).train.at(range(COUNT))[0]
    file = entry_of(cache) / name
    good = file.read_bytes()
    content = bytearray(good)
    content[len(content) // 2] ^= 255
    content[-1] ^= 1
    file.write_bytes(content)
    read = load_examples(place, transform=signed, cache=cache).train
    assert torch.equal(read.at(range(COUNT))[0], expected)
    assert file.read_bytes() == good
    with file.open("r+b") as opened:  # cut short while it is in use
        opened.truncate(len(good) // 2)
    assert torch.equal(read.at(range(COUNT))[0], expected)
    shutil.rmtree(cache)
    assert torch.equal(read.at(range(COUNT))[0], expected)


def test_entries_that_are_not_whole_are_made_again(tmp_path: Path) -> None:
    place, cache = folder(tmp_path / "set"), tmp_path / "cache"
    expected = load_examples(place, transform=signed, cache=cache).train.at(range(COUNT))[0]
    for name, content in (("0.bin", b"short"), ("sums.bin", b""), ("entry.json", b"{"), ("entry.json", None)):
        file = entry_of(cache) / name
        good = file.read_bytes()
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        assert torch.equal(
            load_examples(place, transform=signed, cache=cache).train.at(range(COUNT))[0], expected
        )
        assert file.read_bytes() == good


def test_a_stopped_cache_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, cache = folder(tmp_path / "set"), tmp_path / "cache"

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_examples(place, transform=signed, cache=cache, progress=stop)
    assert not list(cache.iterdir())
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=5))
    refused(
        r"and 0.0 GB are free there; name a cache \(--cache\) on another disk",
        place,
        transform=signed,
        cache=cache,
    )
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    refused("is no folder", place, transform=signed, cache=tmp_path / "file")


def test_what_a_cache_cannot_tell_apart_is_refused(tmp_path: Path) -> None:
    rows = [(torch.zeros(3), row % 2) for row in range(6)]
    with pytest.raises(InputError, match="cannot be cached on disk: it names no files"):
        DatasetExamples(rows, cache=tmp_path)

    class Named(list[Any]):
        _fingerprint = "of Hugging Face"

    mappings = Named(
        ({"x": torch.full((2,), row), "y": torch.ones(1, dtype=torch.int64)}, row % 2) for row in range(6)
    )
    inputs, _ = DatasetExamples(mappings, cache=tmp_path).at([4, 5])
    assert isinstance(inputs, dict)
    assert inputs["x"].tolist() == [[4, 4], [5, 5]]
    assert inputs["y"].dtype == torch.int64
    with pytest.raises(InputError, match="collate_fn cannot be cached"):
        DatasetExamples(rows, cache=tmp_path, collate_fn=torch.utils.data.default_collate)


def test_files_are_a_dataset_of_their_own(tmp_path: Path) -> None:
    read = load_examples(folder(tmp_path), size=8, held_share=0).train
    assert isinstance(read, DatasetExamples)
    files = read.source.dataset
    assert isinstance(files, ImageFiles)
    assert len(files) == COUNT
    assert files.samples[0] == (tmp_path / "a" / "00.png", 0)
    image, label = files[1]
    assert (image.dtype, tuple(image.shape), label) == (torch.uint8, (3, 8, 8), 0)
    assert torch.equal(read.given("a file", files.read("a file", tmp_path / "a" / "03.png")), read.at([1])[0])
    with pytest.raises(InputError, match="a row: its input is of shape"):
        read.given("a row", torch.zeros(3, 4, 4, dtype=torch.uint8))
