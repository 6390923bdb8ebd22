"""Poisons from and for other tools.

Three formats:

- the triple: a folder with `poisons.pickle`, `base_indices.pickle` and `target.pickle`, which the poisoning
  benchmark (Schwarzschild et al. 2021, arXiv 2006.12557), gradient matching, EPIC, Friendly Noise and PureGen
  read: 8-bit images with labels, places in the training set, the target;
- `poisondataset-60.pkl` of MetaPoison (Huang et al. 2020, arXiv 2004.00225): the whole poisoned training set
  as floats, sorted by class, the target and the test set;
- a folder with `poisons.csv` beside image files, or one `.parquet`, for people and table tools.

Foreign pickles are read by the restricted unpickler, which runs nothing: beside numpy arrays and plain
containers it admits `PIL.Image.Image`, for which it hands out a stand-in that only takes 8-bit pixels. A
target file that holds a torch tensor (a backdoor's patch, in some sets of the benchmark) is refused, for
torch reads those by running a pickle of its own; give `goal` and the file is not opened.

What these formats do not say has to be given. The clean training set is needed always: changes are measured
against it, and a poison set belongs to one. Since 8-bit images round, `eps` is checked again after reading.
Our own poison sets are kept by `PoisonSet.save`, never as pickles; pickles are written here alone, for tools
that read nothing else.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unpoison._artefacts import atomic_directory, atomic_file
from unpoison.data import TrainingSet, read_image, read_pickle, write_pickle
from unpoison.errors import InputError, MismatchError
from unpoison.threats._goal import Backdoor, Goal, TargetedMisclassification
from unpoison.threats._poison_set import PoisonSet
from unpoison.threats._trigger import PatchTrigger

_BANDS = MappingProxyType({"L": 1, "RGB": 3})


@final
class _Picture:
    """What a pickle is given for `PIL.Image.Image`: it takes 8-bit pixels of the right number, and nothing
    else."""

    __slots__ = ("pixels",)
    pixels: NDArray[np.uint8]

    def __new__(cls, *_: Any) -> _Picture:
        picture = super().__new__(cls)
        picture.pixels = np.zeros((0, 0, 0), np.uint8)
        return picture

    def __setstate__(self, state: Any) -> None:
        _info, mode, size, _palette, content = tuple(state)[:5]
        mode = mode.decode("latin-1") if isinstance(mode, bytes) else mode
        if mode not in _BANDS or not isinstance(content, bytes):
            raise ValueError(f"an image of mode {ascii(mode)[:20]}; only 8-bit grey and colour are read")
        width, height = (int(side) for side in size)
        if min(width, height) < 1 or len(content) != width * height * _BANDS[mode]:
            raise ValueError("an image whose pixels are not as many as its size says")
        rows = np.frombuffer(content, np.uint8).reshape(height, width, _BANDS[mode])
        self.pixels = np.ascontiguousarray(rows.transpose(2, 0, 1))


_PICTURES = MappingProxyType({("PIL.Image", "Image"): _Picture})


def read_triple(
    folder: str | os.PathLike[str],
    training_set: TrainingSet,
    *,
    goal: Goal | None = None,
    true_label: int | None = None,
    eps: float | None = None,
    attack: str = "imported",
) -> PoisonSet:
    """Read the poisoning benchmark's triple.

    Where a base index is named twice, as in two published set-ups, the later poison counts. A target with a
    patch becomes a `Backdoor` from its class to the poisons' label, any other a `TargetedMisclassification`.

    Arguments:
        folder: with `poisons.pickle`, `base_indices.pickle` and, unless `goal` is given, `target.pickle`.
        training_set: the clean set that the indices count in.
        goal: what the adversary wants; None reads it from `target.pickle`.
        true_label: what the target image shows; older files do not say.
        eps: the greatest change that was allowed, in 1/255; more than half a step above it is an error.
        attack: what to call the attack.

    Raises:
        InputError: a file is missing, damaged or asks for anything but images, arrays and containers; the
            number of poisons and indices differ; the poisons do not fit the training set or change more than
            `eps`; the target's label is neither in the file nor given.
    """
    place = Path(folder)
    poisons = _sequence(place / "poisons.pickle", read_pickle(place / "poisons.pickle", admit=_PICTURES))
    bases_file = place / "base_indices.pickle"
    indices = _whole_numbers(bases_file, read_pickle(bases_file))
    if len(indices) != len(poisons):
        raise InputError(f"{place}: {len(poisons)} poisons, but {len(indices)} base indices")
    images, labels = [], []
    for number, poison in enumerate(poisons):
        where = f"{place / 'poisons.pickle'}: poison {number}"
        if not isinstance(poison, tuple | list) or len(poison) != 2:
            raise InputError(f"{where}: must be a pair of image and label")
        images.append(_fitting(where, poison[0], training_set))
        labels.append(_label(where, poison[1]))
    if goal is None:
        goal = _goal_of_triple(place / "target.pickle", labels, training_set, true_label)
    # The later of two poisons of one index is the one that a data set with both would hold.
    last = {index: row for row, index in enumerate(indices)}
    rows = sorted(last.values())
    return _checked(
        str(place),
        PoisonSet.of(
            training_set,
            indices=[indices[row] for row in rows],
            images=torch.stack([images[row] for row in rows]),
            given_labels=torch.tensor([labels[row] for row in rows]),
            goal=goal,
            attack=attack,
            configuration={"read from": "triple", "eps": eps},
            seed=0,
        ),
        eps,
    )


def write_triple(folder: str | os.PathLike[str], poison: PoisonSet, test_set: TrainingSet) -> None:
    """Write the poisoning benchmark's triple: pickles of PIL images, for tools that read nothing else.

    The poisons are in the order of their indices; grey images become RGB, as the format has it. A backdoor's
    target is the first test image of its source class, with the patch and its top left place [row, column].

    Arguments:
        folder: replaced as a whole if it is there.
        poison: for one target image, or a backdoor with one source class and a patch without holes.
        test_set: where a backdoor's target image comes from.

    Raises:
        InputError: the format has no place for this goal, or images have neither 1 nor 3 channels.
    """
    target = _target_of(poison.goal, test_set)
    pictures = [
        (_picture(image), int(label))
        for image, label in zip(poison.images, poison.given_labels.tolist(), strict=True)
    ]
    with atomic_directory(folder) as staging:
        write_pickle(staging / "poisons.pickle", pictures)
        write_pickle(staging / "base_indices.pickle", poison.indices.numpy())
        write_pickle(staging / "target.pickle", target)


def read_metapoison(
    file: str | os.PathLike[str],
    training_set: TrainingSet,
    *,
    eps: float | None = None,
    attack: str = "metapoison",
) -> PoisonSet:
    """Read MetaPoison's dict of arrays.

    The file holds a whole training set in an order of its own. Rows that are examples of `training_set` to
    the pixel are not poison; each other row is the poison of the nearest example that no row has claimed, of
    the same class. Costs one pass over both sets, and the square of the number of poisons.

    Arguments:
        file: `poisondataset-60.pkl`; read without running it, numpy arrays only.
        training_set: the clean set, in any order.
        eps: the greatest change that was allowed, in 1/255. MetaPoison recolours too, which goes beyond its
            additive 8/255.
        attack: what to call the attack.

    Raises:
        InputError: the file is damaged, lacks an entry, or asks for anything but arrays.
        MismatchError: it belongs to another training set.
    """
    where = str(file)
    content = read_pickle(file)
    if not isinstance(content, Mapping):
        raise InputError(f"{where}: must hold a mapping, found {type(content).__name__}")
    rows = _eight_bit(where, "xtrain", content, training_set)
    labels = _labels(where, "ytrain", content)
    if len(rows) != len(training_set) or len(labels) != len(rows):
        raise MismatchError(
            f"{where}: has {len(rows)} examples and {len(labels)} labels, {training_set.name} has "
            f"{len(training_set)} examples"
        )
    clean = training_set.to("cpu")
    places: dict[tuple[bytes, int], list[int]] = {}
    for index, (image, label) in enumerate(zip(clean.images.numpy(), clean.labels.tolist(), strict=True)):
        places.setdefault((image.tobytes(), label), []).append(index)
    unknown = []
    for row, (image, label) in enumerate(zip(rows.numpy(), labels.tolist(), strict=True)):
        free = places.get((image.tobytes(), label))
        if free:
            free.pop()
        else:
            unknown.append(row)
    unclaimed = torch.tensor(sorted(index for free in places.values() for index in free), dtype=torch.int64)
    if len(unknown) > len(rows) // 2:
        raise MismatchError(
            f"{where}: {len(unknown)} of {len(rows)} examples are not in {training_set.name}; give the set "
            f"that it was made from"
        )
    indices = _nearest(rows[unknown], labels[unknown], clean, unclaimed, where)
    targets = _eight_bit(where, "xtarget", content, training_set)
    true, wanted = (sorted(set(_labels(where, key, content).tolist())) for key in ("ytarget", "ytargetadv"))
    if len(true) != 1 or len(wanted) != 1:
        raise InputError(
            f"{where}: ytarget and ytargetadv must name one class each, found {true} and {wanted}"
        )
    goal = TargetedMisclassification(targets, true[0], wanted[0])
    return _checked(
        where,
        PoisonSet.of(
            training_set,
            indices=indices,
            images=rows[unknown],
            given_labels=labels[unknown],
            goal=goal,
            attack=attack,
            configuration={"read from": "metapoison", "eps": eps},
            seed=0,
        ),
        eps,
    )


def write_metapoison(
    file: str | os.PathLike[str], poison: PoisonSet, training_set: TrainingSet, test_set: TrainingSet
) -> None:
    """Write MetaPoison's dict of arrays: Float32[n h w c] in 0..255, sorted by class, poisons first in
    theirs.

    Raises:
        InputError: the goal is not about given target images, or the file cannot be written.
        MismatchError: the poison belongs to another training set.
    """
    if not isinstance(poison.goal, TargetedMisclassification):
        raise InputError(
            f"{file}: the format holds target images, so it has no place for a {poison.goal.kind!r}"
        )
    poisoned = poison.apply(training_set).to("cpu")
    # A stable sort by class, with the poisons before the rest.
    key = poisoned.labels * 2 + (~poison.membership(len(poisoned))).long()
    order = key.argsort(stable=True)
    test = test_set.to("cpu")
    write_pickle(
        file,
        {
            "xtrain": _floats(poisoned.images[order]),
            "ytrain": poisoned.labels[order].numpy(),
            "xtarget": _floats(poison.goal.images),
            "ytarget": np.full(len(poison.goal.images), poison.goal.true_label),
            "ytargetadv": np.full(len(poison.goal.images), poison.goal.target),
            "xvalid": _floats(test.images),
            "yvalid": test.labels.numpy(),
        },
    )


def read_poison_table(
    path: str | os.PathLike[str],
    training_set: TrainingSet,
    goal: Goal,
    *,
    eps: float | None = None,
    attack: str = "imported",
) -> PoisonSet:
    """Read poisons from a folder with `poisons.csv` and image files, or from a `.parquet` file.

    Columns: `index`, the place in the training set; `given_label` (or `label`), a number or the name of a
    class; in a folder `file`, relative to it, and in parquet `image`, the bytes of an image file or
    struct<bytes, path>. Other columns are passed over.

    Arguments:
        path: the folder or the file.
        training_set: the clean set that the indices count in.
        goal: what the adversary wants; tables do not say.
        eps: the greatest change that was allowed, in 1/255; more than half a step above it is an error.
        attack: what to call the attack.

    Raises:
        InputError: a file or column is missing, an image does not decode or fit, an index or label is not
            one, a file lies outside the folder, or a change is more than `eps`.
    """
    place = Path(path)
    rows = _csv_rows(place) if place.is_dir() else _parquet_rows(place)
    if not rows:
        raise InputError(f"{place}: holds no poisons")
    return _checked(
        str(place),
        PoisonSet.of(
            training_set,
            indices=[row.index for row in rows],
            images=torch.stack([_fitting(row.where, row.pixels(), training_set) for row in rows]),
            given_labels=torch.tensor([_class(row.where, row.label, training_set) for row in rows]),
            goal=goal,
            attack=attack,
            configuration={"read from": "table", "eps": eps},
            seed=0,
        ),
        eps,
    )


def write_poison_table(path: str | os.PathLike[str], poison: PoisonSet) -> None:
    """Write poisons as a `.parquet` file where `path` ends so, else as a folder with `poisons.csv` and PNGs.

    Columns: index, file (or image), clean_label, given_label, linf, l2. The goal is not written.

    Raises:
        InputError: images have neither 1 nor 3 channels, or the file cannot be written.
    """
    encoded = [_png(image) for image in poison.images]
    names = [f"images/{index}.png" for index in poison.indices.tolist()]
    columns = {
        "index": poison.indices.tolist(),
        "clean_label": poison.clean_labels.tolist(),
        "given_label": poison.given_labels.tolist(),
        "linf": poison.linf.tolist(),
        "l2": poison.l2.tolist(),
    }
    if Path(path).suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        image_type = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        pictures = [
            {"bytes": content, "path": Path(name).name} for content, name in zip(encoded, names, strict=True)
        ]
        table = pyarrow.table({"image": pyarrow.array(pictures, image_type), **columns})
        with atomic_file(path) as staging:
            pyarrow.parquet.write_table(table, staging)
        return
    with atomic_directory(path) as staging:
        (staging / "images").mkdir()
        for name, content in zip(names, encoded, strict=True):
            (staging / name).write_bytes(content)
        with (staging / "poisons.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["index", "file", *list(columns)[1:]])
            for row, name in enumerate(names):
                values = [column[row] for column in columns.values()]
                writer.writerow([values[0], name, *values[1:]])


@dataclass(frozen=True)
class _Row:
    """One poison of a table."""

    where: str
    index: int
    label: Any
    content: bytes | Path

    def pixels(self) -> Tensor:
        if isinstance(self.content, Path):
            return read_image(self.content)
        try:
            with Image.open(io.BytesIO(self.content), formats=("PNG", "JPEG", "WEBP", "BMP")) as image:
                if image.mode not in _BANDS:
                    raise InputError(f"{self.where}: mode {image.mode}; convert it to 8-bit grey or RGB")
                array = np.array(image)
        except InputError:
            raise
        # Pillow's decoders raise whatever they stumble over in a damaged file.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{self.where}: does not decode as an image ({reason})") from None
        return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def _csv_rows(folder: Path) -> list[_Row]:
    table = folder / "poisons.csv"
    try:
        with table.open(newline="", encoding="utf-8") as file:
            entries = list(csv.DictReader(file))
    except FileNotFoundError:
        raise InputError(f"{table}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read ({error})") from None
    rows = []
    for number, entry in enumerate(entries, start=2):
        where = f"{table}: line {number}"
        label = _column(where, entry, "given_label", "label")
        name = PurePosixPath(_column(where, entry, "file"))
        if name.is_absolute() or ".." in name.parts or "\\" in str(name) or ":" in str(name):
            raise InputError(f"{where}: file {str(name)!r} must lie inside the folder")
        rows.append(_Row(where, _index(where, _column(where, entry, "index")), label, folder / name))
    return rows


def _parquet_rows(file: Path) -> list[_Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        entries = pyarrow.parquet.read_table(file).to_pylist()
    except FileNotFoundError:
        raise InputError(f"{file}: no such file or folder") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{file}: cannot be read as parquet ({' '.join(str(error).split())[:120]})"
        ) from None
    rows = []
    for number, entry in enumerate(entries):
        where = f"{file}: row {number}"
        label = _column(where, entry, "given_label", "label")
        image = _column(where, entry, "image")
        content = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(content, bytes):
            raise InputError(f"{where}: has no image bytes")
        rows.append(_Row(where, _index(where, _column(where, entry, "index")), label, content))
    return rows


def _column(where: str, entry: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if entry.get(name) is not None:
            return entry[name]
    raise InputError(f"{where}: has no {' or '.join(map(repr, names))}")


def _index(where: str, value: Any) -> int:
    text = str(value)
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"{where}: index {text[:30]!r} is not a whole number >= 0")
    return int(text)


def _class(where: str, label: Any, training_set: TrainingSet) -> int:
    names = training_set.class_names
    text = str(label)
    if text in names:
        return names.index(text)
    if text.isascii() and text.isdigit() and int(text) < len(names):
        return int(text)
    raise InputError(f"{where}: label {text[:30]!r} is neither a class of {training_set.name} nor a number")


def _checked(where: str, poison: PoisonSet, eps: float | None) -> PoisonSet:
    """The same poison, if its changes are within eps and the rounding to 8 bits."""
    if eps is not None and len(poison) and float(poison.linf.max()) > eps + 0.5:
        row = int(poison.linf.argmax())
        raise InputError(
            f"{where}: the poison of example {int(poison.indices[row])} changes it by "
            f"{float(poison.linf[row]):g}/255, more than eps {eps:g}; is this the clean set that "
            f"the poison was made from?"
        )
    return poison


def _sequence(where: Path, value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f"{where}: must hold a list with one entry or more, found {type(value).__name__}")
    return value


def _whole_numbers(where: Path, value: Any) -> list[int]:
    try:
        numbers = np.asarray(value)
        if numbers.dtype.kind not in "iu" or numbers.ndim != 1 or (len(numbers) and numbers.min() < 0):
            raise ValueError
    except (ValueError, TypeError):
        raise InputError(f"{where}: must be a list of whole numbers >= 0") from None
    return [int(number) for number in numbers]


def _label(where: str, value: Any) -> int:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or value < 0:
        raise InputError(f"{where}: label {ascii(value)[:30]} is not a class number")
    return int(value)


def _fitting(where: str, image: Any, training_set: TrainingSet) -> Tensor:
    """The pixels UInt8[c h w] in the channels of the training set."""
    pixels = torch.from_numpy(image.pixels) if isinstance(image, _Picture) else image
    if not isinstance(pixels, Tensor) or not pixels.numel():
        raise InputError(f"{where}: holds no image")
    channels, height, width = training_set.image_shape
    if pixels.shape[1:] != (height, width):
        raise InputError(
            f"{where}: is {pixels.shape[1]}x{pixels.shape[2]} pixels, the images of {training_set.name} are "
            f"{height}x{width}"
        )
    if len(pixels) == channels:
        return pixels
    if len(pixels) == 1:
        return pixels.expand(channels, -1, -1).contiguous()
    if channels == 1 and bool((pixels == pixels[:1]).all()):
        return pixels[:1]
    raise InputError(
        f"{where}: has {len(pixels)} channels, the images of {training_set.name} have {channels}"
    )


def _goal_of_triple(
    file: Path, labels: Sequence[int], training_set: TrainingSet, true_label: int | None
) -> Goal:
    if not file.exists():
        raise InputError(f"{file}: no such file; give goal= to do without it")
    content = read_pickle(file, admit=_PICTURES)
    wanted = sorted(set(labels))
    if len(wanted) != 1:
        raise InputError(
            f"{file.parent}: the poisons have the labels {wanted}, not one; give goal= to say more"
        )
    parts = tuple(content) if isinstance(content, tuple | list) else (content,)
    image = _fitting(str(file), parts[0] if parts else None, training_set)
    if len(parts) >= 2 and parts[1] is not None:
        true_label = _label(str(file), parts[1])
    if true_label is None:
        raise InputError(f"{file}: does not say what the target image shows; give true_label=")
    if len(parts) < 4:
        return TargetedMisclassification(image[None], true_label, wanted[0])
    try:
        row, column = (int(number) for number in parts[3])
        patch = np.asarray(parts[2])
        if patch.dtype.kind == "f":
            patch = np.rint(patch * (255 if patch.max() <= 1 else 1))
        patch = patch.astype(np.uint8)
        if patch.ndim == 3 and patch.shape[0] not in (1, 3):
            patch = patch.transpose(2, 0, 1)
        values = torch.from_numpy(np.ascontiguousarray(patch))
        trigger = PatchTrigger(values, torch.ones(values.shape[1:], dtype=torch.bool), row, column, "patch")
    except (TypeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: its patch cannot be read ({reason}); give goal= to do without") from None
    return Backdoor(trigger, true_label, wanted[0])


def _target_of(goal: Goal, test_set: TrainingSet) -> tuple[Any, ...]:
    """What `target.pickle` holds."""
    if isinstance(goal, TargetedMisclassification):
        if len(goal.images) != 1:
            raise InputError(f"the triple holds one target image, this goal has {len(goal.images)}")
        return _picture(goal.images[0]), goal.true_label
    if not isinstance(goal, Backdoor) or not isinstance(goal.trigger, PatchTrigger) or goal.source is None:
        raise InputError(
            f"the triple holds a target image, or a backdoor with a patch and one source class, not this "
            f"{goal.kind!r}"
        )
    trigger = goal.trigger
    if bool((trigger.mask != 255).any()):
        raise InputError(f"the triple holds patches without holes, {trigger.name!r} has some")
    indices = goal.candidates(test_set)
    if not len(indices):
        raise InputError(f"{test_set.name}: no image of class {goal.source}")
    _, height, width = test_set.image_shape
    row = trigger.row if trigger.row >= 0 else height + trigger.row
    column = trigger.column if trigger.column >= 0 else width + trigger.column
    patch = (trigger.values.float() / 255).expand(3, -1, -1).numpy().copy()
    return _picture(test_set.images[indices[0]].cpu()), goal.source, patch, [row, column]


def _picture(image: Tensor) -> Image.Image:
    """An RGB picture of UInt8[c h w]."""
    if len(image) not in (1, 3):
        raise InputError(f"images of {len(image)} channels have no place in the triple; 1 and 3 have")
    return Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def _png(image: Tensor) -> bytes:
    if len(image) not in (1, 3):
        raise InputError(f"images of {len(image)} channels cannot be written as PNG; 1 and 3 can")
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0).contiguous()
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def _floats(images: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = images.permute(0, 2, 3, 1).contiguous().float().numpy()
    return array


def _array(where: str, key: str, content: Mapping[Any, Any]) -> NDArray[Any]:
    for spelling in (key, key.encode()):
        if spelling in content:
            array = np.asarray(content[spelling])
            if array.dtype.kind in "iuf" and np.isfinite(array).all():
                return array
            raise InputError(f"{where}: {key}: must be an array of finite numbers")
    raise InputError(f"{where}: lacks the entry {key!r}")


def _labels(where: str, key: str, content: Mapping[Any, Any]) -> Tensor:
    array = np.atleast_1d(_array(where, key, content))
    if array.ndim != 1 or (array != np.rint(array)).any() or (len(array) and array.min() < 0):
        raise InputError(f"{where}: {key}: must be class numbers")
    return torch.from_numpy(array.astype(np.int64))


def _eight_bit(where: str, key: str, content: Mapping[Any, Any], training_set: TrainingSet) -> Tensor:
    """An entry of images as UInt8[n c h w]; floats in 0..255, or in 0..1 where none is above 1."""
    array = _array(where, key, content)
    channels, height, width = training_set.image_shape
    if array.ndim == 3:
        array = array[None]
    if array.shape[1:] == (height, width, channels):
        array = array.transpose(0, 3, 1, 2)
    if array.shape[1:] != (channels, height, width) or not len(array):
        raise InputError(
            f"{where}: {key}: has shape {array.shape}, the images of {training_set.name} are "
            f"{training_set.image_shape}"
        )
    scale = 255 if array.dtype.kind == "f" and array.max() <= 1 else 1
    pixels = np.empty(array.shape, np.uint8)
    for start in range(0, len(array), 4096):
        part = array[start : start + 4096]
        pixels[start : start + 4096] = np.rint(part * scale).clip(0, 255)
    return torch.from_numpy(pixels)


def _nearest(images: Tensor, labels: Tensor, clean: TrainingSet, unclaimed: Tensor, where: str) -> list[int]:
    """For each image the place of the nearest unclaimed example of its class, each taken once."""
    left = set(unclaimed.tolist())
    chosen = []
    for image, label in zip(images, labels.tolist(), strict=True):
        free = torch.tensor(sorted(index for index in left if int(clean.labels[index]) == label))
        if not len(free):
            raise MismatchError(f"{where}: has more examples of class {label} than {clean.name}")
        change = (clean.images[free].float() - image.float()).flatten(1).norm(dim=1)
        index = int(free[change.argmin()])
        left.remove(index)
        chosen.append(index)
    return chosen
