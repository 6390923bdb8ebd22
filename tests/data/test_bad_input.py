"""Bad input gets one clear line that names the file and the row, and nothing is left half-written."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from unpoison.data import (
    TrainingSet,
    from_dataset,
    load,
    read_image,
    read_npz,
    read_pickle,
    write_npz,
    write_parquet,
)
from unpoison.errors import InputError


def refused(action: Callable[[], Any], *parts: str) -> None:
    """The action raises one line in which every part is found."""
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def png(size: tuple[int, int] = (4, 4), mode: str = "RGB", color: Any = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "PNG")
    return buffer.getvalue()


def class_folders(root: Path) -> Path:
    for name in ("cats", "dogs"):
        (root / name).mkdir(parents=True)
        for row in range(3):
            (root / name / f"{row}.png").write_bytes(png())
    return root


def sixteen_bit_colour() -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\1\2" * 12) * 4)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bomb() -> bytes:
    """A small file that claims 30,000 x 30,000 pixels."""
    content = bytearray(png())
    content[16:24] = struct.pack(">II", 30_000, 30_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def frames() -> bytes:
    buffer = io.BytesIO()
    first, second = Image.new("RGB", (4, 4), 0), Image.new("RGB", (4, 4), (9, 200, 30))
    first.save(buffer, "TIFF", save_all=True, append_images=[second])
    return buffer.getvalue()


IMAGES: dict[str, tuple[bytes, str]] = {
    "text": (b"hello, I am a text file", "is not an image"),
    "empty": (b"", "is empty"),
    "cut": (png((64, 64), color=(1, 2, 3))[:-40], "does not decode"),
    "size": (png((5, 4)), "is 5x4 pixels"),
    "16 bit grey": (png(mode="I;16"), "16 bits"),
    "16 bit colour": (sixteen_bit_colour(), "16 bits"),
    "alpha": (png(mode="RGBA", color=(1, 2, 3, 100)), "alpha"),
    "bomb": (bomb(), "pixels, too many"),
    "frames": (frames(), "several frames"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_in_folders_and_parquet(tmp_path: Path, kind: str) -> None:
    content, message = IMAGES[kind]
    bad = class_folders(tmp_path / "set") / "dogs" / "1.png"
    bad.write_bytes(content)
    refused(lambda: load(tmp_path / "set"), str(bad), message)
    if kind != "size":
        refused(lambda: read_image(bad), str(bad), message)
    rows = [png(), png(), content, png()]
    table = pa.table({"image": [{"bytes": row, "path": None} for row in rows], "label": [0, 1, 0, 1]})
    pq.write_table(table, tmp_path / "set.parquet")
    refused(lambda: load(tmp_path / "set.parquet"), str(tmp_path / "set.parquet"), "row 2", message)


def test_mixed_sizes_name_both_files_and_sizes(tmp_path: Path) -> None:
    class_folders(tmp_path)
    (tmp_path / "dogs" / "2.png").write_bytes(png((7, 9)))
    refused(lambda: load(tmp_path), "dogs/2.png", "7x9", "cats/0.png", "4x4")


def test_folders(tmp_path: Path) -> None:
    refused(lambda: load(tmp_path / "none"), "none", "no such file or folder")
    refused(lambda: load(tmp_path), str(tmp_path), "no class folders")
    (tmp_path / "cats").mkdir()
    refused(lambda: load(tmp_path), str(tmp_path), "at least two classes")
    (tmp_path / "dogs").mkdir()
    refused(lambda: load(tmp_path), "cats", "holds no images")
    class_folders(tmp_path / "more" / "train")
    class_folders(tmp_path / "more" / "test")
    (tmp_path / "more" / "test" / "birds").mkdir()
    refused(lambda: load(tmp_path / "more"), "birds", "no such class")
    (tmp_path / "more" / "birds").mkdir()
    refused(lambda: load(tmp_path / "more"), "'birds'", "keep class folders inside")
    (tmp_path / "notes.txt").write_text("hello")
    refused(lambda: load(tmp_path / "notes.txt"), "notes.txt", "format is not known")


def npz_case(**changes: Any) -> dict[str, Any]:
    arrays = {"images": np.zeros((4, 5, 6, 3), np.uint8), "labels": np.array([0, 1, 0, 1])}
    arrays.update(changes)
    return {name: array for name, array in arrays.items() if array is not None}


NAN = np.zeros((4, 5, 6, 3))
NAN[2, 1, 1, 1] = np.nan

ARCHIVES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no labels": (npz_case(labels=None), ("no array 'labels'",)),
    "nothing": ({"pictures": np.zeros(3)}, ("no arrays 'images'", "pictures")),
    "range": (
        npz_case(labels=np.array([0, 1, 5, 1]), class_names=np.array(["a", "b"])),
        ("row 2", "label 5"),
    ),
    "negative": (npz_case(labels=np.array([0, -1, 0, 1])), ("row 1", "label -1")),
    "one class": (npz_case(labels=np.zeros(4, int)), ("at least two classes",)),
    "nan": (npz_case(images=NAN), ("images", "row 2", "NaN")),
    "nan label": (npz_case(labels=np.array([0, np.nan, 1, 1])), ("labels", "row 1", "NaN")),
    "off grid": (npz_case(images=np.full((4, 5, 6, 3), 0.1234)), ("row 0", "multiples of 1/255")),
    "0..255 floats": (npz_case(images=np.full((4, 5, 6, 3), 17.0)), ("row 0", "outside [0, 1]")),
    "int images": (npz_case(images=np.zeros((4, 5, 6, 3), int)), ("uint8 or float", "int64")),
    "objects": (npz_case(labels=np.array([0, 1, "x", None], dtype=object)), ("labels", "never unpickled")),
    "one-hot": (npz_case(labels=np.eye(4, dtype=int)), ("labels", "one-hot")),
    "lengths": (npz_case(labels=np.array([0, 1])), ("4 images but 2 labels",)),
    "ambiguous": (npz_case(images=np.zeros((4, 3, 5, 3), np.uint8)), ("layout",)),
    "channels": (npz_case(images=np.zeros((4, 5, 6, 4), np.uint8)), ("layout",)),
    "half a test set": (npz_case(test_images=np.zeros((1, 5, 6, 3), np.uint8)), ("test_labels",)),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives(tmp_path: Path, kind: str) -> None:
    arrays, parts = ARCHIVES[kind]
    np.savez(tmp_path / "a.npz", **arrays)
    refused(lambda: load(tmp_path / "a.npz"), str(tmp_path / "a.npz"), *parts)


def test_archives_that_are_cut_or_cannot_be_mapped(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    refused(lambda: load(file), "no such file")
    np.savez_compressed(file, **npz_case())
    refused(lambda: read_npz(file, memory_map=True), str(file), "compress=False")
    file.write_bytes(file.read_bytes()[:200])
    refused(lambda: load(file), str(file), "cut short")


DAMAGES: dict[str, tuple[bytes, bytes]] = {
    "a brace is missing": (b"}", b" "),
    "a quote is missing": (b"'descr'", b" descr'"),
    "a name is another": (b"'shape'", b"'shake'"),
    "more dimensions than there is memory": (b"(4, 5, 6, 3)", b"(4, 5, 6, 9**20)"),
    "an unknown type": (b"'|u1'", b"'|y1'"),
    "no magic": (b"\x93NUMPY", b"\x93NUMBY"),
}


@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize("kind", DAMAGES)
def test_archives_with_a_damaged_header(tmp_path: Path, kind: str, memory_map: bool) -> None:
    np.savez(tmp_path / "whole.npz", **npz_case())
    before, after = DAMAGES[kind]
    with (
        zipfile.ZipFile(tmp_path / "whole.npz") as whole,
        zipfile.ZipFile(tmp_path / "a.npz", "w") as damaged,
    ):
        for name in whole.namelist():
            content = whole.read(name)
            if name == "images.npy":
                assert before in content
                content = content.replace(before, after.ljust(len(before)), 1)
            damaged.writestr(name, content)
    refused(lambda: read_npz(tmp_path / "a.npz", memory_map=memory_map), str(tmp_path / "a.npz"), "images")


def parquet(path: Path, **changes: Any) -> Path:
    columns: dict[str, Any] = {"image": [{"bytes": png(), "path": "x"}] * 4, "label": [0, 1, 0, 1]}
    columns.update(changes)
    pq.write_table(pa.table({name: values for name, values in columns.items() if values is not None}), path)
    return path


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"image": None}, ("no column 'image' or 'img'", "'label'")),
        ({"label": None}, ("no column 'label'", "'image'")),
        ({"label": [0, None, 1, 0]}, ("row 1", "has no label")),
        ({"label": [0, 1, -1, 0]}, ("row 2", "label -1")),
        ({"label": [0.0, float("nan"), 1.0, 0.0]}, ("row 1", "NaN")),
        ({"label": ["a", "b", "a", "b"]}, ("'label'", "whole numbers", "string")),
        ({"label": [0, 0, 0, 0]}, ("at least two classes",)),
        ({"image": [{"bytes": None, "path": "x.png"}] * 4}, ("row 0", "no image bytes")),
        ({"image": ["a", "b", "c", "d"]}, ("'image'", "binary")),
        ({"image": [], "label": []}, ("holds no rows",)),
    ],
)
def test_parquet(tmp_path: Path, changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    file = parquet(tmp_path / "a.parquet", **changes)
    refused(lambda: load(file), str(file), *parts)


def test_parquet_with_two_columns_of_one_name(tmp_path: Path) -> None:
    encoded = pa.array([png()] * 2)
    for names in (["image", "image", "label"], ["image", "label", "label"]):
        columns = [encoded if name == "image" else pa.array([0, 1]) for name in names]
        pq.write_table(pa.Table.from_arrays(columns, names=names), tmp_path / "a.parquet")
        refused(lambda: load(tmp_path / "a.parquet"), "a.parquet", f"several columns {names[1]!r}")


def test_a_folder_above_parquet_files_says_which_to_give(tmp_path: Path) -> None:
    (tmp_path / "plain_text").mkdir()
    parquet(tmp_path / "plain_text" / "train.parquet")
    refused(lambda: load(tmp_path), "holds parquet files", f"give {tmp_path / 'plain_text'}")
    (tmp_path / "raw").mkdir()
    refused(lambda: load(tmp_path), "holds parquet files", f"give {tmp_path / 'plain_text'}")


def test_parquet_cut_in_the_middle_or_absent(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refused(lambda: load(file), str(file), "cut short")
    damaged = bytearray(content)
    damaged[4:40] = bytes(36)
    file.write_bytes(bytes(damaged))
    refused(lambda: load(file), str(file))
    refused(lambda: load(tmp_path / "none.parquet"), "none.parquet", "no such file")
    refused(lambda: load(f"{tmp_path}/none-*.parquet"), "no file matches")


def test_a_label_beyond_the_names_is_found_in_the_right_file(tmp_path: Path) -> None:
    two = TrainingSet(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"))
    write_parquet(tmp_path / "x-0.parquet", two)
    table = pq.read_table(tmp_path / "x-0.parquet")
    wrong = table.set_column(1, table.schema.field("label"), pa.array([0, 7], pa.int64()))
    pq.write_table(wrong, tmp_path / "x-1.parquet")
    refused(lambda: load(tmp_path), "x-1.parquet", "row 1", "label 7", "0..1")


class Payload:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "code", "asked"),
    [(os.system, "touch {}", "system"), (eval, "open({!r}, 'w')", "eval"), (exec, "open({!r}, 'w')", "exec")],
)
def test_pickles_that_ask_for_more_than_arrays(
    tmp_path: Path, protocol: int, function: Callable[..., Any], code: str, asked: str
) -> None:
    proof = tmp_path / "proof"
    content = {b"data": Payload(function, code.format(str(proof))), b"labels": []}
    for name in ("data_batch_1", "batches.meta"):
        (tmp_path / name).write_bytes(pickle.dumps(content, protocol))
    refused(lambda: load(tmp_path), "batches.meta", asked, "do not trust")
    assert not proof.exists()


@pytest.mark.parametrize(
    "value",
    [
        np.array([1, "a"], dtype=object),
        np.zeros(2, dtype=[("a", "O")]),
        np.zeros(2, dtype=[("a", "i4")]),
        Payload(np.frombuffer, b"1234"),
        Payload(getattr, "a", "upper"),
    ],
)
def test_pickles_of_unusual_arrays(tmp_path: Path, value: Any) -> None:
    (tmp_path / "a").write_bytes(pickle.dumps(value, 2))
    refused(lambda: read_pickle(tmp_path / "a"), str(tmp_path / "a"))


def test_pickles_cannot_forge_types_or_change_what_they_are_handed(tmp_path: Path) -> None:
    file = tmp_path / "a"
    # An attempt to change, by attributes or by a state, what every later pickle would be handed.
    for build in (b"(N(dS'_call'\nI1\nstb.", b"(dS'_call'\nI1\nsb."):
        file.write_bytes(b"cnumpy\ndtype\n" + build)
        refused(lambda: read_pickle(file), str(file), "a change of what it imported")
    file.write_bytes(pickle.dumps(np.arange(6).reshape(2, 3), 2))
    assert np.asarray(read_pickle(file)).tolist() == [[0, 1, 2], [3, 4, 5]]
    file.write_bytes(pickle.dumps({"a": [np.float32(2.5), {1, 2}, np.array(["x", "yz"])]}, 2))
    read = read_pickle(file)
    assert read["a"][0] == 2.5
    assert read["a"][1] == {1, 2}
    assert read["a"][2].tolist() == ["x", "yz"]


def test_damaged_cifar_archives(tmp_path: Path) -> None:
    def put(name: str, content: Any) -> None:
        (tmp_path / name).write_bytes(pickle.dumps(content, 2))

    put("batches.meta", {"label_names": ["a", "b"]})
    put("data_batch_1", {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 7]})
    refused(lambda: load(tmp_path), "data_batch_2", "no such file")
    for number in range(2, 6):
        put(f"data_batch_{number}", {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]})
    refused(lambda: load(tmp_path), "data_batch_1", "row 1", "label 7")
    put("data_batch_1", {"data": np.zeros((2, 3072), np.uint8)})
    refused(lambda: load(tmp_path), "data_batch_1", "'labels'")
    put("data_batch_1", {"data": np.zeros((2, 30), np.uint8), "labels": [0, 1]})
    refused(lambda: load(tmp_path), "data_batch_1", "3072")
    content = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}, 2)
    (tmp_path / "data_batch_1").write_bytes(content[:1000])
    refused(lambda: load(tmp_path), "data_batch_1", "cut short")


class Pairs(list[Any]):
    pass


@pytest.mark.parametrize(
    ("items", "parts"),
    [
        ([], ("holds no examples",)),
        ([(torch.zeros(3, 4, 4), 0), (torch.full((3, 4, 4), float("nan")), 1)], ("row 1", "NaN")),
        ([(torch.zeros(3, 4, 4), 0), (torch.full((3, 4, 4), 0.1234), 1)], ("row 1", "multiples of 1/255")),
        ([(torch.zeros(3, 4, 4), 0), (torch.full((3, 4, 4), -1.7), 1)], ("row 1", "mean and std")),
        ([(torch.zeros(3, 4, 4), 0), (torch.zeros(3, 5, 4), 1)], ("row 1", "4x5", "4x4")),
        ([(torch.zeros(3, 4, 4), 0), (torch.zeros(3, 4, 4), -1)], ("row 1", "label -1")),
        ([(torch.zeros(3, 4, 4), 0), (torch.zeros(3, 4, 4), "cat")], ("row 1", "whole number", "cat")),
        ([(torch.zeros(3, 4, 4), 0), (torch.zeros(3, 4, 4), 1.5)], ("row 1", "whole number")),
        ([(torch.zeros(3, 4, 4), 0)], ("at least two classes",)),
        ([(torch.zeros(5, 4, 6), 0)], ("row 0", "shape")),
        ([("hello", 0)], ("row 0", "PIL image")),
        ([(torch.zeros(3, 4, 4, dtype=torch.bfloat16), 0)], ("row 0", "bfloat16")),
        ([torch.zeros(3, 4, 4)], ("row 0", "pair")),
    ],
)
def test_datasets(items: list[Any], parts: tuple[str, ...]) -> None:
    refused(lambda: from_dataset(Pairs(items)), "Pairs", *parts)


def test_datasets_that_augment_or_cannot_be_indexed() -> None:
    class Restless(Pairs):
        calls = 0

        def __getitem__(self, index: Any) -> Any:
            self.calls += 1
            return torch.full((3, 4, 4), self.calls % 2, dtype=torch.uint8), index

    refused(lambda: from_dataset(Restless([0, 1])), "Restless: row 0", "without random transforms")
    refused(lambda: from_dataset(iter([1])), "map-style")  # type: ignore[arg-type]
    refused(lambda: from_dataset(Pairs([(torch.zeros(3, 4, 4), 0)]), mean=(0.5,)), "mean and std")


def test_nothing_is_left_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = TrainingSet(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 0]), ("a", "b"))
    write_npz(tmp_path / "a.npz", made)
    write_parquet(tmp_path / "a.parquet", made)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unpoison.data._npz.npy_format.write_array", interrupted)
    monkeypatch.setattr("unpoison.data._parquet.encode_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_npz(tmp_path / "a.npz", made)
    with pytest.raises(KeyboardInterrupt):
        write_parquet(tmp_path / "a.parquet", made)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    refused(lambda: write_npz(tmp_path / "a.zip", made), "a.zip", ".npz")
    four = TrainingSet(torch.zeros(3, 4, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 0]), ("a", "b"))
    refused(lambda: write_parquet(tmp_path / "b.parquet", four), "4 channels")
