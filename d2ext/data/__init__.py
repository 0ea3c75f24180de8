"""Data sets, mappers and augmentations."""

from d2ext.data import shapes  # noqa: F401  (imported for registration)
