"""The two ways to one matrix product."""

from __future__ import annotations

import torch

from unpoison.influence._products import products


def test_products_are_inner_products_of_rows_whatever_their_layout() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        for m, b, p in ((1, 1, 1), (3, 5, 7), (50, 9, 600)):
            left, right = (torch.randn(rows, p, generator=generator, dtype=dtype) for rows in (m, b))
            expected = (left.double()[:, None] * right.double()).sum(2).to(dtype)
            torch.testing.assert_close(products(left, right), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                products(left, right.t().contiguous().t()), expected, rtol=1e-4, atol=1e-4
            )
