"""From the command line to a config."""

import argparse
import difflib
import re
from collections.abc import Callable, Iterator, Sequence

import yaml
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from d2ext.config.errors import ConfigError
from d2ext.config.registry import get_cfg

__all__ = ["add_options_argument", "load_config", "merge_options"]

_UNKNOWN_KEY = re.compile(r"Non-existent (?:config )?key: (\S+)")  # how yacs says it


def load_config(config_file: str = "", overrides: Sequence[str] = ()) -> CfgNode:
    """d2ext's defaults, then a config file, then ``KEY VALUE`` pairs.

    As in Detectron2, a config file may contain YAML tags that run code (its own RetinaNet configs
    do): read a stranger's config before using it.

    Args:
        config_file: path of a YAML file (``d2ext.model_zoo.find_config_file`` gives that of a name in
            the model zoo); empty: defaults only.
        overrides: ``["SOLVER.BASE_LR", "0.001", ...]``.

    Returns:
        A config that can still be changed.

    Raises:
        ConfigError: no such file, unknown key (with the nearest known ones), value of a wrong type.
    """
    cfg = get_cfg()
    if config_file:
        if not PathManager.isfile(config_file):
            raise ConfigError(f"There is no config file {config_file!r}.")
        _merge(cfg, lambda: cfg.merge_from_file(config_file), config_file)
    merge_options(cfg, overrides)
    return cfg


def add_options_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--opts KEY VALUE ...``, the rest of the command line, for :func:`load_config`."""
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="changes to the config; must come last",
    )


def merge_options(cfg: CfgNode, overrides: Sequence[str]) -> None:
    """Apply ``KEY VALUE`` pairs to ``cfg``, in place. Raises as `load_config` does."""
    if len(overrides) % 2:
        raise ConfigError(
            f"Options come in pairs KEY VALUE, but {len(overrides)} words were given: "
            f"{' '.join(overrides)!r}."
        )
    _merge(cfg, lambda: cfg.merge_from_list(list(overrides)), "the command line")


def _merge(cfg: CfgNode, merge: Callable[[], None], source: str) -> None:
    try:
        merge()
    except (KeyError, AssertionError) as error:
        match = _UNKNOWN_KEY.search(str(error))
        if match is None:
            raise ConfigError(f"Error in {source}: {error}") from error
        key = match.group(1).strip("'\"")
        near = _nearest(key, list(_keys(cfg)))
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"Unknown config key {key} in {source}.{hint}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"Error in {source}: {error}") from error


def _keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")


def _nearest(key: str, known: list[str]) -> list[str]:
    """Up to three known keys: those whose last word is nearest, then those nearest as a whole."""
    leaf = key.rpartition(".")[2]
    same_leaf = [k for k in known if k.rpartition(".")[2] == leaf]
    near = same_leaf + difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    return list(dict.fromkeys(near))[:3]
