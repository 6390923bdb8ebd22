"""Images between files and 8-bit pixels, without loss.

Pillow decodes and encodes. What cannot become 8 bits of grey or colour exactly (16 bits a channel, an alpha
channel that is not opaque) is refused with the name of the file; CMYK is converted as Pillow does, and so as
torchvision and timm load it; of an animated GIF the first frame is taken. A set that mixes grey and coloured
images becomes coloured: a grey pixel is repeated in three channels, which loses nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from unpoison._artefacts import read_bytes
from unpoison.errors import InputError, one_line

SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)
"""The suffixes of file names that are taken to be images."""

MAX_PIXELS = 1 << 26
"""Larger images are refused: a small file can hold an image that fills the memory (a decompression bomb)."""

_CHUNK = 256

# How files of each format begin. Naming one format to Pillow halves the time to decode a small image, and
# keeps its rarely used decoders away from untrusted files.
_BEGINNINGS = (
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"RIFF", "WEBP"),
    (b"BM", "BMP"),
    (b"GIF8", "GIF"),
    (b"II", "TIFF"),
    (b"MM", "TIFF"),
    *((b"P%d" % number, "PPM") for number in range(1, 7)),
)


@final
@dataclass(frozen=True, slots=True)
class Part:
    """An encoded image that is a part of a file, such as of a tar file: `size` bytes from `offset`."""

    path: Path
    offset: int
    size: int

    def read(self, where: str) -> bytes:
        """The bytes, of an image that is called `where` in messages."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            raise InputError(f"{where}: cannot be read ({error.strerror or error})") from None


Encoded = Path | Part
"""Where the bytes of an image file lie."""


@final
@dataclass(frozen=True)
class Preparation:
    """How pictures are brought to one size and turned, before their pixels are taken.

    Arguments:
        size: the shorter side is resized to so many pixels and the middle square is cut out; None leaves
            pictures as they are.
        orient: turn photographs as their EXIF orientation says.

    Raises:
        InputError: the size is below 1.
    """

    size: int | None = None
    orient: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise InputError(f"size {self.size}: must be at least 1 pixel")

    def __str__(self) -> str:
        parts = [
            *(["turned by their EXIF orientation"] if self.orient else []),
            *(
                [
                    f"shorter side resized to {self.size} pixels (area average, bilinear where enlarged), "
                    f"then cropped to the middle {self.size}x{self.size}"
                ]
                if self.size is not None
                else []
            ),
        ]
        return "; ".join(parts)

    def apply(self, image: Image.Image) -> Image.Image:
        """The picture, prepared."""
        if self.orient:
            image = ImageOps.exif_transpose(image)
        if self.size is None:
            return image
        if image.mode not in ("L", "RGB"):
            image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
        width, height = image.size
        scale = self.size / min(width, height)
        wide, high = max(self.size, round(width * scale)), max(self.size, round(height * scale))
        method = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
        image = image.resize((wide, high), method)
        left, top = (wide - self.size) // 2, (high - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))


AS_THEY_ARE: Final = Preparation()


def read_image(
    source: str | os.PathLike[str] | bytes | Image.Image,
    *,
    where: str | None = None,
    preparation: Preparation = AS_THEY_ARE,
) -> Tensor:
    """Read one image as UInt8[c h w], one channel if it is grey and three if it is coloured.

    PNG, JPEG, WebP, BMP, GIF, TIFF and portable maps are known. The orientation tag of photographs is not
    applied unless `preparation` says so.

    Arguments:
        source: the path of a file, its bytes, or an image that Pillow has opened.
        where: what to call the image in messages; the path when None.
        preparation: how to bring it to a size.

    Raises:
        InputError: there is no such file, it does not decode, or it cannot become 8-bit grey or colour
            without loss (16 bits a channel, an alpha channel that is not opaque, several pages).
    """
    if isinstance(source, Image.Image):
        name = where or str(getattr(source, "filename", "")) or "the image"
        return torch.from_numpy(pillow_pixels(name, source))
    encoded = source if isinstance(source, bytes) else Path(source)
    name = where or ("the image" if isinstance(encoded, bytes) else str(encoded))
    return torch.from_numpy(pixels_channels_first(decode(name, encoded, preparation)))


def encode_png(image: Tensor, *, compress_level: int = 6) -> bytes:
    """The bytes of a PNG file of a grey or coloured image UInt8[c h w].

    Arguments:
        image: of 1 or 3 channels, on any device.
        compress_level: from 0 (fastest) to 9 (smallest).

    Raises:
        InputError: it has another number of channels.

    >>> pixels = torch.zeros(3, 2, 2, dtype=torch.uint8)
    >>> torch.equal(read_image(encode_png(pixels)), pixels)
    True
    """
    if len(image) not in (1, 3):
        raise InputError(f"images of {len(image)} channels cannot be written as PNG; 1 and 3 can")
    buffer = io.BytesIO()
    pillow_picture(image).save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def decode(
    where: str, encoded: bytes | Encoded, preparation: Preparation = AS_THEY_ARE
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decode one image to UInt8[h w] if it is grey and UInt8[h w 3] if it is coloured.

    Arguments:
        where: what to call the image in messages, e.g. its file name or its file and row.
        encoded: the bytes of the file, or where they lie.
    """
    with _open(where, encoded) as image:
        return _pixels(where, image, preparation)


def opened(where: str, encoded: bytes | Encoded, preparation: Preparation) -> Image.Image:
    """The picture in RGB, prepared, as torchvision and timm load it: an alpha channel is dropped."""
    with _open(where, encoded) as image:
        _check(where, image)
        # A picture that is RGB already is not copied.
        return preparation.apply(image).convert("RGB")


def is_coloured(where: str, encoded: Encoded) -> bool:
    """Whether an image decodes to three channels; only its head is decoded."""
    with _open(where, encoded) as image:
        return image.mode not in ("1", "L", "LA", "La")


@contextlib.contextmanager
def _open(where: str, encoded: bytes | Encoded) -> Iterator[Image.Image]:
    """A picture of Pillow, whose errors in the block become ours."""
    if isinstance(encoded, Part):
        encoded = encoded.read(where)
    content = encoded if isinstance(encoded, bytes) else read_bytes(encoded, where)
    kind = next((kind for beginning, kind in _BEGINNINGS if content.startswith(beginning)), None)
    if kind is None:
        found = "is empty" if not content else "is not an image of a known kind"
        raise InputError(f"{where}: {found} (PNG, JPEG, WebP, BMP, GIF, TIFF, PPM); replace or remove it")
    try:
        with Image.open(io.BytesIO(content), formats=(kind,)) as image:
            yield image
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(_bomb(where)) from None
    except MemoryError:
        raise InputError(f"{where}: does not fit into memory; make it smaller") from None
    # Pillow's decoders raise many kinds of error on damaged files: OSError, SyntaxError, ValueError,
    # struct.error, IndexError and others.
    except Exception as error:
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({one_line(error)})"
        raise InputError(f"{where}: does not decode as an image{reason}; replace or remove it") from None


def decode_all(
    encoded: Sequence[tuple[str, bytes | Encoded]], preparation: Preparation = AS_THEY_ARE
) -> Tensor:
    """Decode many images of one size to UInt8[n c h w], in parallel threads.

    One channel if all are grey, else three. The error names the first image, in the order given, that cannot
    be read or has another size.

    Arguments:
        encoded: what to call each image in messages, and its bytes or where they lie. At least one.
        preparation: how to bring them to one size.
    """
    workers = min(8, os.cpu_count() or 1)
    first_where, first = encoded[0][0], decode(*encoded[0], preparation)
    size = first.shape[:2]
    starts = range(0, len(encoded), _CHUNK)

    def chunk(start: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        arrays = []
        for where, content in encoded[start : start + _CHUNK]:
            array = decode(where, content, preparation)
            if array.shape[:2] != size:
                raise InputError(different_size(where, array.shape, first_where, size))
            arrays.append(pixels_channels_first(array))
        channels = max(map(len, arrays))
        return np.stack([np.broadcast_to(array, (channels, *size)) for array in arrays])

    with ThreadPoolExecutor(workers) as pool:
        try:
            chunks = list(pool.map(chunk, starts))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    channels = max(part.shape[1] for part in chunks)
    images = np.empty((len(encoded), channels, *size), np.uint8)
    for start, part in zip(starts, chunks, strict=True):
        images[start : start + _CHUNK] = part
    return torch.from_numpy(images)


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is a system's own, such as `.DS_Store`."""
    return path.name.startswith((".", "__"))


def pillow_pixels(where: str, image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """UInt8[c h w] of an image that Pillow has opened; `where` is what to call it in messages."""
    return pixels_channels_first(_pixels(where, image))


def _pixels(
    where: str, image: Image.Image, preparation: Preparation = AS_THEY_ARE
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    _check(where, image)
    if preparation != AS_THEY_ARE:
        _check_opaque(where, image)  # which the preparation would drop
        image = preparation.apply(image)
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return np.array(image)
    if image.mode == "1":
        return np.array(image.convert("L"))
    if image.mode in ("P", "PA", "RGBA", "LA", "La", "RGBa", "L", "RGB"):
        _check_opaque(where, image)
        grey = image.mode in ("L", "LA", "La")
        pixels = np.array(image.convert("RGBA"))
        return np.ascontiguousarray(pixels[..., 0] if grey else pixels[..., :3])
    if image.mode == "CMYK":  # as torchvision and timm load it
        return np.array(image.convert("RGB"))
    raise InputError(
        f"{where}: mode {image.mode} does not become 8-bit grey or colour without loss; convert it to RGB"
    )


def _check_opaque(where: str, image: Image.Image) -> None:
    """That nothing of a picture is transparent."""
    if image.mode not in ("PA", "RGBA", "LA", "La", "RGBa") and "transparency" not in image.info:
        return
    if image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        raise InputError(
            f"{where}: its alpha channel is not opaque everywhere; put the image on a background and "
            "save it without alpha"
        )


def _check(where: str, image: Image.Image) -> None:
    """That a picture is one of a bounded size and of 8 bits a channel."""
    if image.width * image.height > MAX_PIXELS:
        raise InputError(_bomb(where))
    # Only formats with frames have the attribute. Of a GIF the first frame is what other readers take.
    if getattr(image, "n_frames", 1) != 1 and image.format != "GIF":
        raise InputError(f"{where}: holds several frames; save one of them as an image of its own")
    check_eight_bits(where, image)


def check_eight_bits(where: str, image: Image.Image) -> None:
    """That an image has no more than 8 bits a channel.

    Raises:
        InputError: it has 16 or 32.
    """
    # Pillow reads 16-bit colour as 8-bit colour, which only the arguments of its decoder show.
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else ()
    deep = image.mode in ("I", "F") or "16" in image.mode
    if deep or any("16" in str(tile[3]) for tile in tiles):
        bits = 32 if image.mode in ("I", "F") else 16
        raise InputError(
            f"{where}: has {bits} bits a channel; convert it to 8 bits, which is what models are given"
        )


def pixels_channels_first(
    array: np.ndarray[Any, np.dtype[np.uint8]],
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """UInt8[c h w] of UInt8[h w] or UInt8[h w 3]."""
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def different_size(where: str, size: Sequence[int], other: str, other_size: Sequence[int]) -> str:
    """The message about two images of a set that differ in height and width."""
    return (
        f"{where}: is {size[1]}x{size[0]} pixels, but {other} is {other_size[1]}x{other_size[0]}; "
        "bring all images to one size first, or give size= (--size)"
    )


def pillow_picture(image: Tensor) -> Image.Image:
    """A picture of Pillow of a grey or coloured image UInt8[c h w]."""
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0).contiguous()
    return Image.fromarray(pixels.cpu().numpy())


def _bomb(where: str) -> str:
    return f"{where}: has more than {MAX_PIXELS:,} pixels, too many for a training image; make it smaller"


def natural_order(paths: Iterable[Path]) -> list[Path]:
    """Paths sorted so that `part-2` comes before `part-10`."""

    def key(path: Path) -> list[int | str]:
        # Text and numbers alternate, so equal places hold the same type.
        return [int(piece) if piece.isdecimal() else piece for piece in re.split("([0-9]+)", path.name)]

    return sorted(paths, key=lambda path: (key(path), path.name))
