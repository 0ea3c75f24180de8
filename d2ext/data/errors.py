"""What can be wrong with data, as exceptions whose messages say which file and what to do.

Every class takes the message alone, so that an error which crosses a process border (a worker of a
``DataLoader``) keeps its type.
"""

from collections.abc import Sequence
from typing import Any

# How many offending things a message lists.
_LISTED = 5


def shorten(items: Sequence[Any] | None, count: int = _LISTED) -> str:
    """The first few items as text, and how many more there are."""
    if items is None:
        return "unknown"
    text = ", ".join(str(item) for item in items[:count])
    return text if len(items) <= count else f"{text}, ... ({len(items) - count} more)"


class DataError(ValueError):
    """Base class of everything that d2ext's data path raises about data."""


class DatasetError(DataError):
    """A data set as a whole cannot be used: no file, no images, unknown classes, ..."""


class SampleError(DataError):
    """One sample cannot be used. Training replaces it by another one unless told to be strict.

    Attributes:
        file_name: of the image at fault, where it is not the sample's own; such errors stay in a process
    """

    file_name: str | None = None


class ImageReadError(SampleError):
    """An image is missing, empty, truncated or not an image. The message names the file."""


class AnnotationError(SampleError):
    """The annotations of one image cannot be used. The message names the image's file."""
