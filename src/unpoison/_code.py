"""Digests of the package's source, and the commit it comes from.

What a stage of `unpoison.evaluation` computes depends on its configuration, its inputs and the code that it
runs. `Source.closure` finds that code: the modules that a module imports and those that these import, read
from the text with `ast`. Lazy packages are seen through: `from unpoison.training import predict` leads to the
module that the stub `training/__init__.pyi` names, not to all of `training`. `Source.digest` hashes the
statements of modules without comments, docstrings and declarations (`@register(...)`), so a change of words
changes no digest.

A module whose name is only known at run time (`importlib.import_module(name)`) is not found.

This module does not import torch.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Final, final

from unpoison._artefacts import digest

_PACKAGE: Final = "unpoison"


@final
class Source:
    """The source of the package, and of modules that are built on it.

    Arguments:
        root: the directory in which the package lies.

    >>> closure = Source().closure("unpoison.detectors.deep_knn")
    >>> "unpoison.detectors.deep_knn" in closure, "unpoison.detectors.trak" in closure
    (True, False)
    """

    def __init__(self, root: Path = Path(__file__).parents[1]) -> None:
        self.root = root
        self._modules: dict[str, tuple[str, tuple[str, ...]]] = {}
        self._stubs: dict[str, dict[str, str]] = {}

    def closure(self, *names: str) -> tuple[str, ...]:
        """The named modules and all that they import of their own packages and of this one, sorted.

        Arguments:
            *names: modules, as `unpoison.detectors.trak`; or `package:name` for the module in which a lazy
                package keeps a name, as `unpoison.training:train`.
        """
        found: set[str] = set()
        fresh = [self._resolved(*name.split(":")) if ":" in name else name for name in names]
        while fresh:
            name = fresh.pop()
            if name not in found:
                found.add(name)
                fresh += self._module(name)[1]
        return tuple(sorted(found))

    def digest(self, modules: Iterable[str]) -> str:
        """A digest of the statements of the modules."""
        return digest(*(part for name in sorted(set(modules)) for part in (name, self._module(name)[0])))

    def _module(self, name: str) -> tuple[str, tuple[str, ...]]:
        """The statements of a module, and the modules that it imports."""
        if name not in self._modules:
            path = self._path(name)
            tree = ast.parse("" if path is None else path.read_text(encoding="utf-8"))
            inside = path is not None and path.name == "__init__.py"
            package = name if inside else name.rpartition(".")[0]
            # A lazy package holds nothing but the names that are looked up in it.
            imports = {one for one in self._imported(tree, package) if not self._stub(one)}
            self._modules[name] = ast.unparse(_Plain().visit(tree)), tuple(sorted(imports))
        return self._modules[name]

    def _imported(self, tree: ast.AST, package: str) -> Iterator[str]:
        roots, lazy = {_PACKAGE, package.partition(".")[0]}, dict[str, str]()
        nodes: list[ast.AST] = []
        _collect(tree, nodes)
        for node in nodes:
            if isinstance(node, ast.Import):
                named = [(alias.asname or alias.name, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = _absolute(node, package)
                names = node.names if base.partition(".")[0] in roots else []
                named = [(alias.asname or alias.name, self._resolved(base, alias.name)) for alias in names]
            else:
                continue
            for name, module in named:
                if module.partition(".")[0] in roots:
                    lazy[name] = module
                    yield module
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = lazy.get(node.value.id, "")
                if self._stub(module):
                    yield self._resolved(module, node.attr)

    def _path(self, name: str) -> Path | None:
        """The file of a module, or of the `__init__` of a package; None where there is no source."""
        if name.partition(".")[0] == _PACKAGE:
            place = self.root.joinpath(*name.split("."))
            files = (place.with_suffix(".py"), place / "__init__.py")
            return next((file for file in files if file.is_file()), None)
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            return None
        origin = None if found is None else found.origin
        return Path(origin) if origin is not None and origin.endswith(".py") else None

    def _resolved(self, package: str, name: str) -> str:
        """The module that `from package import name` reads."""
        if self._path(f"{package}.{name}") is not None:
            return f"{package}.{name}"
        return self._stub(package).get(name, package)

    def _stub(self, package: str) -> dict[str, str]:
        """The module of every name of a lazy package; nothing for other modules."""
        if package not in self._stubs:
            file = self._path(package) if package else None
            stub = None if file is None or file.name != "__init__.py" else file.with_suffix(".pyi")
            text = stub.read_text(encoding="utf-8") if stub is not None and stub.is_file() else ""
            self._stubs[package] = {
                alias.asname or alias.name: _absolute(node, package)
                for node in ast.walk(ast.parse(text))
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
            }
        return self._stubs[package]


class _Plain(ast.NodeTransformer):
    """Leaves out strings that stand alone, and declarations of methods."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        alone = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if alone else node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.decorator_list = [one for one in node.decorator_list if not _declares(one)]
        return self.generic_visit(node)


def _declares(decorator: ast.expr) -> bool:
    return (
        isinstance(decorator, ast.Call)
        and isinstance(decorator.func, ast.Name)
        and decorator.func.id == "register"
    )


def _collect(tree: ast.AST, nodes: list[ast.AST]) -> None:
    """Append all imports and attributes but those that only a type checker reads."""
    if isinstance(tree, ast.If) and isinstance(tree.test, ast.Name) and tree.test.id == "TYPE_CHECKING":
        return
    if isinstance(tree, (ast.Import, ast.ImportFrom, ast.Attribute)):
        nodes.append(tree)
    for child in ast.iter_child_nodes(tree):
        _collect(child, nodes)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    """The module or package that a `from ... import` names."""
    if not node.level:
        return node.module or ""
    parents = package.split(".")
    base = ".".join(parents[: len(parents) - node.level + 1])
    return f"{base}.{node.module}" if node.module else base


@cache
def code_digest() -> str:
    """A digest of the files of the whole package, comments included: a few milliseconds."""
    root = Path(__file__).parent
    files = sorted(root.rglob("*.py"))
    return digest(*(part for file in files for part in (str(file.relative_to(root)), file.read_bytes())))


@cache
def commit() -> str:
    """The commit of the checkout that is running, with "-dirty" after changes; of a wheel its version."""
    from unpoison import __version__

    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # of this project, not one around it
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return __version__
