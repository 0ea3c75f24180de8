"""YOLACT."""
