"""What the user vouches for: packages, folders and scripts whose classes a file may name."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from normconv.errors import LoadError, Problem, UsageError

__all__ = ["Trust", "import_quietly", "importable_from_here"]

# Loaded scripts by module name, so that a second file named train.py is told from the first.
_SCRIPTS: dict[str, Path] = {}


@dataclass(frozen=True)
class Trust:
    """Trusted names, checked but not yet imported.

    Args:
        packages: top-level or dotted module names.
        folders: folders to import from; the modules found there are among `packages`.
        scripts: module name of each script with its path; ``__main__.X`` is looked for there.
    """

    packages: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    scripts: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def parse(cls, words: Sequence[str]) -> Trust:
        """Read `--trust` words: a package name, a folder, or a script.

        Raises:
            UsageError: for a word that is none of these, and for the standard library or torch.

        >>> Trust.parse(["mypkg"]).covers("mypkg.net")
        True
        """
        if isinstance(words, str):
            words = (words,)
        packages: list[str] = []
        folders: list[Path] = []
        scripts: dict[str, Path] = {}
        problems: list[Problem] = []
        for word in map(str, words):
            path = Path(word)
            if path.is_dir() and (not word.isidentifier() or not _is_package(path)):
                folders.append(path.resolve())
                packages.extend(_modules_in(path))
            elif path.suffix == ".py":
                if path.is_file():
                    scripts[path.stem] = path.resolve()
                else:
                    problems.append(Problem(f"--trust {word}", "there is no such file"))
            elif not all(part.isidentifier() for part in word.split(".")):
                what = "is neither a folder, nor a .py file, nor a package name"
                problems.append(Problem(f"--trust {word}", what))
            elif reason := _never(word.split(".")[0]):
                problems.append(Problem(f"--trust {word}", reason))
            else:
                packages.append(word)
        for stem in scripts:
            if reason := _never(stem):
                problems.append(Problem(f"--trust {stem}.py", reason, "rename the script"))
        if problems:
            raise UsageError(problems)
        return cls(tuple(packages), tuple(folders), scripts)

    def covers(self, module: str) -> bool:
        """Say whether names of this module are trusted."""
        if module == "__main__":
            return bool(self.scripts)
        return module in self.scripts or any(
            module == package or module.startswith(package + ".") for package in self.packages
        )

    def resolve(self, module: str, name: str) -> Any:
        """Import `module`, which is covered, and return what it calls `name`.

        Raises:
            LoadError: when it cannot be imported or has no such name.
        """
        where = f"{module}.{name}"
        homes = [module]
        if module == "__main__" or module in self.scripts:
            homes = [module] if module in self.scripts else list(self.scripts)
        errors = []
        for home in homes:
            try:
                with importable_from_here(self.folders):
                    found: Any = (
                        _run_script(home, self.scripts[home])
                        if home in self.scripts
                        else import_quietly(home)
                    )
                for part in name.split("."):
                    found = getattr(found, part)
                return found
            except Exception as error:  # the user's own code may raise anything
                errors.append(f"{type(error).__name__}: {error}")
        raise LoadError(Problem(where, f"is trusted and cannot be imported ({'; '.join(errors)})"))


@contextmanager
def importable_from_here(folders: Sequence[Path] = ()) -> Iterator[None]:
    """Let modules be imported from the current folder for a while, and from `folders` for good.

    A trusted folder stays on the path: models import lazily, in `forward` too.
    """
    for folder in folders:
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def import_quietly(module: str) -> ModuleType:
    """Import a module; old files name modules that have moved, which warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def _never(package: str) -> str:
    if package in sys.stdlib_module_names or package == "__main__":
        return "belongs to Python itself, which is never trusted: it can run any command"
    if package == "torch":
        return "torch is not trusted as a whole: its layers are taken anyway, the rest can run code"
    return ""


def _is_package(folder: Path) -> bool:
    return (folder / "__init__.py").is_file()


def _modules_in(folder: Path) -> list[str]:
    names = {entry.stem for entry in folder.glob("*.py")}
    names |= {
        entry.name for entry in folder.iterdir() if entry.is_dir() and any(entry.glob("*.py"))
    }
    return sorted(name for name in names if name.isidentifier() and not _never(name))


def _run_script(name: str, path: Path) -> ModuleType:
    if _SCRIPTS.get(name) == path and name in sys.modules:
        return sys.modules[name]
    if name in sys.modules and name not in _SCRIPTS:
        taken = getattr(sys.modules[name], "__file__", None)
        if taken is not None and Path(taken).resolve() == path:
            return sys.modules[name]
        raise ImportError(f"a module {name!r} is loaded already; rename {path.name}")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is no Python script")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module  # classes of the script are pickled by this name again
    try:
        # A script may import its neighbours.
        with importable_from_here((path.parent,)):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        if before is not None:
            sys.modules[name] = before
        raise
    _SCRIPTS[name] = path
    return module
