"""A folder of class folders: `read_folder`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch

from unpoison.data._image_files import Files, ImageFiles
from unpoison.data._images import SUFFIXES, Preparation, is_hidden
from unpoison.data._splits import Splits
from unpoison.data._training_set import TrainingSet
from unpoison.errors import InputError

_TRAIN_NAMES = ("train", "training")
_TEST_NAMES = ("test", "testing", "val", "validation", "valid")
_SPLIT_NAMES = (*_TRAIN_NAMES, *_TEST_NAMES)
_NUMBER = re.compile("[0-9]")


def read_folder(
    path: str | os.PathLike[str], *, size: int | None = None, orient: bool = False
) -> Splits[TrainingSet]:
    """Read a folder that holds one folder of images for each class.

    The names of the folders, sorted by their characters, are the classes 0, 1, ..., as in torchvision's
    `ImageFolder`. Class folders are searched to any depth. Hidden files, and files without the suffix of an
    image, are passed over, which `Splits.notes` says; an image that does not decode is an error. If there is
    a folder `train` (or `training`), it is the training set, and `test` (or `testing`, `val`, `validation`,
    `valid`) is the test set, in any case of letters.

    All images must have one size, unless `size` brings them to one. If some are grey and some coloured, all
    become coloured, which loses nothing. The ids of the examples are the paths of their files in the folder.

    Arguments:
        path: the folder.
        size: resize the shorter side to so many pixels, and cut out the middle square.
        orient: turn photographs as their EXIF orientation says.

    Raises:
        InputError: the folder is missing or empty, a class has no image, there are fewer than two classes,
            the folders look like parts of the set rather than classes, an image does not decode, two images
            differ in size, or an image cannot become 8-bit grey or colour without loss.
    """
    return list_folder(Path(path), Preparation(size, orient)).held()


def list_folder(root: Path, preparation: Preparation) -> Files:
    """The image files of a folder, of which none is read; see `read_folder`."""
    reader = _Reader(preparation)
    folders = _folders(root)
    by_name = {folder.name.lower(): folder for folder in folders}
    train_name = next((name for name in _TRAIN_NAMES if name in by_name), None)
    if train_name is None:
        _refuse_parts(root, folders)
        train = reader.read(root, [folder.name for folder in folders])
        return Files(train, notes=reader.notes)
    test_name = next((name for name in _TEST_NAMES if name in by_name), None)
    others = sorted(folder.name for name, folder in by_name.items() if name not in _SPLIT_NAMES)
    if others:
        raise InputError(
            f"{root}: has a folder {by_name[train_name].name!r} beside {others[0]!r}; keep class folders "
            "inside 'train' and 'test'"
        )
    train_root = by_name[train_name]
    class_names = [folder.name for folder in _folders(train_root)]
    train = reader.read(train_root, class_names)
    if test_name is None:
        return Files(train, notes=reader.notes)
    test_root = by_name[test_name]
    passed = [folder.name for folder in folders if folder not in (train_root, test_root)]
    if passed:
        shown = ", ".join(map(repr, passed))
        reader.notes += (f"{root}: {shown} passed over; {test_root.name!r} is the test set",)
    unknown = sorted({folder.name for folder in _folders(test_root)} - set(class_names))
    if unknown:
        raise InputError(
            f"{test_root / unknown[0]}: no such class in {train_root}; remove or rename the folder"
        )
    test = reader.read(test_root, class_names, may_lack_classes=True)
    return Files(train, test, reader.notes)


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


def _refuse_parts(root: Path, folders: Sequence[Path]) -> None:
    """Refuse folders that hold the same folders, such as `summer/cat` and `winter/cat`, and no images.

    Numbered folders inside classes, such as `cat/part1` and `dog/part1`, are parts of classes.
    """
    inside = [{child.name for child in folder.iterdir() if child.is_dir()} for folder in folders]
    names = inside[0]
    same = len(folders) > 1 and len(names) > 1 and all(other == names for other in inside)
    numbered = all(_NUMBER.search(name) for name in names) and not all(
        _NUMBER.search(folder.name) for folder in folders
    )
    if not same or numbered or any(_has_images(folder) for folder in folders):
        return
    shown = ", ".join(map(repr, sorted(names)[:3]))
    raise InputError(
        f"{root}: its folders {folders[0].name!r} and {folders[1].name!r} hold no images but the same "
        f"folders ({shown}), and look like splits one level above the classes; give {folders[0]}, or bring "
        "the images of a class into one folder"
    )


def _has_images(folder: Path) -> bool:
    return any(child.suffix.lower() in SUFFIXES for child in folder.iterdir() if child.is_file())


@final
class _Reader:
    """Lists class folders, and notes what was done."""

    def __init__(self, preparation: Preparation) -> None:
        self.preparation = preparation
        self.notes: tuple[str, ...] = (str(preparation),) if str(preparation) else ()

    def read(self, root: Path, class_names: Sequence[str], *, may_lack_classes: bool = False) -> ImageFiles:
        """The image files in the class folders of a folder."""
        if len(class_names) < 2:
            _refuse_parquet(root / class_names[0])
            raise InputError(
                f"{root}: needs at least two classes, found {len(class_names)} ({class_names[0]!r}); "
                "make one folder for each class, or give the folder that holds them"
            )
        files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(class_names):
            found = self._images_in(root / name)
            if not found and not may_lack_classes:
                _refuse_parquet(root / name)
                raise InputError(
                    f"{root / name}: holds no images; put the images of the class there or remove the folder"
                )
            files += found
            labels += [label] * len(found)
        if not files:
            raise InputError(f"{root}: holds no images; put the images of each class into its folder")
        ids = tuple(file.relative_to(root).as_posix() for file in files)
        targets = torch.tensor(labels, dtype=torch.int64)
        return ImageFiles(str(root), root, files, ids, targets, tuple(class_names), self.preparation)

    def _images_in(self, folder: Path) -> list[Path]:
        """The image files in a folder, at any depth, in the order of their names."""
        files: list[Path] = []
        passed: list[Path] = []
        for parent, folders, names in os.walk(folder, followlinks=False):
            folders[:] = sorted(name for name in folders if not is_hidden(Path(name)))
            for name in sorted(names):
                file = Path(parent, name)
                is_image = file.suffix.lower() in SUFFIXES and not is_hidden(file)
                (files if is_image else passed).append(file)
        if passed:
            shown = ", ".join(file.name for file in passed[:3]) + (", ..." if len(passed) > 3 else "")
            self.notes += (f"{folder}: {len(passed)} files passed over that are no images ({shown})",)
        return files


def _refuse_parquet(folder: Path) -> None:
    if any(folder.glob("*.parquet")):
        raise InputError(f"{folder.parent}: its folder {folder.name!r} holds parquet files; give {folder}")
