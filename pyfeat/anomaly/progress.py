"""A bar on the terminal for work that takes a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyfeat._extras import require


@contextmanager
def progress_bar(
    shown: bool, *, op: str, total: int | None, unit: str = "img", label: str = ""
) -> Iterator[Callable[[int], object]]:
    """Yield what to call with the units of work just done; draws nothing unless ``shown``.

    Args:
        shown: Whether to draw it.
        op: Public function at work, such as "PatchCore.fit".
        total: Units in all; None if nobody knows.
        unit: What they are.
        label: Of the bar; "" takes the verb of ``op``.

    Raises:
        ImportError: If it is shown and tqdm is not installed.
    """
    if not shown:
        yield lambda count: None
        return
    tqdm = require("tqdm", extra="anomaly", op=op)
    with tqdm.tqdm(total=total, desc=label or op.rpartition(".")[2], unit=unit) as bar:
        yield bar.update
