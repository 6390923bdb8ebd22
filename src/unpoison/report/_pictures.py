"""Images as `data:` addresses, so that the page needs no other file."""

from __future__ import annotations

import base64

import numpy as np
import numpy.typing as npt
import torch

from unpoison.data import encode_png

THUMBNAIL_SIDE = 96
OBSERVATION_SIDE = 256


def data_uri(image: npt.NDArray[np.uint8], *, longest_side: int = THUMBNAIL_SIDE) -> str:
    """The UInt8[c h w] image as a lossless PNG in a `data:` address.

    One channel is grey, three are colours; of other counts the first channel is shown. Images larger than
    `longest_side` are shrunk to it (area average); small ones keep their pixels; the browser enlarges them.
    """
    if image.shape[0] != 3:
        image = image[:1]
    longest = max(image.shape[1:])
    if longest > longest_side:
        from PIL import Image

        height, width = (max(1, round(side * longest_side / longest)) for side in image.shape[1:])
        shrunk = [Image.fromarray(channel).resize((width, height), Image.Resampling.BOX) for channel in image]
        image = np.stack([np.asarray(channel) for channel in shrunk])
    encoded = encode_png(torch.tensor(image), compress_level=9)
    return "data:image/png;base64," + base64.b64encode(encoded).decode("ascii")
