"""Data sets, mappers and augmentations."""
