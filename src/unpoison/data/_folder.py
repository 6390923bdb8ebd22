"""A folder of class folders: `read_folder`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from unpoison.data._images import SUFFIXES, decode_all, is_hidden
from unpoison.data._splits import Splits, with_equal_channels
from unpoison.data._training_set import TrainingSet
from unpoison.errors import InputError

_TEST_NAMES = ("test", "val", "validation", "valid")


def read_folder(path: str | os.PathLike[str]) -> Splits:
    """Read a folder that holds one folder of images for each class.

    The names of the folders, sorted by their characters, are the classes 0, 1, ..., as in torchvision's
    `ImageFolder`. Class folders are searched to any depth. Hidden files, and files without the suffix of an
    image, are skipped; an image that does not decode is an error. If there is a folder `train`, it is the
    training set, and `test` (or `val`, `validation`, `valid`) is the test set.

    All images must have one size. If some are grey and some coloured, all become coloured, which loses
    nothing.

    Raises:
        InputError: the folder is missing or empty, a class has no image, there are fewer than two classes, an
            image does not decode, two images differ in size, or an image cannot become 8-bit grey or colour
            without loss.
    """
    root = Path(path)
    folders = _folders(root)
    names = {folder.name for folder in folders}
    if "train" not in names:
        train = _read(root, [folder.name for folder in folders])
        return Splits(train)
    test_name = next((name for name in _TEST_NAMES if name in names), None)
    others = sorted(names - {"train", *_TEST_NAMES})
    if others:
        raise InputError(
            f"{root}: has a folder 'train' beside {others[0]!r}; keep class folders inside 'train' and 'test'"
        )
    class_names = [folder.name for folder in _folders(root / "train")]
    train = _read(root / "train", class_names)
    if test_name is None:
        return Splits(train)
    test_root = root / test_name
    unknown = sorted({folder.name for folder in _folders(test_root)} - set(class_names))
    if unknown:
        raise InputError(
            f"{test_root / unknown[0]}: no such class in {root / 'train'}; remove or rename the folder"
        )
    test = _read(test_root, class_names, may_lack_classes=True)
    return Splits(*with_equal_channels(train, test))


def _folders(root: Path) -> list[Path]:
    try:
        children = sorted(root.iterdir(), key=lambda child: child.name)
    except FileNotFoundError:
        raise InputError(f"{root}: no such folder") from None
    except OSError as error:
        raise InputError(f"{root}: cannot be read as a folder ({error.strerror or error})") from None
    folders = [child for child in children if child.is_dir() and not is_hidden(child)]
    if not folders:
        raise InputError(
            f"{root}: holds no class folders; make one folder for each class and put its images there"
        )
    return folders


def _read(root: Path, class_names: Sequence[str], *, may_lack_classes: bool = False) -> TrainingSet:
    if len(class_names) < 2:
        _refuse_parquet(root / class_names[0])
        raise InputError(
            f"{root}: needs at least two classes, found {len(class_names)} ({class_names[0]!r}); "
            "make one folder for each class"
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = _images_in(root / name)
        if not found and not may_lack_classes:
            _refuse_parquet(root / name)
            raise InputError(
                f"{root / name}: holds no images; put the images of the class there or remove the folder"
            )
        files += found
        labels += [label] * len(found)
    if not files:
        raise InputError(f"{root}: holds no images; put the images of each class into its folder")
    images = decode_all([(str(file), file) for file in files])
    return TrainingSet(images, torch.tensor(labels, dtype=torch.int64), tuple(class_names), str(root))


def _refuse_parquet(folder: Path) -> None:
    if any(folder.glob("*.parquet")):
        raise InputError(f"{folder.parent}: its folder {folder.name!r} holds parquet files; give {folder}")


def _images_in(folder: Path) -> list[Path]:
    """The image files in a folder, at any depth, in the order of their names."""
    files: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not is_hidden(Path(name)))
        for name in sorted(names):
            file = Path(parent, name)
            if file.suffix.lower() in SUFFIXES and not is_hidden(file):
                files.append(file)
    return files
