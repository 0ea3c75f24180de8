"""Conversion of published checkpoints, and safe reading of untrusted files."""

from d2ext.checkpoint import flow, torchvision  # noqa: F401  (registers their converters)
from d2ext.checkpoint.convert import (
    ConversionError,
    Rule,
    apply_rules,
    available_converters,
    convert_state_dict,
    register_converter,
    unwrap,
)
from d2ext.checkpoint.io import CheckpointError, load_untrusted

__all__ = [
    "CheckpointError",
    "ConversionError",
    "Rule",
    "apply_rules",
    "available_converters",
    "convert_state_dict",
    "load_untrusted",
    "register_converter",
    "unwrap",
]
