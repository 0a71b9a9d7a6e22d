"""What can be plugged in: named things, ours and those of other installed packages, imported when asked for.

A package adds one with an entry point in its `pyproject.toml`:

    [project.entry-points."prophy.backbones"]
    mine = "my_package.my_family:FAMILY"

So every process that has the package installed knows the name, on every node.
"""

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from prophy.errors import ProPhyError


class Registry(Mapping[str, Any]):
    """Names of things to plug in; looking one up imports its module.

    Args:
        group: name of the entry points of other packages.
        own: the product's, as entry points are written: `module:attribute` by name.
    """

    def __init__(self, group: str, own: Mapping[str, str]) -> None:
        self._group = group
        self._own = own

    def __getitem__(self, name: str) -> Any:
        return self._points()[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._points()))

    def __len__(self) -> int:
        return len(self._points())

    def __contains__(self, name: object) -> bool:
        return name in self._points()

    def _points(self) -> dict[str, EntryPoint]:
        """The entry point of each name.

        Raises:
            ProPhyError: two packages have different things of one name.
        """
        points = {name: EntryPoint(name, value, self._group) for name, value in self._own.items()}
        for point in entry_points(group=self._group):
            known = points.setdefault(point.name, point)
            if known.value != point.value:
                raise ProPhyError(
                    f"two installed packages have a {self._group!r} called {point.name!r} ({known.value} and "
                    f"{point.value}); uninstall one of them"
                )
        return points
