"""ASSET: what the mixture takes for a group, what the loss is, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from unpoison import detectors
from unpoison.detectors.asset import higher_group, variance_loss
from unpoison.errors import InputError


def test_the_loss_is_that_of_a_plain_loop() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).double()
    for row, loss in zip(logits.tolist(), variance_loss(logits).tolist(), strict=True):
        mean = sum(row) / 4
        assert loss == pytest.approx(math.log1p(sum((one - mean) ** 2 for one in row) / 4))


def test_a_higher_group_is_found_and_one_group_is_none() -> None:
    draw = torch.Generator().manual_seed(2)
    one = torch.randn(2000, generator=draw).double()
    assert higher_group(one) is None
    both = torch.cat([one, 8 + 0.5 * torch.randn(60, generator=draw).double()])
    odds = higher_group(both)
    assert odds is not None
    assert (odds > 0).nonzero()[:, 0].tolist() == list(range(2000, 2060))
    # The wider part may not claim the lower end.
    assert float(odds[both.argmin()]) < 0


@pytest.mark.parametrize(
    "values",
    [torch.ones(50), torch.arange(3.0), torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0]), torch.zeros(0)],
)
def test_few_or_equal_values_are_no_groups(values: torch.Tensor) -> None:
    assert higher_group(values.double()) is None


def test_the_mixture_is_a_maximum_of_the_likelihood() -> None:
    """Against sklearn, which starts elsewhere."""
    from sklearn.mixture import GaussianMixture

    draw = torch.Generator().manual_seed(3)
    values = torch.cat([torch.randn(500, generator=draw), 6 + torch.randn(50, generator=draw)]).double()
    odds = higher_group(values)
    assert odds is not None
    peer = GaussianMixture(2, random_state=0, tol=1e-7, max_iter=2000).fit(values.numpy()[:, None])
    chances = peer.predict_proba(values.numpy()[:, None])[:, int(peer.means_[:, 0].argmax())]
    torch.testing.assert_close(odds.sigmoid(), torch.from_numpy(chances), rtol=0, atol=1e-3)


def test_options_out_of_range_and_a_reference_of_another_shape_are_refused(planted: Any) -> None:
    for options in ({"steps": 0}, {"concentrated": 0.0}, {"momentum": 1.0}):
        with pytest.raises(InputError):
            detectors.get("asset", **options)
    scene, other = planted(), planted(side=3)
    with pytest.raises(InputError, match="a reference needs inputs of shape"):
        detectors.get("asset").find(scene.model, scene.training_set, reference=other.training_set)
