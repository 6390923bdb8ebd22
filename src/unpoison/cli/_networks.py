"""Networks that `--model` names in timm, torchvision and transformers; nothing is downloaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from torch import nn

from unpoison.errors import InputError, MissingExtraError, one_line

LIBRARIES: Final = ("timm", "torchvision", "transformers")


def network_of_library(
    spec: str, *, num_classes: int, shape: tuple[int, ...]
) -> tuple[Callable[[], nn.Module], nn.Module | None] | None:
    """What `timm:NAME`, `torchvision:NAME` or `transformers:FOLDER` names; None for another spec.

    Arguments:
        spec: as given to `--model`.
        num_classes: of the training set; how many logits the network gets.
        shape: channels, height and width of its images.

    Returns:
        A function that builds the network anew, and the trained one where the spec holds weights.

    Raises:
        InputError: the library has no such network, or cannot be imported.
        MissingExtraError: it is not installed.
    """
    library, _, name = spec.partition(":")
    if library not in LIBRARIES or not name:
        return None
    found = _imported(spec, library if library != "torchvision" else "torchvision.models")
    try:
        if library == "timm":
            return _of_timm(found, name, num_classes, shape), None
        if library == "torchvision":
            found.get_model_builder(name)
            return lambda: found.get_model(name, weights=None, num_classes=num_classes), None
        return _of_transformers(found, name)
    except InputError:
        raise
    except Exception as error:  # each library has exceptions of its own
        raise InputError(f"--model {spec}: {one_line(error)[:300]}") from error


def _imported(spec: str, package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        library = package.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] == library:
            raise MissingExtraError(f"--model {spec}: needs {library}: pip install {library}") from None
        raise InputError(f"--model {spec}: importing {library} failed ({one_line(error)[:300]})") from error
    except Exception as error:
        raise InputError(f"--model {spec}: importing {package} failed ({one_line(error)[:300]})") from error


def _of_timm(timm: Any, name: str, num_classes: int, shape: tuple[int, ...]) -> Callable[[], nn.Module]:
    if len(shape) != 3:
        raise InputError(f"--model timm:{name}: is for images [c, h, w], found inputs of shape {shape}")
    if not timm.is_model(name):
        raise InputError(f"--model timm:{name}: timm has no such model; timm.list_models() lists them")
    options = {"pretrained": False, "num_classes": num_classes, "in_chans": shape[0]}

    def build() -> nn.Module:
        try:  # transformers are built for one size of images
            network: nn.Module = timm.create_model(name, img_size=shape[1:], **options)
        except TypeError:
            network = timm.create_model(name, **options)
        return network

    return build


def _of_transformers(transformers: Any, folder: str) -> tuple[Callable[[], nn.Module], nn.Module]:
    where = f"--model transformers:{folder}"
    if not Path(folder).is_dir():
        raise InputError(f"{where}: no such folder; expected one written by save_pretrained")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    names = list(getattr(config, "architectures", None) or ())
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise InputError(f"{where}: its config.json names no architecture of transformers")
    trained = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return lambda: kind(config), trained
