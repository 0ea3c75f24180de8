"""Detectron2's checkpointer with safe reading, whole writing, and a check that the weights fit."""

import logging
import os
import re
from collections.abc import Iterable
from typing import Any
from urllib.error import URLError
from urllib.parse import parse_qs

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from d2ext.checkpoint.convert import convert_state_dict
from d2ext.checkpoint.io import CheckpointError, as_tensors, load_untrusted
from d2ext.checkpoint.torchvision import torchvision_backbone
from d2ext.files import atomic_write

__all__ = ["CheckpointSaveError", "Checkpointer", "WeightsCheckpointer"]

logger = logging.getLogger(__name__)

# Below these shares a checkpoint counts as one of another backbone, see _backbone_overlap. First
# share: a ResNet classifier into ResNet + FPN 1.0; R-50 into R-101 and back 0.5; R-101 into R-152
# and back 0.67. Second share: a R-18 classifier into R-18 + FPN 0.79.
_MIN_BACKBONE_OVERLAP = (0.75, 0.5)
_LIST_LENGTH = 12  # lines per list in a message


class CheckpointSaveError(OSError):
    """A checkpoint could not be written; the earlier ones are untouched."""


class Checkpointer(DetectionCheckpointer):
    """Saves and loads a model and its training state.

    Differences from the base class:

    - Files are read with :func:`d2ext.checkpoint.io.load_untrusted`: no code in them runs.
    - A plain torchvision state dict of a ResNet or MobileNetV2 is renamed to the backbone's names, so
      torchvision's ImageNet weights serve as ``MODEL.WEIGHTS``.
    - A file, and the ``last_checkpoint`` mark, appear only when complete.
    - Weights that do not fit the model raise :class:`CheckpointError`, see ``fit``.

    Args:
        model: the model, or its ``DistributedDataParallel`` wrapper.
        save_dir: folder to save to; created when needed.
        fit: what may differ between checkpoint and model.
            ``"exact"``: nothing; every parameter has its counterpart (evaluation, resuming).
            ``"finetune"``: heads may differ, each difference is logged as a warning; the backbones
            must agree by name and shape in 3/4 of the parts that both have, and in 1/2 overall.
            ``"any"``: anything may differ, with warnings (Detectron2's behaviour).
        save_to_disk: whether this process writes; by default only the main process.
        checkpointables: further objects with ``state_dict``/``load_state_dict``.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        fit: str = "exact",
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        if fit not in ("exact", "finetune", "any"):
            raise ValueError(f"fit must be 'exact', 'finetune' or 'any', not {fit!r}.")
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.fit = fit
        self._path = ""

    # Writing

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<save_dir>/<name>.pth`` and mark it as the last checkpoint.

        Raises:
            CheckpointSaveError: the disk is full or not writable; earlier checkpoints and the
                ``last_checkpoint`` mark stay as they were.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data: dict[str, Any] = {"model": self.model.state_dict()}
        for key, item in self.checkpointables.items():
            data[key] = item.state_dict()
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        try:
            os.makedirs(self.save_dir, exist_ok=True)
            with atomic_write(path) as file:
                torch.save(data, file)
            self.tag_last_checkpoint(os.path.basename(path))
        except (OSError, RuntimeError) as error:
            # torch.save wraps an OSError of the file object in a RuntimeError.
            raise CheckpointSaveError(
                f"Could not write checkpoint {path} ({_root_cause(error)}). Earlier checkpoints "
                "are unharmed. Free space on the disk or choose another OUTPUT_DIR; "
                "SOLVER.CHECKPOINT_MAX_TO_KEEP limits the number of checkpoints."
            ) from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the checkpoint from which ``--resume`` continues."""
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint"), "w") as file:
            file.write(last_filename_basename)

    def remove_unfinished(self) -> None:
        """Remove unfinished checkpoint files of a killed process."""
        if not self.save_to_disk or not os.path.isdir(self.save_dir):
            return
        for name in os.listdir(self.save_dir):
            stem, mark, process = name.rpartition(".tmp-")
            ours = stem.endswith(".pth") or stem == "last_checkpoint"
            if mark and ours and process.isdigit():
                logger.info("Removing unfinished checkpoint %s", name)
                os.remove(os.path.join(self.save_dir, name))

    # Reading

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from, see :meth:`get_checkpoint_file`."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The checkpoint named in ``last_checkpoint``; if that file is missing, the one with the most
        iterations; "" if there is none."""
        try:
            with open(os.path.join(self.save_dir, "last_checkpoint"), encoding="utf-8") as file:
                path = os.path.join(self.save_dir, file.read().strip())
            if os.path.isfile(path):
                return path
        except (OSError, ValueError):
            pass
        newest = os.path.join(self.save_dir, "model_final.pth")
        if not os.path.isfile(newest):
            numbered = self.numbered()
            if not numbered:
                return ""
            newest = numbered[max(numbered)]
        logger.warning("last_checkpoint in %s is lost; %s is taken.", self.save_dir, newest)
        return newest

    def numbered(self) -> dict[int, str]:
        """Iteration → path of its checkpoint, of all in the folder but the final one."""
        names = os.listdir(self.save_dir) if os.path.isdir(self.save_dir) else []
        matches = [re.fullmatch(r"model_(\d+)\.pth", name) for name in names]
        return {int(m[1]): os.path.join(self.save_dir, m[0]) for m in matches if m}

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load weights and, unless told otherwise, the training state.

        Args:
            path: file name, URL or Detectron2 model-zoo address; empty: load nothing.

        Raises:
            CheckpointError: unreadable, out of reach, or it does not fit the model (see ``fit``).
            FileNotFoundError: there is no such file.
        """
        self._path = path
        try:
            return super().load(path, *args, **kwargs)
        except AssertionError as error:
            # The base class asserts that the file exists.
            if "not found" not in str(error):
                raise
            raise FileNotFoundError(
                f"Checkpoint {path!r} does not exist. Check MODEL.WEIGHTS; an empty value trains "
                "from random weights."
            ) from error
        except URLError as error:
            raise CheckpointError(
                f"{path!r} could not be downloaded ({error.reason}). Fetch the file on a machine that "
                "reaches it, and name its path instead."
            ) from error
        finally:
            self._parsed_url_during_load = None  # the base class resets it only on success

    def _load_file(self, filename: str) -> dict[str, Any]:
        data = load_untrusted(filename)
        if not isinstance(data, dict):
            raise CheckpointError(
                f"Checkpoint {filename!r} holds a {type(data).__name__}, not a state dict."
            )
        if "model" in data and isinstance(data["model"], dict):
            checkpoint = data
        elif "model_state" in data:  # pycls
            checkpoint = {"model": data["model_state"], "matching_heuristics": True}
        elif filename.endswith(".pkl"):  # Caffe2 and Detectron 1
            blobs = _state_dict(data.get("blobs", data), filename)
            checkpoint = {
                "model": {k: v for k, v in blobs.items() if not k.endswith("_momentum")},
                "__author__": "Caffe2",
                "matching_heuristics": True,
            }
        else:
            # Other projects keep the weights under one of these names, or at the top level.
            state = next((data[k] for k in ("state_dict", "model_state_dict") if k in data), data)
            state = _state_dict(state, filename)
            if system := torchvision_backbone(state):
                state = convert_state_dict(system, state)
                checkpoint = {"model": state, "matching_heuristics": True}
            else:
                checkpoint = {"model": state}
        parsed_url = self._parsed_url_during_load
        if parsed_url is not None and "True" in parse_qs(parsed_url.query).get(
            "matching_heuristics", []
        ):
            checkpoint["matching_heuristics"] = True
        checkpoint["model"] = _state_dict(checkpoint["model"], filename)
        return checkpoint

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        heuristics = bool(checkpoint.get("matching_heuristics"))
        incompatible = super()._load_model(checkpoint)
        missing = [k for k in incompatible.missing_keys if not _is_counter(k)]
        unexpected = [k for k in incompatible.unexpected_keys if not _is_counter(k)]
        wrong = incompatible.incorrect_shapes
        # load_state_dict reports a parameter of the wrong shape as missing, since it was removed.
        wrong_names = {name for name, _, _ in wrong}
        missing = [k for k in missing if k not in wrong_names]
        if self.fit == "exact":
            if missing or unexpected or wrong:
                raise CheckpointError(self._mismatch(missing, unexpected, wrong))
        elif self.fit == "finetune":
            overlap = _backbone_overlap(
                self.model, missing + list(wrong_names), unexpected, heuristics
            )
            if any(x < least for x, least in zip(overlap, _MIN_BACKBONE_OVERLAP, strict=True)):
                raise CheckpointError(
                    self._mismatch(missing, unexpected, wrong)
                    + f"\nOnly {min(overlap):.0%} of the backbone is common to both. For "
                    "training from random weights set MODEL.WEIGHTS to ''; to load the few that "
                    "fit set MODEL.WEIGHTS_ALLOW_PARTIAL to True."
                )
        return incompatible

    def _mismatch(
        self,
        missing: list[str],
        unexpected: list[str],
        wrong: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
    ) -> str:
        total = sum(not _is_counter(name) for name in self.model.state_dict())
        fitting = total - len(missing) - len(wrong)
        lines = [
            f"Checkpoint {self._path!r} does not fit the model: it has {fitting} of its {total} weights."
        ]
        lines += _listed("in the model, not in the checkpoint", missing, _grouped(missing))
        lines += _listed("in the checkpoint, not in the model", unexpected, _grouped(unexpected))
        shapes = [f"{k}: checkpoint {tuple(c)}, model {tuple(m)}" for k, c, m in wrong]
        lines += _listed("of another shape", shapes, sorted(shapes))
        if wrong and not missing and not unexpected:
            lines.append(
                "All names agree, so the class count (or another size) of the config differs from "
                "the checkpoint's: use the config that it was trained with."
            )
        else:
            lines.append(
                "Use the config that the checkpoint was trained with (same system, same depth). "
                "A checkpoint of the published code must first go through d2ext convert."
            )
        return "\n".join(lines)


class WeightsCheckpointer(Checkpointer):
    """Saves files that hold the model's weights only and are never marked as the last checkpoint,
    so that ``--resume`` does not pick them up."""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Do nothing."""


def _state_dict(state: Any, filename: str) -> dict[str, torch.Tensor]:
    """``state``, which must be one."""
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"Checkpoint {filename!r} holds no weights.")
    state = as_tensors(state)
    for key, value in state.items():
        if not isinstance(key, str):
            raise CheckpointError(
                f"Checkpoint {filename!r} is not a state dict: {key!r} is not the name of a weight."
            )
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"Checkpoint {filename!r} is not a state dict: its entry {key!r} is a "
                f"{type(value).__name__}, not a tensor. Save the model's state_dict() itself, or "
                "put it under the key 'model'."
            )
    return state


def _is_counter(name: str) -> bool:
    # BatchNorm's num_batches_tracked: FrozenBatchNorm2d, and older checkpoints, have none.
    return name.endswith("num_batches_tracked")


def _backbone_overlap(
    model: nn.Module, missing: list[str], unexpected: list[str], heuristics: bool
) -> tuple[float, float]:
    """How much the model's and the checkpoint's backbones have in common, two shares from 0 to 1.

    Weights and biases are compared by name and shape. (Statistics are not: a FrozenBatchNorm2d without
    them in the checkpoint is filled silently.) A model without a ``backbone`` is compared as a whole.

    Returns:
        Share within those children of the backbone that have anything in common (so a pyramid on a
        pretrained classifier does not count, a stage with other blocks does), and share overall.
    """

    def names_of(names: Iterable[str], prefix: str) -> set[str]:
        return {k for k in names if k.startswith(prefix) and k.endswith((".weight", ".bias"))}

    prefix = "backbone."
    ours = names_of(model.state_dict(), prefix)
    if not ours:
        prefix = ""
        ours = names_of(model.state_dict(), prefix)
    theirs = names_of(unexpected, "" if heuristics else prefix)
    if heuristics:
        # Names of a bare classifier, for example res4.6.conv1.weight: part of the backbone if the
        # first component is one of the backbone's. The prefix that it lacks is not known.
        components = {part for k in ours for part in k.split(".")[:-1]}
        theirs = {k for k in theirs if k.split(".")[0] in components}

    def child(name: str) -> str:
        return name.removeprefix(prefix).split(".")[0]

    common = ours - set(missing)
    shared = {child(k) for k in common}
    ours_shared = sum(child(k) in shared for k in ours)
    theirs_shared = len(theirs) if heuristics else sum(child(k) in shared for k in theirs)
    return (
        len(common) / max(ours_shared + theirs_shared, 1),
        len(common) / max(len(ours) + len(theirs), 1),
    )


def _grouped(names: Iterable[str]) -> list[str]:
    """``["a.bias", "a.weight", "b"]`` -> ``["a.{bias, weight}", "b"]``"""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        module, _, leaf = name.rpartition(".")
        groups.setdefault(module, []).append(leaf)
    result = []
    for module, leaves in groups.items():
        leaf = leaves[0] if len(leaves) == 1 else f"{{{', '.join(leaves)}}}"
        result.append(f"{module}.{leaf}" if module else leaf)
    return result


def _listed(title: str, names: list[str], lines: list[str]) -> list[str]:
    if not names:
        return []
    shown = [f"  {line}" for line in lines[:_LIST_LENGTH]]
    if len(lines) > _LIST_LENGTH:
        shown.append(f"  ... and {len(lines) - _LIST_LENGTH} more")
    return [f"{len(names)} {title}:", *shown]


def _root_cause(error: BaseException) -> str:
    cause: BaseException = error
    while cause.__context__ is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
