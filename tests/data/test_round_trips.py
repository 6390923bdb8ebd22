"""What is written is what is read, in every format."""

from __future__ import annotations

import io
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unpoison.data import (
    Splits,
    TrainingSet,
    as_training_set,
    encode_png,
    from_dataset,
    load,
    read_cifar,
    read_folder,
    read_image,
    read_npz,
    read_parquet,
    sample,
    write_npz,
    write_parquet,
)
from unpoison.errors import InputError

NAMES = st.text(st.characters(exclude_categories=("C",)), min_size=1, max_size=8)


def random_set(
    seed: int, n: int = 6, channels: int = 3, height: int = 5, width: int = 4, classes: int = 3
) -> TrainingSet:
    generator = torch.Generator().manual_seed(seed)
    return TrainingSet(
        torch.randint(0, 256, (n, channels, height, width), generator=generator, dtype=torch.uint8),
        torch.randint(0, classes, (n,), generator=generator),
        tuple(f"class {number} ∂é猫" for number in range(classes)),
    )


@st.composite
def training_sets(draw: st.DrawFn) -> TrainingSet:
    names = draw(st.lists(NAMES, min_size=2, max_size=5, unique=True))
    made = random_set(
        draw(st.integers(0, 999)),
        draw(st.integers(1, 6)),
        draw(st.sampled_from([1, 3])),
        draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
        len(names),
    )
    return TrainingSet(made.images, made.labels, tuple(names))


@settings(max_examples=20, deadline=None)
@given(training_sets(), st.booleans())
def test_npz_and_parquet(training_set: TrainingSet, compress: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_npz(Path(folder, "a.npz"), training_set, training_set, compress=compress)
        splits = load(Path(folder, "a.npz"))
        assert splits.test is not None
        assert splits.train.fingerprint == splits.test.fingerprint == training_set.fingerprint
        if not compress:
            mapped = read_npz(Path(folder, "a.npz"), memory_map=True)
            assert mapped.train.fingerprint == training_set.fingerprint
            del mapped
        write_parquet(Path(folder, "a.parquet"), training_set)
        assert load(Path(folder, "a.parquet")).train.fingerprint == training_set.fingerprint


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        write_npz(tmp_path / name, random_set(1))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_foreign_npz_layouts_and_types(tmp_path: Path, layout: str, dtype: type) -> None:
    made = random_set(2, channels=1 if layout == "NHW" else 3)
    array = made.images.numpy()
    array = {"NHWC": array.transpose(0, 2, 3, 1), "NCHW": array, "NHW": array[:, 0]}[layout]
    if dtype != np.uint8:
        array = (array / 255).astype(dtype)
    labels = made.labels.numpy()[:, None].astype(np.uint8)  # as in the archives of keras
    np.savez(tmp_path / "a.npz", x_train=array, y_train=labels, x_test=array[:2], y_test=labels[:2])
    splits = read_npz(tmp_path / "a.npz")
    assert torch.equal(splits.train.images, made.images)
    assert splits.test is not None
    assert torch.equal(splits.test.labels, made.labels[:2])
    assert splits.train.class_names == tuple(map(str, range(int(made.labels.max()) + 1)))


def test_memory_map_reads_and_never_writes_the_file(tmp_path: Path) -> None:
    made = random_set(3)
    write_npz(tmp_path / "a.npz", made, compress=False)
    before = (tmp_path / "a.npz").read_bytes()
    mapped = read_npz(tmp_path / "a.npz", memory_map=True).train
    changed = mapped.with_examples([1], made.images[:1], made.labels[:1])
    mapped.images[0] = 0
    assert torch.equal(changed.images[1], made.images[0])
    assert (tmp_path / "a.npz").read_bytes() == before
    assert torch.equal(mapped.subset([2]).images, made.images[2:3])
    assert mapped.batch(2, 4)[0].shape == (2, 3, 5, 4)


def save_folder(root: Path, training_set: TrainingSet, suffix: str = ".png") -> None:
    for row, (image, label) in enumerate(zip(training_set.images, training_set.labels, strict=True)):
        place = root / training_set.class_names[int(label)] / "deeper"
        place.mkdir(parents=True, exist_ok=True)
        pixels = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
        extra = {"lossless": True} if suffix == ".webp" else {}
        Image.fromarray(pixels).save(place / f"{row:04}{suffix}", **extra)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".tiff", ".PNG"])
def test_folders(tmp_path: Path, channels: int, suffix: str) -> None:
    made = random_set(4, n=12, channels=channels)
    order = torch.argsort(made.labels, stable=True)
    save_folder(tmp_path / "train", made, suffix)
    save_folder(tmp_path / "test", made.subset([0, 1]), suffix)
    first = next((tmp_path / "train").iterdir())
    for name in (".DS_Store", "notes.txt", "Thumbs.db", ".hidden.png"):
        (first / name).write_bytes(b"not an image")
    splits = load(tmp_path)
    assert splits.train.class_names == made.class_names
    assert torch.equal(splits.train.labels, made.labels[order])
    grey_webp = suffix == ".webp" and channels == 1  # WebP knows only colour
    expected = made.images[order].expand(-1, 3, -1, -1) if grey_webp else made.images[order]
    assert torch.equal(splits.train.images, expected)
    assert splits.test is not None
    assert len(splits.test) == 2
    assert read_folder(tmp_path / "train").train.fingerprint == splits.train.fingerprint


def test_grey_among_coloured_becomes_coloured(tmp_path: Path) -> None:
    for name, mode in (("a", "L"), ("b", "RGB")):
        (tmp_path / name).mkdir()
        Image.new(mode, (3, 2), 77 if mode == "L" else (1, 2, 3)).save(tmp_path / name / "x.png")
    images = load(tmp_path).train.images
    assert images.tolist() == [[[[77] * 3] * 2] * 3, [[[v] * 3] * 2 for v in (1, 2, 3)]]


@pytest.mark.parametrize("mode", ["1", "P", "RGBA", "LA"])
def test_modes_that_convert_without_loss(tmp_path: Path, mode: str) -> None:
    grey = mode in ("1", "LA")
    base = Image.new("L", (4, 3), 255) if grey else Image.new("RGB", (4, 3), (10, 20, 30))
    (base.quantize(4) if mode == "P" else base.convert(mode)).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png")
    assert image.shape == ((1 if grey else 3), 3, 4)
    assert image[:, 0, 0].tolist() == ([255] if grey else [10, 20, 30])


def cifar_ten(folder: Path, protocol: int) -> TrainingSet:
    folder.mkdir(parents=True, exist_ok=True)
    made = random_set(5, n=12, height=32, width=32, classes=10)
    flat = made.images.reshape(12, 3072).numpy()
    for number in range(6):
        rows = slice(2 * number, 2 * number + 2)
        content = {
            b"data": flat[rows],
            b"labels": made.labels[rows].tolist(),
            b"batch_label": b"a",
            b"filenames": [b"x"],
        }
        name = "test_batch" if number == 5 else f"data_batch_{number + 1}"
        (folder / name).write_bytes(pickle.dumps(content, protocol))
    meta = {b"label_names": [name.encode() for name in made.class_names], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol))
    return made


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_cifar_10(tmp_path: Path, protocol: int) -> None:
    made = cifar_ten(tmp_path / "cifar-10-batches-py", protocol)
    splits = load(tmp_path)
    assert splits.test is not None
    assert splits.train.fingerprint == made.subset(range(10)).fingerprint
    assert splits.test.fingerprint == made.subset([10, 11]).fingerprint


def test_cifar_100(tmp_path: Path) -> None:
    made = random_set(6, n=4, height=32, width=32, classes=5)
    flat = np.asfortranarray(made.images.reshape(4, 3072).numpy())
    for name in ("train", "test"):
        content = {"data": flat, "fine_labels": made.labels.tolist(), "coarse_labels": [0] * 4}
        (tmp_path / name).write_bytes(pickle.dumps(content, 2))
    (tmp_path / "meta").write_bytes(pickle.dumps({"fine_label_names": list(made.class_names)}, 2))
    assert read_cifar(tmp_path).train.fingerprint == made.fingerprint


def test_several_parquet_files_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    made = random_set(7, n=24)
    for number in range(11):
        write_parquet(tmp_path / f"x-train-{number}.parquet", made.subset([2 * number, 2 * number + 1]))
    write_parquet(tmp_path / "x-test.parquet", made.subset([22, 23]))
    for spec in (tmp_path, f"{tmp_path}/x-*.parquet"):
        splits = load(spec)
        assert splits.test is not None
        assert splits.train.fingerprint == made.subset(range(22)).fingerprint
        assert splits.test.fingerprint == made.subset([22, 23]).fingerprint
    alone = load(tmp_path / "x-train-0.parquet", test=tmp_path / "x-test.parquet")
    assert alone.test is not None
    assert len(alone.train) == len(alone.test) == 2
    assert len(read_parquet(sorted(tmp_path.glob("x-train-*.parquet"))).train) == 22


def test_other_parquet_layouts(tmp_path: Path) -> None:
    import pyarrow as pa

    made = random_set(8)
    write_parquet(tmp_path / "a.parquet", made)
    table = pq.read_table(tmp_path / "a.parquet")
    plain = pa.table(
        {"img": table["image"].combine_chunks().field("bytes"), "fine_label": table["label"].cast(pa.int8())}
    )
    pq.write_table(plain, tmp_path / "b.parquet")
    other = load(tmp_path / "b.parquet").train
    assert torch.equal(other.images, made.images)
    assert torch.equal(other.labels, made.labels)
    assert other.class_names == ("0", "1", "2")


class Pairs:
    def __init__(self, items: list[tuple[object, object]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[object, object]:
        return self.items[index]


MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@pytest.mark.parametrize("kind", ["pil", "tensor", "hwc", "float", "half", "normalised"])
def test_datasets(kind: str) -> None:
    made = random_set(9, height=3, width=3)  # as high as there are channels: the ambiguous case
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    convert = {
        "pil": lambda image: Image.fromarray(image.permute(1, 2, 0).numpy()),
        "tensor": lambda image: image,
        "hwc": lambda image: image.permute(1, 2, 0).numpy(),
        "float": lambda image: image.float() / 255,
        "half": lambda image: (image.float() / 255).half(),
        "normalised": lambda image: (image.float() / 255 - mean) / std,
    }[kind]
    labels = made.labels.tolist()
    pairs = Pairs([(convert(image), label) for image, label in zip(made.images, labels, strict=True)])
    options = {"mean": MEAN, "std": STD} if kind == "normalised" else {}
    read = from_dataset(pairs, class_names=made.class_names, **options)
    assert read.fingerprint == made.fingerprint


def test_as_training_set_passes_training_sets_through() -> None:
    made = random_set(10)
    assert as_training_set(made) is made
    assert torch.equal(
        as_training_set(torch.utils.data.TensorDataset(made.images, made.labels)).images, made.images
    )


def test_a_dataset_of_one_class_or_another_test_set_is_refused() -> None:
    made = random_set(11)
    with pytest.raises(InputError, match="same classes"):
        Splits(made, TrainingSet(made.images, made.labels, ("x", "y", "z")))
    with pytest.raises(InputError, match="have shape"):
        Splits(made, TrainingSet(made.images[:, :1], made.labels, made.class_names))


def test_the_sample() -> None:
    from unpoison.data import _sample

    splits = sample()
    assert splits.test is not None
    assert splits.train.image_shape == (1, 28, 28)
    assert splits.train.class_counts().tolist() == [500] * 10
    assert splits.test.class_counts().tolist() == [100] * 10
    assert splits.train.fingerprint == "bb1ce7e817de0f3260bf3d935cf6715a"
    assert splits.test.fingerprint == "5d7b76eabdecdbea2f74c216a46cd850"
    file = Path(_sample.__file__).with_name("fashion_mnist_sample.npz")
    assert file.stat().st_size <= 4_000_000
    assert "Zalando SE" in file.with_name("FASHION_MNIST_LICENSE.txt").read_text()


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "RGBA", "LA"])
def test_an_opened_image_is_read_like_its_file(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6))
    image = grey.convert("RGB").convert(mode) if mode == "P" else grey.convert(mode)
    image.save(tmp_path / "a.png")
    found = read_image(image)
    assert torch.equal(found, read_image(tmp_path / "a.png"))
    with Image.open(tmp_path / "a.png") as opened:
        assert torch.equal(read_image(opened), found)
    if mode not in ("1", "P"):  # these round
        assert torch.equal(found[0], torch.from_numpy(np.array(grey)))


def test_a_palette_is_not_taken_for_grey_levels() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 200, 200, 10, 20, 30])
    image.putdata([0, 1])
    assert read_image(image).flatten(1).T.tolist() == [[200, 200, 200], [10, 20, 30]]


def test_sixteen_bits_are_refused_of_an_opened_image_too() -> None:
    with pytest.raises(InputError, match="16 bits a channel"):
        read_image(Image.fromarray(np.array([[100, 30000]], np.uint16)))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_pixel(channels: int) -> None:
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    for level in (1, 6):
        with Image.open(io.BytesIO(encode_png(image, compress_level=level))) as opened:
            assert torch.equal(read_image(opened), image)
    with pytest.raises(InputError, match="2 channels"):
        encode_png(torch.zeros(2, 4, 4, dtype=torch.uint8))
