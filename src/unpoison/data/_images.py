"""Images between files and 8-bit pixels, without loss.

Pillow decodes and encodes. What cannot become 8 bits of grey or colour exactly (16 bits a channel, CMYK, an
alpha channel that is not opaque) is refused with the name of the file. A set that mixes grey and coloured
images becomes coloured: a grey pixel is repeated in three channels, which loses nothing.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
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


def read_image(source: str | os.PathLike[str] | bytes | Image.Image, *, where: str | None = None) -> Tensor:
    """Read one image as UInt8[c h w], one channel if it is grey and three if it is coloured.

    PNG, JPEG, WebP, BMP, GIF, TIFF and portable maps are known. The orientation tag of photographs is not
    applied.

    Arguments:
        source: the path of a file, its bytes, or an image that Pillow has opened.
        where: what to call the image in messages; the path when None.

    Raises:
        InputError: there is no such file, it does not decode, or it cannot become 8-bit grey or colour
            without loss (16 bits a channel, CMYK, an alpha channel that is not opaque, several frames).
    """
    if isinstance(source, Image.Image):
        name = where or str(getattr(source, "filename", "")) or "the image"
        return torch.from_numpy(pillow_pixels(name, source))
    encoded = source if isinstance(source, bytes) else Path(source)
    name = where or ("the image" if isinstance(encoded, bytes) else str(encoded))
    return torch.from_numpy(_channels_first(decode(name, encoded)))


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
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0).contiguous()
    buffer = io.BytesIO()
    Image.fromarray(pixels.cpu().numpy()).save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def decode(where: str, encoded: bytes | Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decode one image to UInt8[h w] if it is grey and UInt8[h w 3] if it is coloured.

    Arguments:
        where: what to call the image in messages, e.g. its file name or its file and row.
        encoded: the bytes of the file, or its path.
    """
    content = encoded if isinstance(encoded, bytes) else read_bytes(encoded, where)
    kind = next((kind for beginning, kind in _BEGINNINGS if content.startswith(beginning)), None)
    if kind is None:
        found = "is empty" if not content else "is not an image of a known kind"
        raise InputError(f"{where}: {found} (PNG, JPEG, WebP, BMP, GIF, TIFF, PPM); replace or remove it")
    try:
        with Image.open(io.BytesIO(content), formats=(kind,)) as image:
            return _pixels(where, image)
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


def decode_all(encoded: Sequence[tuple[str, bytes | Path]]) -> Tensor:
    """Decode many images of one size to UInt8[n c h w], in parallel threads.

    One channel if all are grey, else three. The error names the first image, in the order given, that cannot
    be read or has another size.

    Arguments:
        encoded: what to call each image in messages, and its bytes or path. At least one.
    """
    workers = min(8, os.cpu_count() or 1)
    first_where, first = encoded[0][0], decode(*encoded[0])
    size = first.shape[:2]
    starts = range(0, len(encoded), _CHUNK)

    def chunk(start: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        arrays = []
        for where, content in encoded[start : start + _CHUNK]:
            array = decode(where, content)
            if array.shape[:2] != size:
                raise InputError(
                    f"{where}: is {_size(array)} pixels, but {first_where} is {_size(first)}; "
                    "bring all images to one size first"
                )
            arrays.append(_channels_first(array))
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
    return _channels_first(_pixels(where, image))


def _pixels(where: str, image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if image.width * image.height > MAX_PIXELS:
        raise InputError(_bomb(where))
    # Only formats with frames have the attribute.
    if getattr(image, "n_frames", 1) != 1:
        raise InputError(f"{where}: holds several frames; save one of them as an image of its own")
    # Pillow reads 16-bit colour as 8-bit colour, which only the arguments of its decoder show.
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else ()
    if "16" in image.mode or any("16" in str(tile[3]) for tile in tiles):
        raise InputError(
            f"{where}: has 16 bits a channel; convert it to 8 bits, which is what models are given"
        )
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return np.array(image)
    if image.mode == "1":
        return np.array(image.convert("L"))
    if image.mode in ("P", "PA", "RGBA", "LA", "La", "RGBa", "L", "RGB"):
        grey = image.mode in ("L", "LA", "La")
        pixels = np.array(image.convert("RGBA"))
        if (pixels[..., 3] != 255).any():
            raise InputError(
                f"{where}: its alpha channel is not opaque everywhere; put the image on a background and "
                "save it without alpha"
            )
        return np.ascontiguousarray(pixels[..., 0] if grey else pixels[..., :3])
    raise InputError(
        f"{where}: mode {image.mode} does not become 8-bit grey or colour without loss; convert it to RGB"
    )


def _channels_first(array: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _size(array: np.ndarray[Any, Any]) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"


def _bomb(where: str) -> str:
    return f"{where}: has more than {MAX_PIXELS:,} pixels, too many for a training image; make it smaller"


def natural_order(paths: Iterable[Path]) -> list[Path]:
    """Paths sorted so that `part-2` comes before `part-10`."""

    def key(path: Path) -> list[int | str]:
        # Text and numbers alternate, so equal places hold the same type.
        return [int(piece) if piece.isdecimal() else piece for piece in re.split("([0-9]+)", path.name)]

    return sorted(paths, key=lambda path: (key(path), path.name))
