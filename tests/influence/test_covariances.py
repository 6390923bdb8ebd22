import pytest
import torch
from torch import nn
from torch.nn import functional

from unpoison.influence._covariances import PatchProducts, add_gram_
from unpoison.influence._layers import Scratch


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kernel", "padding", "dilation"),
    [
        ((3, 3), (1, 1), (1, 1)),
        ((3, 3), (0, 0), (1, 1)),
        ((3, 3), (2, 2), (2, 2)),
        ((3, 3), (3, 3), (1, 1)),  # more padding than the kernel reaches
        ((1, 5), (0, 2), (1, 1)),
        ((4, 2), (1, 0), (1, 3)),
        ((5, 5), (2, 1), (1, 1)),
    ],
)
def test_patch_products_are_those_of_the_patches(
    kernel: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(3, 2, kernel, padding=padding, dilation=dilation, bias=bias, dtype=torch.float64)
    width = 3 * kernel[0] * kernel[1]
    total = torch.zeros(width + bias, width + bias, dtype=torch.float64)
    products, scratch = PatchProducts(conv, bias, total), Scratch()
    expected = torch.zeros_like(total)
    for size in ((5, 6), (5, 6), (8, 5)):  # maps of another size begin anew
        if any(
            n + 2 * p < d * (k - 1) + 1 for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)
        ):
            continue
        maps = torch.randn(4, 3, *size, dtype=torch.float64, generator=generator)
        products.add(maps[:3], conv(maps).shape[2:], scratch)
        products.add(maps[3:], conv(maps).shape[2:], scratch)
        patches = functional.unfold(maps, kernel, dilation, padding)  # channel, kernel position
        patches = patches.unflatten(1, (3, -1)).movedim(1, 2).flatten(1, 2).transpose(1, 2).flatten(0, 1)
        if bias:
            patches = torch.cat([patches, torch.ones(len(patches), 1, dtype=torch.float64)], 1)
        expected += patches.t() @ patches
    products.finish()
    torch.testing.assert_close(total.triu(), expected.triu())


def test_a_map_smaller_than_the_kernel() -> None:
    conv = nn.Conv2d(16, 1, 3, padding=1, bias=False, dtype=torch.float64)
    total = torch.zeros(144, 144, dtype=torch.float64)
    products = PatchProducts(conv, False, total)
    maps = torch.randn(2, 16, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    products.add(maps, torch.Size([1, 1]), Scratch())
    products.finish()
    expected = torch.zeros_like(total)
    expected[64:80, 64:80] = maps[:, :, 0, 0].t() @ maps[:, :, 0, 0]  # the middle of the kernel
    torch.testing.assert_close(total.triu(), expected.triu())


def test_the_upper_triangle_of_a_gram_matrix() -> None:
    rows = torch.randn(7, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = torch.ones(300, 300, dtype=torch.float64)
    add_gram_(total, rows)
    torch.testing.assert_close(total.triu(), (rows.t() @ rows + 1).triu())
