"""Tables of what a configuration names: each entry has a name, options and a way to make it."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
M = TypeVar("M", bound=Callable[..., object])


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One row of a table.

    Attributes:
        name: As a configuration says it.
        options: A frozen dataclass, whose fields are what a configuration may say beside the name.
        make: Class or function that is called with an instance of ``options`` among its arguments.
    """

    name: str
    options: type[Any]
    make: Callable[..., T]


class Registry(Generic[T]):
    """One table: the modules of a package put their entries into it when they are imported.

    Args:
        kind: What the entries are, in the singular; opens every error message.
        package: Dotted name of the package whose modules register. They are all imported when a
            name is looked up for the first time.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self._package = kind, package
        self._entries: dict[str, Entry[T]] = {}
        self._complete = False

    def register(self, name: str, options: type[Any]) -> Callable[[M], M]:
        """Return a decorator that enters a class or function under ``name``.

        Raises:
            ValueError: If the name is taken by another.
        """

        def enter(make: M) -> M:
            taken = self._entries.get(name)
            if taken is not None and taken.make is not make:
                message = f"{self.kind}: name must be free, got {name!r}, which {taken.make} has"
                raise ValueError(message)
            self._entries[name] = Entry(name, options, make)  # type: ignore[arg-type]
            return make

        return enter

    def find(self, name: object) -> Entry[T]:
        """Return the entry of a name.

        Raises:
            ValueError: If there is none; names the nearest.
        """
        entries = self._all()
        if not isinstance(name, str) or name not in entries:
            message = f"{self.kind}: name must be {one_of(entries)}, got {name!r}"
            raise ValueError(message + nearest(name, entries))
        return entries[name]

    def entries(self) -> list[Entry[T]]:
        """Return all entries, by name."""
        return [entry for _, entry in sorted(self._all().items())]

    def _all(self) -> dict[str, Entry[T]]:
        if not self._complete:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._complete = True
        return self._entries


def one_of(names: Iterable[str]) -> str:
    """Return "one of 'a', 'b'", or "'a'" for a single name."""
    quoted = [repr(name) for name in sorted(names)]
    return quoted[0] if len(quoted) == 1 else f"one of {', '.join(quoted)}"


def nearest(name: object, names: Iterable[str]) -> str:
    """Return "; the nearest is 'x'" for an error message, empty if nothing is near."""
    found = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return f"; the nearest is {found[0]!r}" if found else ""


OBJECTIVES: Registry[Any] = Registry("objective", "pyfeat.ssl.objectives")
NETWORKS: Registry[Any] = Registry("network", "pyfeat.ssl.networks")
SOURCES: Registry[Any] = Registry("data", "pyfeat.ssl.data")
