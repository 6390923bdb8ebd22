"""Kinds of dataset that people have, at tiny sizes, and what is expected of each verb."""

from __future__ import annotations

import csv
import io
import itertools
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from compat_harness import EIGHT_BITS, ONLY_IMAGES, Case, Kind, Refused, Works, table
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset, random_split

from unpoison import data
from unpoison.data import TrainingSet

DATASETS: Final[list[Kind]] = []
kind = table(DATASETS)
COUNT, CLASSES, SIZE = 48, 3, 8
NAMES: Final = ("cat", "dog", "fox")
LAZILY: Final = {"held_share": 0.0}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
NOT_MAP_STYLE: Final = Refused("map-style")


# The material: pictures, labels and networks.


def pictures(channels: int = 3, size: int = SIZE, count: int = COUNT) -> Tensor:
    """UInt8[n c h w], each class a little brighter than the one before."""
    randomness = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 190, (count, channels, size, size), generator=randomness)
    return (noise + 30 * (torch.arange(count) % CLASSES)[:, None, None, None]).to(torch.uint8)


def labels_of(count: int = COUNT) -> Tensor:
    """Int64[n]: 0, 1, 2, 0, ..."""
    return torch.arange(count) % CLASSES


def pil(image: Tensor) -> Image.Image:
    """A picture of UInt8[c h w]."""
    return Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).contiguous().numpy())


def convolution(channels: int = 3, classes: int = CLASSES) -> nn.Module:
    """A small network for pictures of any size."""
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(54, classes),
    ).eval()


class Rows:
    """A map-style dataset of a function of the index."""

    def __init__(self, row: Callable[[int], Any], count: int = COUNT, **attributes: Any) -> None:
        self.row, self.count = row, count
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        index = int(index)
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.row(index)


def of_pictures(
    open: Callable[[Tensor, Tensor], Any],
    *,
    channels: int = 3,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    classes: int = CLASSES,
    **more: Any,
) -> Case:
    """A case whose inputs are 8-bit pictures, which `open(images, labels)` gives in the user's way."""
    images = pictures(channels) if images is None else images
    labels = labels_of(len(images)) if labels is None else labels
    query = images[2].flip(-1) if len(images) > 2 else images[:1][0]
    names = tuple(str(label) for label in range(max(classes, 2)))
    floats, query_inputs = images.float() / 255, query[None].float() / 255
    more = {"query": query, "query_inputs": (query_inputs,), "inputs": (floats,), **more}
    return Case(
        open=lambda: open(images, labels),
        model=convolution(images.shape[1], classes),
        fresh=lambda: convolution(images.shape[1], classes),
        labels=labels,
        classes=classes,
        training_set=TrainingSet(images, labels, names),
        **more,
    )


def of_values(
    inputs: Tensor | tuple[Tensor, ...],
    model: nn.Module,
    open: Callable[..., Any] | None = None,
    *,
    query: Any = None,
    **more: Any,
) -> Case:
    """A case whose inputs are no 8-bit pictures; rows are pairs unless `open(inputs, labels)` says else."""
    parts = inputs if isinstance(inputs, tuple) else (inputs,)
    labels = labels_of(len(parts[0]))
    query_inputs = tuple(part[2:3].flip(-1) for part in parts)

    def pairs(values: Any, labels: Tensor) -> Any:
        return Rows(lambda index: (values[index], int(labels[index])), len(labels))

    return Case(
        open=lambda: (open or pairs)(inputs, labels),
        model=model.eval(),
        query=query_inputs[0][0] if query is None else query,
        inputs=parts,
        labels=labels,
        query_inputs=query_inputs,
        **more,
    )


# Map-style datasets of pictures.


@kind("list of (uint8 tensor, int)")
def uint8_pairs(folder: Path) -> Case:
    return of_pictures(lambda x, y: [(x[i], int(y[i])) for i in range(len(y))])


@kind("(float tensor in [0, 1], int), as `ToTensor` gives")
def float_pairs(folder: Path) -> Case:
    return of_pictures(lambda x, y: Rows(lambda i: (x[i].float() / 255, int(y[i]))))


@kind("(PIL image, int)")
def pil_pairs(folder: Path) -> Case:
    return of_pictures(
        lambda x, y: Rows(lambda i: (pil(x[i]), int(y[i])), classes=list(NAMES)), class_names=NAMES
    )


@kind("(numpy array [h w c], int)")
def numpy_pairs(folder: Path) -> Case:
    return of_pictures(lambda x, y: Rows(lambda i: (x[i].permute(1, 2, 0).numpy(), int(y[i]))))


@kind("(grey numpy array [h w], numpy.int64)")
def grey_numpy(folder: Path) -> Case:
    return of_pictures(lambda x, y: Rows(lambda i: (x[i, 0].numpy(), np.int64(y[i]))), channels=1)


@kind("TensorDataset of floats")
def tensor_dataset(folder: Path) -> Case:
    return of_pictures(lambda x, y: TensorDataset(x.float() / 255, y))


@kind("float64 images")
def doubles(folder: Path) -> Case:
    return of_pictures(lambda x, y: Rows(lambda i: (x[i].double() / 255, int(y[i]))))


@kind("bfloat16 images", variations=(Works(0.1), EIGHT_BITS), retrain=(Works(), EIGHT_BITS))
def bfloat16_images(folder: Path) -> Case:
    inputs = (pictures().float() / 255).bfloat16()
    return of_values(inputs.float(), convolution(), lambda x, y: Rows(lambda i: (inputs[i], int(y[i]))))


@kind("int64 pixels in 0..255", every=(Works(), Refused("uint8|integer|int64")))
def integer_pixels(folder: Path) -> Case:
    return of_pictures(lambda x, y: Rows(lambda i: (x[i].long(), int(y[i]))))


@kind("views: negative strides, requires_grad, channels last")
def odd_views(folder: Path) -> Case:
    def row(x: Tensor, y: Tensor, i: int) -> Any:
        if i % 3 == 0:
            return np.ascontiguousarray(x[i].permute(1, 2, 0).numpy()[::-1])[::-1], int(y[i])
        if i % 3 == 1:
            return (x[i].float() / 255).requires_grad_(), int(y[i])
        return x[i : i + 1].contiguous(memory_format=torch.channels_last)[0], int(y[i])

    return of_pictures(lambda x, y: Rows(lambda i: row(x, y, i)))


@kind("standardised floats, with `normalization`")
def standardised_told(folder: Path) -> Case:
    mean, std = (torch.tensor(part)[:, None, None] for part in (MEAN, STD))
    images = pictures()
    z = (images.float() / 255 - mean) / std
    query = images[2].flip(-1)
    return of_pictures(
        lambda x, y: Rows(lambda i: (z[i], int(y[i]))),
        images=images,
        query=query,
        inputs=(z,),
        query_inputs=(((query.float() / 255 - mean) / std)[None],),
        arguments={"normalization": (MEAN, STD)},
    )


@kind("standardised floats as they are", retrain=EIGHT_BITS, variations=(Works(), EIGHT_BITS))
def standardised(folder: Path) -> Case:
    mean, std = (torch.tensor(part)[:, None, None] for part in (MEAN, STD))
    return of_values((pictures().float() / 255 - mean) / std, convolution())


@kind("float images off the 8-bit grid (resized)", retrain=EIGHT_BITS, variations=(Works(), EIGHT_BITS))
def off_the_grid(folder: Path) -> Case:
    small = nn.functional.interpolate(pictures().float() / 255, 6, mode="bilinear")
    return of_values(small, convolution())


@kind("float images in 0..255", retrain=(Works(), EIGHT_BITS), variations=(Works(), EIGHT_BITS))
def float_255(folder: Path) -> Case:
    return of_values(pictures().float(), convolution())


# Rows of other shapes.


@kind('dict {"image": PIL, "label": int}')
def dict_rows(folder: Path) -> Case:
    return of_pictures(lambda x, y: Rows(lambda i: {"image": pil(x[i]), "label": int(y[i])}))


@kind('dict {"pixel_values": tensor, "labels": int}, as Hugging Face\'s processors give')
def pixel_values(folder: Path) -> Case:
    return of_pictures(lambda x, y: Rows(lambda i: {"pixel_values": x[i].float() / 255, "labels": int(y[i])}))


@kind("dict with keys of its own, not told", every=Refused("photo"))
def odd_keys(folder: Path) -> Case:
    return of_pictures(lambda x, y: Rows(lambda i: {"photo": x[i], "species": int(y[i])}))


@kind('dict with keys of its own, told: inputs="photo", labels="species"')
def odd_keys_told(folder: Path) -> Case:
    return of_pictures(
        lambda x, y: Rows(lambda i: {"photo": x[i], "species": int(y[i])}),
        options={"inputs": "photo", "labels": "species"},
    )


@kind("(image, label, index)")
def triples(folder: Path) -> Case:
    return of_pictures(lambda x, y: Rows(lambda i: (x[i], int(y[i]), i)))


@kind("(index, image, label), told: inputs=1, labels=2")
def index_first(folder: Path) -> Case:
    return of_pictures(lambda x, y: Rows(lambda i: (i, x[i], int(y[i]))), options={"inputs": 1, "labels": 2})


@kind("(image, label, path): the path names the example")
def with_paths(folder: Path) -> Case:
    names = [f"photos/{i}.png" for i in range(COUNT)]
    return of_pictures(
        lambda x, y: Rows(lambda i: (x[i], int(y[i]), names[i])),
        options={"ids": 2},
        ids=names,
    )


@kind("two arrays (images, labels)")
def two_arrays(folder: Path) -> Case:
    return of_pictures(lambda x, y: (x.numpy(), y.numpy()))


@kind("mapping of columns", every=(Works(), Refused("map-style|mapping|column")))
def columns(folder: Path) -> Case:
    return of_pictures(lambda x, y: {"image": x.numpy(), "label": y.numpy()})


@kind("labels of their own: labels=tensor")
def given_labels(folder: Path) -> Case:
    return of_pictures(lambda x, y: Rows(lambda i: x[i]), options={"labels": labels_of()})


# Hugging Face.


def hugging_face(x: Tensor, y: Tensor) -> Any:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    rows = {"image": [pil(image) for image in x], "label": y.tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


@kind("datasets.Dataset with Image and ClassLabel", needs=["datasets"])
def hf_images(folder: Path) -> Case:
    return of_pictures(hugging_face, class_names=NAMES)


@kind('datasets.Dataset with_format("torch")', needs=["datasets"])
def hf_torch(folder: Path) -> Case:
    return of_pictures(lambda x, y: hugging_face(x, y).with_format("torch"), class_names=NAMES)


@kind('datasets.Dataset with_format("numpy"), columns of arrays', needs=["datasets"])
def hf_numpy(folder: Path) -> Case:
    def open(x: Tensor, y: Tensor) -> Any:
        import datasets

        features = datasets.Features(
            {
                "img": datasets.Array3D((3, SIZE, SIZE), "uint8"),
                "labels": datasets.ClassLabel(names=list(NAMES)),
            }
        )
        rows = {"img": list(x.numpy()), "labels": y.tolist()}
        return datasets.Dataset.from_dict(rows, features=features).with_format("numpy")

    return of_pictures(open, class_names=NAMES)


@kind(
    "datasets.Dataset with_transform",
    needs=["datasets"],
    retrain=EIGHT_BITS,
    variations=(Works(), EIGHT_BITS),
)
def hf_transform(folder: Path) -> Case:
    mean, std = (torch.tensor(part)[:, None, None] for part in (MEAN, STD))
    images = pictures()

    def transform(batch: dict[str, list[Any]]) -> dict[str, Any]:
        arrays = [torch.from_numpy(np.array(one.convert("RGB"))).permute(2, 0, 1) for one in batch["image"]]
        return {"pixel_values": [(one / 255 - mean) / std for one in arrays], "label": batch["label"]}

    return of_values(
        (images.float() / 255 - mean) / std,
        convolution(),
        lambda x, y: hugging_face(images, y).with_transform(transform),
        class_names=NAMES,
    )


@kind("datasets.load_from_disk(folder)", needs=["datasets"])
def hf_from_disk(folder: Path) -> Case:
    def open(x: Tensor, y: Tensor) -> Any:
        import datasets

        hugging_face(x, y).save_to_disk(folder / "saved")
        return datasets.load_from_disk(folder / "saved")

    return of_pictures(open, class_names=NAMES)


@kind(
    "the folder of Dataset.save_to_disk, given as a path",
    needs=["datasets"],
    every=(Works(), Refused("save_to_disk")),
)
def hf_folder(folder: Path) -> Case:
    def open(x: Tensor, y: Tensor) -> Any:
        hugging_face(x, y).save_to_disk(folder / "saved")
        return data.load(folder / "saved").train

    return of_pictures(open, class_names=NAMES)


@kind("datasets.DatasetDict", needs=["datasets"], every=Refused("split|train"))
def hf_dict(folder: Path) -> Case:
    def open(x: Tensor, y: Tensor) -> Any:
        import datasets

        return datasets.DatasetDict({"train": hugging_face(x, y), "test": hugging_face(x, y)})

    return of_pictures(open)


@kind("datasets.IterableDataset", needs=["datasets"], every=NOT_MAP_STYLE)
def hf_iterable(folder: Path) -> Case:
    return of_pictures(lambda x, y: hugging_face(x, y).to_iterable_dataset())


# Datasets around datasets.


def named_rows(x: Tensor, y: Tensor) -> Rows:
    return Rows(lambda i: (x[i], int(y[i])), len(y), classes=list(NAMES))


@kind("Subset of a dataset with classes")
def subset(folder: Path) -> Case:
    def open(x: Tensor, y: Tensor) -> Any:
        doubled, labels = torch.cat([x.flip(0), x]), torch.cat([y.flip(0), y])
        return Subset(named_rows(doubled, labels), range(len(x), 2 * len(x)))

    return of_pictures(open, class_names=NAMES)


@kind("ConcatDataset")
def concatenated(folder: Path) -> Case:
    return of_pictures(
        lambda x, y: ConcatDataset([named_rows(x[:20], y[:20]), named_rows(x[20:], y[20:])]),
        class_names=NAMES,
    )


@kind("ConcatDataset of sets with other classes", every=Refused("class"))
def concatenated_others(folder: Path) -> Case:
    def open(x: Tensor, y: Tensor) -> Any:
        other = Rows(lambda i: (x[i], int(y[i])), classes=["dog", "cat", "fox"])
        return ConcatDataset([named_rows(x, y), other])

    return of_pictures(open)


@kind("random_split of a Subset of a ConcatDataset")
def split(folder: Path) -> Case:
    images, labels = pictures(count=60), labels_of(60)
    first, second = named_rows(images[:25], labels[:25]), named_rows(images[25:], labels[25:])
    joined = Subset(ConcatDataset([first, second]), range(60))
    part, _ = random_split(joined, [48, 12], torch.Generator().manual_seed(0))
    chosen = torch.tensor(list(part.indices))
    return of_pictures(lambda x, y: part, images=images[chosen], labels=labels[chosen], class_names=NAMES)


@kind("memory-mapped numpy arrays")
def memory_map(folder: Path) -> Case:
    def open(x: Tensor, y: Tensor) -> Any:
        np.save(folder / "x.npy", x.numpy())
        mapped = np.load(folder / "x.npy", mmap_mode="r")
        return Rows(lambda i: (mapped[i], int(y[i])))

    return of_pictures(open)


@kind(
    "torchvision ImageFolder with Resize, ToTensor, Normalize",
    needs=["torchvision"],
    retrain=EIGHT_BITS,
    variations=(Works(), EIGHT_BITS),
)
def torchvision_folder(folder: Path) -> Case:
    from torchvision import datasets, transforms

    _class_folders(folder, pictures())
    steps = [transforms.Resize(6), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    dataset = datasets.ImageFolder(folder, transforms.Compose(steps))
    inputs = torch.stack([image for image, _ in dataset])
    labels = torch.tensor([label for _, label in dataset])
    case = of_values(inputs, convolution(), lambda x, y: dataset, class_names=NAMES)
    case.labels, case.ids = labels, [str(Path(path).relative_to(folder)) for path, _ in dataset.samples]
    return case


@kind("torchvision FakeData with transforms.v2", needs=["torchvision"])
def torchvision_fake(folder: Path) -> Case:
    from torchvision import datasets
    from torchvision.transforms import v2

    steps = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    dataset = datasets.FakeData(COUNT, (3, SIZE, SIZE), CLASSES, steps)
    images = torch.stack([(image * 255).round().to(torch.uint8) for image, _ in dataset])
    labels = torch.tensor([int(label) for _, label in dataset])
    return of_pictures(lambda x, y: dataset, images=images, labels=labels)


@kind(
    "timm ImageDataset", needs=["timm", "torchvision"], retrain=EIGHT_BITS, variations=(Works(), EIGHT_BITS)
)
def timm_dataset(folder: Path) -> Case:
    import timm.data

    _class_folders(folder, pictures())
    transform = timm.data.create_transform((3, SIZE, SIZE), is_training=False)
    dataset = timm.data.ImageDataset(str(folder), transform=transform)
    inputs = torch.stack([dataset[i][0] for i in range(len(dataset))])
    case = of_values(inputs, convolution(), lambda x, y: dataset)
    case.labels = torch.tensor([dataset[i][1] for i in range(len(dataset))])
    return case


# What is no dataset, or none that can be used.


@kind("IterableDataset", every=NOT_MAP_STYLE)
def iterable(folder: Path) -> Case:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from ((image, 0) for image in pictures())

    return of_pictures(lambda x, y: Stream())


@kind("DataLoader", every=Refused("DataLoader|map-style"))
def loader(folder: Path) -> Case:
    return of_pictures(lambda x, y: DataLoader(TensorDataset(x.float() / 255, y), 8))


@kind("random transforms", every=Refused("random"))
def random_everywhere(folder: Path) -> Case:
    return of_pictures(lambda x, y: Rows(lambda i: (x[i].roll(int(torch.randint(8, ())), -1), int(y[i]))))


@kind("random transforms of a later part of the set", every=Refused("random"))
def random_late(folder: Path) -> Case:
    def row(x: Tensor, i: int) -> Tensor:
        return x[i].roll(int(torch.randint(8, ())), -1) if i >= 20 else x[i]

    return of_pictures(lambda x, y: Rows(lambda i: (row(x, i), int(y[i]))))


@kind("random flip with probability 1/2", every=Refused("random"))
def random_flip(folder: Path) -> Case:
    return of_pictures(
        lambda x, y: Rows(lambda i: (x[i].flip(-1) if torch.rand(()) < 0.5 else x[i], int(y[i])))
    )


@kind("empty", every=Refused("no example|empty"))
def empty(folder: Path) -> Case:
    return of_pictures(lambda x, y: Rows(lambda i: (x[i], 0), 0))


@kind("one example", every=(Works(), Refused("example|class|forget|index")))
def one(folder: Path) -> Case:
    return of_pictures(
        lambda x, y: Rows(lambda i: (x[i], int(y[i])), 1), images=pictures()[1:2], labels=torch.tensor([1])
    )


@kind("one class", every=(Works(), Refused("class")))
def one_class(folder: Path) -> Case:
    return of_pictures(lambda x, y: Rows(lambda i: (x[i], 0)), labels=torch.zeros(COUNT, dtype=torch.int64))


@kind("10 million images of 3 x 224 x 224, by length", every=Refused("memory|GB|GiB|bytes|hours"))
def huge(folder: Path) -> Case:
    image = torch.zeros(3, 224, 224, dtype=torch.uint8)
    return of_pictures(lambda x, y: Rows(lambda i: (image, i % 3), 10**7), query=image)


@kind("a row that raises", every=Refused("(row|example|index) 7"))
def raising(folder: Path) -> Case:
    def row(x: Tensor, i: int) -> Tensor:
        if i == 7:
            raise FileNotFoundError("photos/7.png")
        return x[i]

    return of_pictures(lambda x, y: Rows(lambda i: (row(x, i), int(y[i]))))


@kind("a NaN", every=Refused("NaN|finite"))
def not_a_number(folder: Path) -> Case:
    inputs = pictures().float() / 255
    inputs[5, 0, 0, 0] = torch.nan
    return of_values(inputs, convolution())


@kind("a length that lies", every=Refused("(row|example|index) 48"))
def lying(folder: Path) -> Case:
    return of_pictures(lambda x, y: _Lying(x, y))


class _Lying(Rows):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(lambda i: (x[i], int(y[i])))

    def __len__(self) -> int:
        return COUNT + 2


@kind("images of different sizes", every=Refused("size|pixels|shape"))
def different_sizes(folder: Path) -> Case:
    return of_pictures(lambda x, y: Rows(lambda i: (pil(x[i]).resize((8 + i % 3, 8)), int(y[i]))))


# Labels.


def _labelled(label: Callable[[int], Any]) -> Callable[[Tensor, Tensor], Any]:
    return lambda x, y: Rows(lambda i: (x[i], label(int(y[i]))), len(y))


@kind("labels: strings")
def string_labels(folder: Path) -> Case:
    return of_pictures(_labelled(lambda label: NAMES[label]), class_names=NAMES)


@kind("labels: whole floats")
def float_labels(folder: Path) -> Case:
    return of_pictures(_labelled(float))


@kind("labels: 0-d tensors and numpy scalars")
def scalar_labels(folder: Path) -> Case:
    return of_pictures(_labelled(lambda label: torch.tensor(label) if label else np.uint8(label)))


@kind("labels: one-hot", every=(Works(), Refused("one-hot|label")))
def one_hot(folder: Path) -> Case:
    return of_pictures(_labelled(lambda label: torch.eye(CLASSES)[label]))


@kind("labels: soft (mixup)", every=Refused("label"))
def soft_labels(folder: Path) -> Case:
    return of_pictures(_labelled(lambda label: torch.full((CLASSES,), 0.2) + 0.4 * torch.eye(CLASSES)[label]))


@kind("labels: fractions (regression)", every=Refused("label"))
def fractions(folder: Path) -> Case:
    return of_pictures(_labelled(lambda label: label + 0.5))


@kind("labels: -1 for unknown", every=Refused("label.*-1"))
def unknown_labels(folder: Path) -> Case:
    return of_pictures(_labelled(lambda label: label - 1))


@kind("labels: 1..3 for three logits", every=Refused("label|logit|outputs|class"))
def one_based(folder: Path) -> Case:
    return of_pictures(_labelled(lambda label: label + 1))


@kind("classes: whole numbers in `.classes`")
def integer_names(folder: Path) -> Case:
    return of_pictures(
        lambda x, y: Rows(lambda i: (x[i], int(y[i])), classes=[10, 20, 30]), class_names=["10", "20", "30"]
    )


@kind("classes: a number in `.classes`", every=(Works(), Refused("class")))
def number_of_names(folder: Path) -> Case:
    return of_pictures(lambda x, y: Rows(lambda i: (x[i], int(y[i])), classes=3))


# Inputs that are no pictures.


@kind("vectors: (Float[20], int)", **ONLY_IMAGES)
def vectors(folder: Path) -> Case:
    model = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, CLASSES))
    return of_values(torch.randn(COUNT, 20), model)


@kind("two numpy arrays of vectors", **ONLY_IMAGES)
def vector_arrays(folder: Path) -> Case:
    model = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, CLASSES))
    return of_values(torch.randn(COUNT, 20), model, lambda x, y: (x.numpy(), y.numpy()))


class Bag(nn.Module):
    """Token ids, averaged; 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        present = (tokens > 0)[..., None]
        mean = (self.table(tokens) * present).sum(1) / present.sum(1).clamp(min=1)
        logits: Tensor = self.head(self.hidden(mean).relu())
        return logits


@kind("sequences of token ids: (Int64[12], int)", **ONLY_IMAGES)
def tokens(folder: Path) -> Case:
    return of_values(torch.randint(1, 50, (COUNT, 12)), Bag())


@kind("token ids of different lengths, with a collate_fn", **ONLY_IMAGES)
def collated(folder: Path) -> Case:
    ids = torch.randint(1, 50, (COUNT, 12))
    for row, length in enumerate(itertools.islice(itertools.cycle((12, 7, 9)), COUNT)):
        ids[row, length:] = 0

    def collate(rows: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        inputs = nn.utils.rnn.pad_sequence([row for row, _ in rows], batch_first=True)
        return inputs, torch.tensor([label for _, label in rows])

    return of_values(
        ids,
        Bag(),
        lambda x, y: Rows(lambda i: (x[i][x[i] > 0], int(y[i]))),
        query=ids[2].flip(-1),
        options={"collate_fn": collate},
    )


@kind("mappings of tensors: ({input_ids, attention_mask}, int)", **ONLY_IMAGES)
def mappings(folder: Path) -> Case:
    class Masked(Bag):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(input_ids * attention_mask)

    ids, mask = torch.randint(1, 50, (COUNT, 12)), (torch.rand(COUNT, 12) < 0.8).long()
    query = {"input_ids": ids[2].flip(-1), "attention_mask": mask[2].flip(-1)}
    return of_values(
        (ids, mask),
        Masked(),
        lambda x, y: Rows(lambda i: ({"input_ids": x[0][i], "attention_mask": x[1][i]}, int(y[i]))),
        query=query,
    )


@kind("two inputs: ((left, right), int)", every=(Works(), Refused("input|tuple|tensor|image")))
def two_inputs(folder: Path) -> Case:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.head = nn.Linear(6, 8), nn.Linear(16, CLASSES)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.cat([self.branch(left), self.branch(right)], 1).relu())
            return logits

    left, right = torch.randn(COUNT, 6), torch.randn(COUNT, 6)
    return of_values(
        (left, right),
        Siamese(),
        lambda x, y: Rows(lambda i: ((x[0][i], x[1][i]), int(y[i]))),
        query=(left[2].flip(-1), right[2].flip(-1)),
    )


@kind("volumes: (Float[1 4 6 6], int)", **ONLY_IMAGES)
def volumes(folder: Path) -> Case:
    model = nn.Sequential(nn.AvgPool3d(2), nn.Flatten(), nn.Linear(18, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    return of_values(torch.randn(COUNT, 1, 4, 6, 6), model)


@kind("waveforms: (Float[1 64], int)", **ONLY_IMAGES)
def waveforms(folder: Path) -> Case:
    model = nn.Sequential(nn.AvgPool1d(4), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    return of_values(torch.randn(COUNT, 1, 64), model)


@kind("images of 5 channels (satellite)", retrain=(Works(), EIGHT_BITS), variations=(Works(), EIGHT_BITS))
def five_channels(folder: Path) -> Case:
    return of_values(torch.rand(COUNT, 5, SIZE, SIZE), convolution(5))


# Pillow images that are not plain grey or colour.


def _of_mode(mode: str, **more: Any) -> Case:
    shown = [pil(image).convert(mode) for image in pictures()]
    images = torch.stack([torch.from_numpy(np.array(one.convert("RGB"))).permute(2, 0, 1) for one in shown])
    return of_pictures(lambda x, y: Rows(lambda i: (shown[i], int(y[i]))), images=images, **more)


@kind("PIL palette images")
def palette(folder: Path) -> Case:
    return _of_mode(
        "P",
        query=pil(pictures()[2].flip(-1)).convert("P"),
        query_inputs=(_rgb(pil(pictures()[2].flip(-1)).convert("P")),),
    )


def _rgb(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


@kind("PIL CMYK images")
def cmyk(folder: Path) -> Case:
    return _of_mode("CMYK")


@kind("PIL RGBA images, opaque")
def opaque(folder: Path) -> Case:
    return _of_mode("RGBA")


@kind("PIL RGBA images that show something through", every=Refused("alpha|transparen"))
def transparent(folder: Path) -> Case:
    def row(x: Tensor, i: int) -> Image.Image:
        image = pil(x[i]).convert("RGBA")
        image.putalpha(100)
        return image

    return of_pictures(lambda x, y: Rows(lambda i: (row(x, i), int(y[i]))))


@kind("PIL images of 16 bits", every=Refused("16"))
def sixteen_bits(folder: Path) -> Case:
    deep = (pictures(1).long() * 257).to(torch.int32)[:, 0].numpy().astype(np.uint16)
    return of_pictures(lambda x, y: Rows(lambda i: (Image.fromarray(deep[i]), int(y[i]))), channels=1)


@kind("grey and colour images mixed")
def mixed(folder: Path) -> Case:
    images = pictures()
    images[::2] = images[::2, :1]
    return of_pictures(
        lambda x, y: Rows(lambda i: (pil(x[i, :1] if i % 2 == 0 else x[i]), int(y[i]))), images=images
    )


# Files and folders, through `load`.


def _class_folders(
    folder: Path,
    images: Tensor,
    *,
    suffix: str = ".png",
    save: Callable[[Image.Image, Path], None] | None = None,
    labels: Tensor | None = None,
    names: Sequence[str] = NAMES,
) -> None:
    for row, image in enumerate(images):
        label = row % CLASSES if labels is None else int(labels[row])
        path = folder / names[label] / f"{row:02d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        shown = pil(image)
        shown.save(path) if save is None else save(shown, path)


def _read(where: Path, **options: Any) -> Any:
    return (data.load_examples if options.keys() & LAZILY.keys() else data.load)(where, **options).train


def of_folder(
    folder: Path,
    write: Callable[[Tensor], None],
    *,
    seen: Callable[[Tensor], Tensor] = lambda images: images,
    where: str = "",
    suffix: str = ".png",
    **more: Any,
) -> Case:
    """A case of class folders; examples come class by class, in the order of their files' names."""
    images = pictures()
    write(images)
    order = torch.cat([torch.arange(label, COUNT, CLASSES) for label in range(CLASSES)])
    ids = [f"{NAMES[int(row) % CLASSES]}/{int(row):02d}{suffix}" for row in order]
    options = more.pop("load", {})
    return of_pictures(
        lambda x, y: _read(folder / where, **options),
        images=seen(images)[order],
        labels=order % CLASSES,
        class_names=NAMES,
        **{"ids": ids, **more},
    )


@kind("folder of class folders (PNG)")
def class_folders(folder: Path) -> Case:
    return of_folder(folder, lambda x: _class_folders(folder, x))


def _lossless(suffix: str, **options: Any) -> Callable[[Path], Case]:
    def build(folder: Path) -> Case:
        def save(image: Image.Image, path: Path) -> None:
            image.save(path, **options)

        return of_folder(folder, lambda x: _class_folders(folder, x, suffix=suffix, save=save), suffix=suffix)

    return build


kind("folder of WebP")(_lossless(".webp", lossless=True))
kind("folder of PPM")(_lossless(".ppm"))
kind("folder of TIFF")(_lossless(".tiff"))
kind("folder of PNG with upper-case endings (.PNG)")(_lossless(".PNG"))


@kind("folder of nested class folders")
def nested(folder: Path) -> Case:
    def write(x: Tensor) -> None:
        for row, image in enumerate(x):
            path = folder / NAMES[row % CLASSES] / f"part{row // 12}" / f"{row:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pil(image).save(path)

    return of_folder(folder, write, ids=None)


@kind(
    "folder one level too high: photos/all/CLASS",
    every=(Works(), Refused("level|all|wrapp|at least two classes")),
)
def wrapped(folder: Path) -> Case:
    return of_folder(folder, lambda x: _class_folders(folder / "all", x))


@kind("folder one level too high: photos/{summer, winter}/CLASS", every=Refused("level|nested|folders|split"))
def wrapped_twice(folder: Path) -> Case:
    def write(x: Tensor) -> None:
        for place in ("summer", "winter"):
            _class_folders(folder / place, x)

    return of_folder(folder, write)


@kind("folder with splits called training and testing", every=(Works(), Refused("split|level|train")))
def other_splits(folder: Path) -> Case:
    def write(x: Tensor) -> None:
        for place in ("training", "testing"):
            _class_folders(folder / place, x)

    return of_folder(folder, write)


@kind("folder with Train and Test")
def upper_splits(folder: Path) -> Case:
    def write(x: Tensor) -> None:
        for place in ("Train", "Test"):
            _class_folders(folder / place, x)

    return of_folder(folder, write, ids=None)


@kind("folder of images of different sizes", every=Refused("size"))
def folder_sizes(folder: Path) -> Case:
    def save(image: Image.Image, path: Path) -> None:
        image.resize((8 + int(path.stem) % 3, 8)).save(path)

    return of_folder(folder, lambda x: _class_folders(folder, x, save=save))


@kind("folder of images of different sizes, with size=8")
def folder_resized(folder: Path) -> Case:
    def save(image: Image.Image, path: Path) -> None:
        # A multiple of the size that was asked for, so that what a resize gives is known.
        image.resize((8 * (1 + int(path.stem) % 2),) * 2, Image.Resampling.NEAREST).save(path)

    return of_folder(folder, lambda x: _class_folders(folder, x, save=save), load={"size": 8})


@kind("folder of class folders, decoded as it is read")
def folder_lazily(folder: Path) -> Case:
    return of_folder(folder, lambda x: _class_folders(folder, x), load=LAZILY)


@kind("folder of class folders, decoded once into a cache")
def folder_cached(folder: Path) -> Case:
    place = folder / "photos"
    load = {**LAZILY, "cache": folder / "cache"}
    return of_folder(folder, lambda x: _class_folders(place, x), where="photos", load=load)


@kind("folder with a transform", retrain=EIGHT_BITS, variations=(Works(), EIGHT_BITS))
def folder_transformed(folder: Path) -> Case:
    def standardised(picture: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return (pixels.float() / 255 - 0.5) / 0.25

    images = pictures()
    _class_folders(folder, images)
    order = torch.cat([torch.arange(label, COUNT, CLASSES) for label in range(CLASSES)])
    inputs = (images[order].float() / 255 - 0.5) / 0.25
    case = of_values(inputs, convolution(), lambda x, y: _read(folder, **LAZILY, transform=standardised))
    case.labels, case.class_names = order % CLASSES, NAMES
    case.ids = [f"{NAMES[int(row) % CLASSES]}/{int(row):02d}.png" for row in order]
    return case


@kind("folder of CMYK TIFF")
def folder_cmyk(folder: Path) -> Case:
    def save(image: Image.Image, path: Path) -> None:
        image.convert("CMYK").save(path)

    def seen(images: Tensor) -> Tensor:
        shown = [np.array(pil(image).convert("CMYK").convert("RGB")) for image in images]
        return torch.stack([torch.from_numpy(one).permute(2, 0, 1) for one in shown])

    return of_folder(
        folder, lambda x: _class_folders(folder, x, suffix=".tiff", save=save), seen=seen, suffix=".tiff"
    )


@kind("folder of 16-bit PNG", every=Refused("16 bits"))
def folder_sixteen(folder: Path) -> Case:
    def save(image: Image.Image, path: Path) -> None:
        Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257).save(path)

    return of_folder(folder, lambda x: _class_folders(folder, x, save=save))


@kind("folder of animated GIF: the first frame")
def animated(folder: Path) -> Case:
    def save(image: Image.Image, path: Path) -> None:
        frames = [image.convert("P"), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).convert("P")]
        frames[0].save(path, save_all=True, append_images=frames[1:])

    def seen(images: Tensor) -> Tensor:
        shown = []
        for image in images:
            stream = io.BytesIO()
            pil(image).convert("P").save(stream, "GIF")
            shown.append(torch.from_numpy(np.array(Image.open(stream).convert("RGB"))).permute(2, 0, 1))
        return torch.stack(shown)

    return of_folder(
        folder, lambda x: _class_folders(folder, x, suffix=".gif", save=save), seen=seen, suffix=".gif"
    )


def _turned(folder: Path) -> None:
    def save(image: Image.Image, path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees clockwise when shown
        image.save(path, exif=exif)

    _class_folders(folder, pictures(), save=save)


@kind("folder of photographs with an EXIF orientation: as stored")
def exif_stored(folder: Path) -> Case:
    return of_folder(folder, lambda x: _turned(folder))


@kind("folder of photographs with an EXIF orientation: applied, with orient=True")
def exif_applied(folder: Path) -> Case:
    return of_folder(
        folder, lambda x: _turned(folder), seen=lambda x: x.rot90(-1, (2, 3)), load={"orient": True}
    )


@kind("folder with files that are no images, passed over")
def passed_over(folder: Path) -> Case:
    def write(x: Tensor) -> None:
        _class_folders(folder, x)
        (folder / "cat" / "notes.txt").write_text("a cat")
        (folder / "README.md").write_text("photographs")
        (folder / "dog" / ".DS_Store").write_bytes(b"\0")

    return of_folder(folder, write)


@kind("folder with an image that does not decode", every=Refused("broken"))
def broken(folder: Path) -> Case:
    def write(x: Tensor) -> None:
        _class_folders(folder, x)
        (folder / "dog" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")

    return of_folder(folder, write)


@kind("CSV manifest: path,label")
def csv_manifest(folder: Path, **load: Any) -> Case:
    def write(x: Tensor) -> None:
        _class_folders(folder, x)
        with (folder / "train.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label"])
            for label, name in enumerate(NAMES):
                writer.writerows([f"{name}/{row:02d}.png", name] for row in range(label, COUNT, CLASSES))

    return of_folder(folder, write, where="train.csv", load=load)


@kind("CSV manifest: path,label, decoded as it is read")
def csv_lazily(folder: Path) -> Case:
    return csv_manifest(folder, **LAZILY)


@kind("parquet manifest: path, label")
def parquet_manifest(folder: Path) -> Case:
    def write(x: Tensor) -> None:
        import pyarrow
        import pyarrow.parquet

        _class_folders(folder, x)
        rows = [(label, row) for label in range(CLASSES) for row in range(label, COUNT, CLASSES)]
        paths, names = (
            [f"{NAMES[label]}/{row:02d}.png" for label, row in rows],
            [NAMES[label] for label, _ in rows],
        )
        pyarrow.parquet.write_table(pyarrow.table({"path": paths, "label": names}), folder / "train.parquet")

    return of_folder(folder, write, where="train.parquet")


@kind("parquet of encoded images, as the hub's")
def parquet_images(folder: Path) -> Case:
    def open(x: Tensor, y: Tensor) -> Any:
        data.write_parquet(folder / "train.parquet", TrainingSet(x, y, NAMES))
        return _read(folder / "train.parquet")

    return of_pictures(open, class_names=NAMES)


@kind("tar shards in WebDataset's layout")
def tar_shards(folder: Path, **load: Any) -> Case:
    def open(x: Tensor, y: Tensor) -> Any:
        for shard in range(2):
            with tarfile.open(folder / f"train-{shard:04d}.tar", "w") as archive:
                for row in range(shard * 24, shard * 24 + 24):
                    stream = io.BytesIO()
                    pil(x[row]).save(stream, "PNG")
                    for ending, content in (("png", stream.getvalue()), ("cls", str(int(y[row])).encode())):
                        entry = tarfile.TarInfo(f"{row:06d}.{ending}")
                        entry.size = len(content)
                        archive.addfile(entry, io.BytesIO(content))
        return _read(folder, **load)

    return of_pictures(open, ids=[f"{row:06d}" for row in range(COUNT)])


@kind("tar shards in WebDataset's layout, decoded as they are read")
def tar_lazily(folder: Path) -> Case:
    return tar_shards(folder, **LAZILY)


@kind("npz of arrays")
def npz(folder: Path) -> Case:
    def open(x: Tensor, y: Tensor) -> Any:
        data.write_npz(folder / "a.npz", TrainingSet(x, y, NAMES))
        return _read(folder / "a.npz")

    return of_pictures(open, class_names=NAMES)


@kind("a path that is not there", every=Refused("no such file"))
def nothing_there(folder: Path) -> Case:
    return of_pictures(lambda x, y: _read(folder / "photos"))
