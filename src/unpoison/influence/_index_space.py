"""The space in which an `InfluenceIndex` keeps gradients, and what its record says of how they were made.

The space is spanned by the sketches of some training examples. What lies outside of it is sketched once more,
to `RESIDUAL` numbers. Where as many numbers are kept as a sketch has, the space is that of all sketches: the
coordinates are the sketch itself, and nothing is multiplied. The large products are of bfloat16 where the
processor has matrix instructions for it: a coordinate is a sum over D terms, whose rounding cancels. The
leading coordinates, which are much larger than the others, are computed in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from functools import cache
from typing import Any, Final, cast, final

import torch
from torch import Tensor

from unpoison._artefacts import canonical_json
from unpoison._code import Source
from unpoison._seeds import derive_seed, generator
from unpoison.errors import InputError
from unpoison.influence._projection import count_sketch
from unpoison.influence._queries import AbsoluteDamping, Damping, RelativeDamping
from unpoison.tasks import Task

#: r
RESIDUAL: Final = 512
#: How many coordinates are computed in float32.
LEADING: Final = 64
_AT_A_TIME: Final = 32
# The share of the largest eigenvalue of the Gram matrix below which a direction is rounding.
_RANK: Final = 1e-6
_COLUMNS: Final = 4096
_DAMPINGS: Final = {"AbsoluteDamping": AbsoluteDamping, "RelativeDamping": RelativeDamping}
_CODE: Final = (
    *(
        f"unpoison.influence._{name}"
        for name in (
            "attention",
            "bare",
            "covariances",
            "diagonal_layers",
            "factors",
            "index_build",
            "index_rows",
            "index_space",
            "layers",
            "projection",
            "queries",
            "recurrent",
            "sketch",
            "steps",
            "sweep",
        )
    ),
    "unpoison._stable",
    "unpoison.tasks._classification",
)


@final
class Space:
    """The space of an index: its basis, and the sketch of what lies outside of it to r numbers.

    Arguments:
        basis: Float[m D], rows in the order of the eigenvalues, in the type of `quick_type`; of no rows where
            the space is that of all sketches.
        leading: Float32[l D], the first of them, which matter most, more precisely.
        seed: of the sketch.
    """

    def __init__(self, basis: Tensor, leading: Tensor, seed: int) -> None:
        self._basis, self._leading, self.width = basis, leading, basis.shape[1]
        self.whole = not len(basis)
        self._residual = 0 if self.whole else min(RESIDUAL, self.width)
        if self.whole:
            return
        places, signs = count_sketch(self.width, self._residual, generator(seed))
        self._places, self._signs = places.to(basis.device), signs.to(leading)
        parts = leading, basis[len(leading) :]
        self._of_basis = torch.cat([self._outside(part) for part in parts])

    @classmethod
    def of_record(
        cls, tensors: Mapping[str, Tensor], record: Mapping[str, Any], device: torch.device
    ) -> Space:
        """The space that is kept, on a device."""
        basis = tensors["basis"].to(device, quick_type(device))
        return cls(basis, tensors["leading"].to(device), derive_seed(record["seed"], "residual"))

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Float32[b m] and Float32[b r]: c and z of Float[b D]."""
        rows = rows.to(self._leading)
        if self.whole:
            return rows, rows[:, :0]
        rest = torch.mm(rows.to(self._basis), self._basis[len(self._leading) :].t())
        values = torch.cat([rows @ self._leading.t(), rest.to(rows)], 1)
        return values, self._outside(rows) - values @ self._of_basis

    def _outside(self, rows: Tensor) -> Tensor:
        return sketched(rows, self._places, self._signs, self._residual)


def sketched(rows: Tensor, places: Tensor, signs: Tensor, size: int) -> Tensor:
    """Float[b size]: the count sketch of rows by places and signs of `count_sketch`."""
    parts = [signs.new_zeros(0, size)]
    for some in torch.split(rows, _AT_A_TIME):
        ordered = some.index_select(1, places).to(signs).mul_(signs)
        parts.append(ordered.view(len(some), len(places) // size, size).sum(1))
    return torch.cat(parts)


def quick_type(device: torch.device) -> torch.dtype:
    """The type of the large products: bfloat16 where the processor has instructions for matrices of it."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # not in every version of torch
    return torch.bfloat16 if tiles() else torch.float32


def unit_rows(rows: Tensor, lengths: Tensor) -> Tensor:
    """Float[b D] rows, which are overwritten, over Float64[b] lengths; 0 where the length is."""
    inverse = torch.where(lengths > 0, 1 / lengths, torch.zeros_like(lengths))
    return rows.mul_(inverse.to(rows)[:, None])


def span_of(rows: Tensor) -> dict[str, Tensor]:
    """An orthonormal basis of the span of Float[m D] rows: `basis` and `leading`, see `Space`.

    Rows beyond the rank are 0.
    """
    quick = quick_type(rows.device)
    gram = torch.zeros(len(rows), len(rows), device=rows.device, dtype=torch.float64)
    # In parts, as a sum in bfloat16 has its few digits.
    columns = [slice(start, start + _COLUMNS) for start in range(0, rows.shape[1], _COLUMNS)]
    for own in columns:
        some = rows[:, own].to(quick)
        gram += torch.mm(some, some.t())
    values, vectors = torch.linalg.eigh((gram + gram.t()) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = values > _RANK * values[0]
    scaled = torch.where(kept, vectors / values.clamp(min=_RANK * float(values[0]) or 1.0).sqrt(), 0)
    turned = scaled.t().float()
    basis, quickly = rows.new_zeros(rows.shape, dtype=quick), turned.to(quick)
    leading = turned.new_zeros(min(LEADING, len(rows)), rows.shape[1])
    for own in columns:
        basis[:, own] = torch.mm(quickly, rows[:, own].to(quick))
        leading[:, own] = turned[:LEADING] @ rows[:, own].float()
    return {"basis": basis, "leading": leading}


def coordinates_of(space: Space, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Float64[q m] and Float64[q r] of Float[q D], on the CPU."""
    # Of unit length, so that the few digits of bfloat16 are those of the direction.
    scale = rows.double().norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    values, residuals = space.of((rows / scale).float())
    scale = scale.cpu()
    return scale * values.double().cpu(), scale * residuals.double().cpu()


@cache
def code() -> str:
    """A digest of the code that makes the rows."""
    return Source().digest(_CODE)


def task_text(task: Task) -> str:
    """A task as text, for a record."""
    kind, own = type(task), cast("Any", task)
    settings: Mapping[str, Any] = asdict(own) if is_dataclass(kind) else {}
    return f"{kind.__module__}.{kind.__qualname__} {canonical_json(dict(settings))}"


def damping_record(damping: Damping) -> dict[str, Any]:
    """A damping as JSON values.

    Raises:
        InputError: it is of a class that cannot be read back.
    """
    name = type(damping).__name__
    if not isinstance(damping, AbsoluteDamping | RelativeDamping):
        raise InputError(f"damping: an index takes {' or '.join(_DAMPINGS)}, found {name}")
    return {"name": name, **asdict(damping)}


def damping_of(record: Mapping[str, Any]) -> Damping:
    """The damping of a record."""
    values = {key: value for key, value in record.items() if key != "name"}
    damping: Damping = _DAMPINGS[record["name"]](**values)
    return damping
