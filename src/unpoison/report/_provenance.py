"""`Provenance`: where findings come from: the run, the files of the training data and of the model.

Exports for other programs name files and their SHA-256. The hash of a folder is that of the lines
`HASH  PATH` that `sha256sum` prints for its files, in the order of the bytes of their paths:

    cd FOLDER && find * -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from unpoison.detectors import Findings
from unpoison.errors import InputError
from unpoison.report._svg import plain
from unpoison.runs import RECORD, RunRecord


@final
@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What is known of the origin of findings.

    Arguments:
        record: of the run that found them.
        data: the folder or file of the training data.
        model: the file of the model's weights.
        trained: the record of the run that trained the model, where unpoison did.
        blamed: the images of the most blamed examples, as `trace` and `scan` keep them.
    """

    record: RunRecord | None = None
    data: Path | None = None
    model: Path | None = None
    trained: RunRecord | None = None
    blamed: Path | None = None

    @classmethod
    def of_run(
        cls, folder: str | os.PathLike[str], *, data: Path | None = None, model: Path | None = None
    ) -> Provenance:
        """That of the findings in a run directory (or in the findings/ of one).

        Arguments:
            folder: the directory.
            data: the folder or file of the training data; where the run read it, if that is still there and
                None is given.
            model: the run directory of the model or the file of its weights; likewise.

        Raises:
            InputError: `data` or `model` is given and is not there.
        """
        place = Path(folder)
        place = place if (place / RECORD).is_file() else place.parent
        record = RunRecord.load(place) if (place / RECORD).is_file() else None
        given: dict[str, Any] = {} if record is None else dict(record.configuration)
        if data is not None and not data.exists():
            raise InputError(f"{data}: there is no such file or folder of training data")
        if data is None and given.get("data") is not None and Path(given["data"]).exists():
            data = Path(given["data"])
        if model is not None and weights_in(model) is None:
            raise InputError(f"{model}: neither a file of weights nor a directory with model.safetensors")
        words = given.get("weights") or given.get("model")
        if model is None and words is not None:
            model = Path(str(words).removeprefix("transformers:"))
        blamed = place / "blamed.safetensors"
        return cls(
            record=record,
            data=data,
            model=None if model is None else weights_in(model),
            trained=RunRecord.load(model) if model is not None and (model / RECORD).is_file() else None,
            blamed=blamed if record is not None and blamed.is_file() else None,
        )

    @property
    def time(self) -> str:
        """When the search began, else now; ISO 8601 in UTC."""
        if self.record is not None:
            return self.record.started
        return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

    @property
    def version(self) -> str:
        """Of unpoison, which searched."""
        from unpoison import __version__

        known = None if self.record is None else self.record.versions.get("unpoison")
        return known or __version__

    def named(self, what: str) -> str:
        """What the run called its `data` or `model`; an empty text where it is not known."""
        words = None if self.record is None else self.record.configuration.get(what)
        return "" if words is None else plain(words)

    def file_of(self, name: str) -> Path | None:
        """The file of an example in the folder of the training data, where it is there and within it."""
        if self.data is None or not self.data.is_dir() or not within(name):
            return None
        file = self.data / name
        return file if file.is_file() else None

    def content_hashes(self, findings: Findings) -> dict[int, str]:
        """SHA-256 of the flagged examples: of their files, else of the pixels that the run kept."""
        hashes = _pixel_hashes(self.blamed)
        for index in findings.flagged.tolist():
            file = None if findings.ids is None else self.file_of(findings.ids[index])
            if file is not None:
                hashes[index] = sha256(file)
        return hashes


def within(name: str) -> bool:
    """Whether a name leads into the folder that it is relative to."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def weights_in(place: Path) -> Path | None:
    """The file of weights that this is, or that is in this directory."""
    names = ("model/model.safetensors", "model.safetensors")
    found = [file for file in (place, *(place / name for name in names)) if file.is_file()]
    return found[0] if found else None


def sha256(place: Path) -> str:
    """The hexadecimal SHA-256 of a file, or of a folder as the module's docstring says.

    Raises:
        InputError: it cannot be read.
    """
    try:
        if not place.is_dir():
            with place.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        files = {os.fsencode(one.relative_to(place).as_posix()): one for one in place.rglob("*")}
        lines = hashlib.sha256()
        for name, one in sorted(files.items()):
            if one.is_file():
                escaped = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
                mark = b"" if escaped == name else b"\\"
                lines.update(mark + sha256(one).encode() + b"  " + escaped + b"\n")
        return lines.hexdigest()
    except OSError as error:
        raise InputError(f"{place}: cannot be read ({error.strerror or error})") from None


def _pixel_hashes(blamed: Path | None) -> dict[int, str]:
    if blamed is None:
        return {}
    import safetensors
    from safetensors.numpy import load_file

    try:
        tensors = load_file(blamed)
        pairs = zip(tensors["indices"].tolist(), tensors["images"], strict=True)
        return {index: hashlib.sha256(image.tobytes()).hexdigest() for index, image in pairs}
    except (OSError, safetensors.SafetensorError, KeyError) as error:
        raise InputError(f"{blamed}: damaged ({type(error).__name__})") from None
