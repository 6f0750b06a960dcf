"""Progress of work that takes seconds: told to whoever asks, or shown by tqdm where it is installed."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
Progress = Callable[[int, int | None], object]

_MANY = 32  # fewer modules take no second, and importing tqdm would take longer than they do


def reported(items: Iterable[T], total: int | None, doing: str, progress: Progress | None) -> Iterator[T]:
    """The items; what is said of each is said when the next one is asked for, or there is none."""
    if progress is None:
        yield from items if total is not None and total < _MANY else _with_bar(items, total, doing)
        return
    for done, item in enumerate(items, start=1):
        yield item
        progress(done, total)


def _with_bar(items: Iterable[T], total: int | None, doing: str) -> Iterable[T]:
    """From the second second on, and only in a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, doing, total, leave=False, delay=1, disable=None)
