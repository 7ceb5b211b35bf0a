"""Old import paths of public names, which work with a DeprecationWarning in this version.

A package that has moved is imported under its old name as a module that looks its names up in the
new one. Nothing is imported before a name is used.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

# Old package -> new one; the names in it are those of the new one.
PACKAGES = {
    "dist_siglip.benchmarks": "dist_siglip.evaluation",
    "dist_siglip.callbacks": "dist_siglip.training.callbacks",
    "dist_siglip.datamodule": "dist_siglip.training.datamodule",
    "dist_siglip.embedding": "dist_siglip.evaluation.embed",
    "dist_siglip.metrics.representations": "dist_siglip.metrics.alignment",
    "dist_siglip.models.export": "dist_siglip.models.interop.export",
    "dist_siglip.module": "dist_siglip.training.module",
    "dist_siglip.optim": "dist_siglip.training.optim",
    "dist_siglip.strategies": "dist_siglip.training.strategies",
}
# Names that have changed, in their new package.
NAMES = {
    "dist_siglip.data.ModelInputs": "Preprocessing",
    "dist_siglip.data.Slot": "StreamPosition",
    "dist_siglip.training.callbacks.StepGuard": "SkipBadSteps",
    "dist_siglip.training.callbacks.StopTogether": "Preemption",
}


def new_path(path: str) -> str:
    """Import path of today of a public name; one that has not moved is returned as it is.

    Example:
        >>> new_path("dist_siglip.callbacks.StepGuard")
        'dist_siglip.training.callbacks.SkipBadSteps'
    """
    package, _, name = path.rpartition(".")
    package = PACKAGES.get(package, package)
    return f"{package}.{NAMES.get(f'{package}.{name}', name)}"


def look_up_in(package: str) -> Callable[[str], object]:
    """Make the ``__getattr__`` of a package that finds its old names where they are now."""

    def find(name: str) -> object:
        old = f"{package}.{name}"
        new_package, _, new_name = new_path(old).rpartition(".")
        missing = AttributeError(f"module {package!r} has no attribute {name!r}")
        if old == f"{new_package}.{new_name}" or (name.startswith("__") and name != "__all__"):
            raise missing
        try:
            found: object = getattr(import_module(new_package), new_name)
        except AttributeError:
            raise missing from None
        warnings.warn(
            f"{old} is now {new_package}.{new_name}; the old path goes in the next version",
            DeprecationWarning,
            stacklevel=2,
        )
        return found

    return find


class _OldPackages:
    """Finder and loader of the old packages, asked when no other finder knows a name."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in PACKAGES:
            return None
        return ModuleSpec(name, _OldPackages, is_package=True)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        """Take Python's own kind of module."""

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Let a module look names up where they are now."""
        module.__getattr__ = look_up_in(module.__name__)  # type: ignore[method-assign]


def install() -> None:
    """Make the old packages importable."""
    if not any(finder is _OldPackages for finder in sys.meta_path):
        sys.meta_path.append(_OldPackages)
