"""`Trained`: a trained model and how it was made.

Stored as model.safetensors and trained.json, and dropped.safetensors where there was a defense.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unpoison._artefacts import atomic_directory, read_json, write_json
from unpoison.errors import InputError, MismatchError, one_line
from unpoison.models import build
from unpoison.training._epoch_record import EpochRecord
from unpoison.training._recipe import Recipe
from unpoison.training._voting_network import Voting

_WEIGHTS, _DESCRIPTION, _DROPPED = "model.safetensors", "trained.json", "dropped.safetensors"


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    """What `train` and `Unlearner.heal` return.

    Arguments:
        model: in eval mode.
        recipe: how it was trained; None where that is not known, as of a network of the caller's own that was
            healed without one.
        seed: of initialisation, order and augmentation.
        class_names: one a logit.
        image_shape: channels, height and width of the images it was trained on; of other inputs their shape,
            empty for inputs by name.
        training_fingerprint: of the training set (the whole set, also where a mask chose among its examples).
        history: one record an epoch.
        seconds: wall-clock time of all epochs, those before an interruption included.
        own_model: whether the network came from the caller and not from the recipe.
        tuning: of a network that was healed by training without a recipe: which optimiser and learning rate
            were found, and how; None for all others.
        defense: its `repr` under "name", and what it reported; None where there was none.
        dropped: Int64[k], ascending: the examples, among those included, that the defense had dropped by the
            last epoch.
    """

    model: nn.Module
    recipe: Recipe | None
    seed: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]
    training_fingerprint: str
    history: tuple[EpochRecord, ...] = ()
    seconds: float = 0.0
    own_model: bool = False
    tuning: Mapping[str, Any] | None = None
    defense: Mapping[str, Any] | None = None
    dropped: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the directory, whole or not at all: weights as safetensors, the rest as JSON.

        Of a network of the caller's own, weights and class name are stored.
        """
        with atomic_directory(directory) as staging:
            # Clones: tied weights share memory, which safetensors refuses.
            weights = {
                name: tensor.detach().cpu().contiguous().clone()
                for name, tensor in self.model.state_dict().items()
            }
            save_file(weights, staging / _WEIGHTS)
            defended: dict[str, Any] = {}
            if self.defense is not None:
                save_file({"dropped": self.dropped.cpu().contiguous()}, staging / _DROPPED)
                defended = {"defense": dict(self.defense)}
            write_json(
                staging / _DESCRIPTION,
                {
                    "schema": 1,
                    "recipe": None if self.recipe is None else self.recipe.to_dict(),
                    "seed": self.seed,
                    "class_names": list(self.class_names),
                    "image_shape": list(self.image_shape),
                    "training_fingerprint": self.training_fingerprint,
                    "own_model": type(self.model).__qualname__ if self.own_model else None,
                    "normalized": "mean" in weights or "networks.0.mean" in weights,
                    **({} if not isinstance(self.model, Voting) else {"voting": list(self.model.uses.shape)}),
                    "seconds": self.seconds,
                    "history": [record.to_dict() for record in self.history],
                    **({} if self.tuning is None else {"tuning": dict(self.tuning)}),
                    **defended,
                },
            )

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        model: nn.Module | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Read what `save` wrote.

        Arguments:
            directory: as given to `save`.
            model: for a network of the caller's own: a freshly built one, which receives the weights. A
                network that was built from the recipe is built again.
            device: where to put the model.

        Raises:
            InputError: no such directory, or a damaged file.
            MismatchError: the weights do not fit the model.
        """
        path = Path(directory)
        if not path.is_dir():
            raise InputError(f"{path}: no such directory; expected one written by Trained.save")
        description = read_json(path / _DESCRIPTION)
        try:
            weights = load_file(path / _WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path / _WEIGHTS}: cannot be read ({error})") from None
        try:
            given = description["recipe"]
            recipe = None if given is None else Recipe.from_dict(given)
            shape = tuple(int(side) for side in description["image_shape"])
            class_names = tuple(str(name) for name in description["class_names"])
            own: str | None = description["own_model"]
            if model is None and own is not None:
                raise InputError(
                    f"{path}: holds the weights of a network of your own ({own}); pass a new one as model="
                )
            network = model
            if network is None:
                if recipe is None:
                    raise InputError(f"{path / _DESCRIPTION}: has no recipe to build the network from")
                channels, height, width = shape
                network = build(
                    recipe.model,
                    num_classes=len(class_names),
                    in_channels=channels,
                    image_size=(height, width),
                    width=recipe.width,
                    seed=0,
                    normalization=((0.0,) * channels, (1.0,) * channels)
                    if description["normalized"]
                    else None,
                )
            if "voting" in description:
                networks, spread = map(int, description["voting"])
                network = Voting.like(network, networks=networks, spread=spread)
            _load_weights(network, weights, path)
            return cls(
                model=network.to(device).eval(),
                recipe=recipe,
                seed=int(description["seed"]),
                class_names=class_names,
                image_shape=shape,
                training_fingerprint=str(description["training_fingerprint"]),
                history=tuple(EpochRecord(**record) for record in description["history"]),
                seconds=float(description["seconds"]),
                own_model=own is not None,
                tuning=description.get("tuning"),
                **_defended(path, description),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path / _DESCRIPTION}: not as Trained.save writes it ({type(error).__name__}: {error})"
            ) from None


def _defended(path: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a defended run."""
    if "defense" not in description:
        return {}
    try:
        dropped = load_file(path / _DROPPED)["dropped"]
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{path / _DROPPED}: cannot be read ({error})") from None
    return {"defense": dict(description["defense"]), "dropped": dropped}


def _load_weights(network: nn.Module, weights: dict[str, Any], path: Path) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise MismatchError(f"{path}: the weights do not fit this model: {one_line(error)[:300]}") from None
