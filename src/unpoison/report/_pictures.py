"""Images as `data:` addresses, so that the page needs no other file."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt

THUMBNAIL_SIDE = 96
OBSERVATION_SIDE = 256


def data_uri(image: npt.NDArray[np.uint8], *, longest_side: int = THUMBNAIL_SIDE) -> str:
    """The UInt8[c h w] image as a lossless PNG in a `data:` address.

    One channel is grey, three are colours; of other counts the first channel is shown. Images larger than
    `longest_side` are shrunk to it (area average); small ones keep their pixels; the browser enlarges them.
    """
    from PIL import Image

    pixels = np.ascontiguousarray(image.transpose(1, 2, 0) if image.shape[0] == 3 else image[0])
    picture = Image.fromarray(pixels)
    longest = max(picture.size)
    if longest > longest_side:
        ratio = longest_side / longest
        size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
        picture = picture.resize(size, Image.Resampling.BOX)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
