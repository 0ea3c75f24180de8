"""Annotated points on surfaces of persons (or animals), and coarse part masks: ``gt_densepose``.

Training inputs may have ``instances.gt_densepose``, a :class:`DensePoseAnnotations` of all instances of
an image. A mapper makes it with one :class:`SurfacePoints` for each annotated person, None for others::

    instances.gt_densepose = DensePoseAnnotations([SurfacePoints(x, y, ...), None, ...])
    if mirrored:
        instances.gt_densepose = instances.gt_densepose.mirrored(symmetry)

**Frame.** Positions and masks are relative to the person's box, each axis for itself: 0 is the box's
left or upper edge, 256 its right or lower one. They are not touched when an image is resized, and mean
the same only as long as ``gt_boxes`` is the whole annotated box: a mapper that crops must leave it
uncut, or drop the person.

Letters: N persons, P points of the person that has most, K points of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2ext.data.densepose.parts import MIRRORED_COARSE_PARTS, MIRRORED_PARTS, SurfaceSymmetry

# Side of the frame, and of the masks: the annotations are made in a box stretched to 256 x 256.
FRAME = 256


class SurfacePoints(NamedTuple):
    """One person's annotation: P > 0 points, on charts (``parts``, ``u``, ``v``) or on a mesh (``mesh``,
    ``vertices``) or both, and a mask. Sequences of numbers or arrays do as well as tensors."""

    x: Any
    """(P,) 0..256."""
    y: Any
    """(P,) 0..256."""
    parts: Any = None
    """(P,) fine part 1..24, 0 background (``dp_I``)."""
    u: Any = None
    """(P,) 0..1 (``dp_U``)."""
    v: Any = None
    """(P,) 0..1 (``dp_V``)."""
    vertices: Any = None
    """(P,) vertex from 0, -1 none (``dp_vertex``)."""
    mesh: str | None = None
    """Name of the mesh (``ref_model``)."""
    mask: Any = None
    """(256, 256) coarse part 1..14 of each pixel, or 1 for all of the foreground; 0 background
    (``dp_masks``)."""


class AnnotatedPoints(NamedTuple):
    """The K points of all persons of a :class:`DensePoseAnnotations`, person by person."""

    person: Tensor
    """(K,) int64: which of the N."""
    x: Tensor
    """(K,) float32, 0..256."""
    y: Tensor
    """(K,) float32, 0..256."""
    parts: Tensor
    """(K,) int64: 1..24, 0 background, -1 not on charts."""
    u: Tensor
    """(K,) float32, 0..1."""
    v: Tensor
    """(K,) float32, 0..1."""
    mesh: Tensor
    """(K,) int64: index into ``mesh_names``, -1 not on a mesh."""
    vertices: Tensor
    """(K,) int64: vertex of the mesh, -1 none."""


class DensePoseAnnotations:
    """Annotations of N persons, with or without points and masks.

    What is stored is never copied by indexing (ROI heads repeat a person for each of its proposals): a
    row number for each person points into the storage.
    """

    def __init__(self, persons: Sequence[SurfacePoints | None]) -> None:
        """
        Args:
            persons: None: no points (the person trains boxes only)

        Raises:
            ValueError: points of different numbers, or neither on charts nor on a mesh
        """
        size = max((len(p.x) for p in persons if p is not None), default=0)
        count = len(persons)
        self._rows = torch.arange(count)
        # x, y, u, v and part, vertex
        self._numbers = torch.zeros(count, 4, size)
        self._labels = torch.full((count, 2, size), -1)
        self._counts = torch.zeros(count, dtype=torch.int64)
        self._meshes = torch.full((count,), -1)
        self.mesh_names: tuple[str, ...] = ()
        given = {i: p.mask for i, p in enumerate(persons) if p is not None and p.mask is not None}
        # Row of the person's mask among those that there are.
        self._mask_rows = torch.full((count,), -1)
        self._mask_rows[list(given)] = torch.arange(len(given))
        self._masks = torch.zeros(len(given), FRAME, FRAME, dtype=torch.uint8)
        for mask, value in zip(self._masks, given.values(), strict=True):
            mask.copy_(torch.as_tensor(value))
        for i, person in enumerate(persons):
            if person is not None:
                self._set(i, person)

    def _set(self, i: int, person: SurfacePoints) -> None:
        length = len(person.x)
        on_charts = person.parts is not None
        if not on_charts and person.vertices is None:
            raise ValueError("Points of a surface have `parts`, `u` and `v`, or `vertices`.")
        if (person.vertices is None) != (person.mesh is None):
            raise ValueError("Points on a mesh have its name, `mesh`, and `vertices`.")
        numbers = [person.x, person.y, *((person.u, person.v) if on_charts else ())]
        labels = {0: person.parts, 1: person.vertices}
        for k, values in enumerate(numbers):
            self._numbers[i, k, :length] = torch.as_tensor(values, dtype=torch.float32)
        for k, values in labels.items():
            if values is not None:
                self._labels[i, k, :length] = torch.as_tensor(values).long()
        self._counts[i] = length
        if person.mesh is not None:
            if person.mesh not in self.mesh_names:
                self.mesh_names += (person.mesh,)
            self._meshes[i] = self.mesh_names.index(person.mesh)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} persons, {int(self.has_points.sum())} with points)"
        )

    def __getitem__(self, index: slice | Tensor) -> DensePoseAnnotations:
        """The persons of a slice, of indices (int64) or of a mask (bool), in that order."""
        return self._like(_rows=self._rows[index])

    def to(self, *args: Any, **kwargs: Any) -> DensePoseAnnotations:
        """On another device; arguments as of ``Tensor.to``."""
        return self._like(
            **{k: v.to(*args, **kwargs) for k, v in vars(self).items() if isinstance(v, Tensor)}
        )

    @staticmethod
    def cat(parts: Sequence[DensePoseAnnotations]) -> DensePoseAnnotations:
        """The persons of all, in order."""
        joined = parts[0]._like()
        names = tuple(dict.fromkeys(name for p in parts for name in p.mesh_names))
        size = max(p._numbers.shape[2] for p in parts)

        def padded(name: str, value: float) -> Tensor:
            stored = [getattr(p, name) for p in parts]
            pad = torch.nn.functional.pad
            return torch.cat([pad(x, (0, size - x.shape[2]), value=value) for x in stored])

        def shifted(name: str, over: str) -> Tensor:
            shifts = [0]
            for p in parts:
                shifts.append(shifts[-1] + len(getattr(p, over)))
            indices = [getattr(p, name) for p in parts]
            return torch.cat(
                [torch.where(x >= 0, x + s, x) for x, s in zip(indices, shifts, strict=False)]
            )

        joined._numbers, joined._labels = padded("_numbers", 0), padded("_labels", -1)
        joined._counts = torch.cat([p._counts for p in parts])
        joined._meshes = torch.cat([p.meshes_among(names)[0] for p in parts])
        joined._rows = shifted("_rows", "_counts")
        joined._mask_rows = shifted("_mask_rows", "_masks")
        joined._masks = torch.cat([p._masks for p in parts])
        joined.mesh_names = names
        return joined

    @property
    def has_points(self) -> Tensor:
        """(N,) bool."""
        return self._counts[self._rows] > 0

    @property
    def has_masks(self) -> Tensor:
        """(N,) bool."""
        return self._mask_rows[self._rows] >= 0

    @property
    def masks(self) -> Tensor:
        """(N, 256, 256) uint8: coarse parts; zeros where a person has none."""
        rows = self._mask_rows[self._rows]
        if len(self._masks) == 0:
            return self._masks.new_zeros(len(rows), FRAME, FRAME)
        masks = self._masks[rows.clamp(min=0)]
        return masks.masked_fill((rows < 0)[:, None, None], 0)

    def meshes_among(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Mesh of each stored person and of each of the N persons, as an index into ``names``; -1: none.

        Raises:
            ValueError: a mesh that is not among them
        """
        unknown = set(self.mesh_names) - set(names)
        if unknown:
            raise ValueError(
                f"Annotations on the meshes {sorted(unknown)}, not among {list(names)}."
            )
        table = torch.tensor([*(list(names).index(n) for n in self.mesh_names), -1])
        stored = table.to(self._meshes.device)[self._meshes]  # -1 is the last
        return stored, stored[self._rows]

    def points(self) -> AnnotatedPoints:
        """The points of all N persons."""
        counts = self._counts[self._rows]
        size = self._numbers.shape[2]
        there = torch.arange(size, device=counts.device) < counts[:, None]
        person, index = there.nonzero(as_tuple=True)
        row = self._rows[person]
        x, y, u, v = self._numbers[row, :, index].unbind(1)
        parts, vertices = self._labels[row, :, index].unbind(1)
        return AnnotatedPoints(person, x, y, parts, u, v, self._meshes[row], vertices)

    def mirrored(self, symmetry: SurfaceSymmetry) -> DensePoseAnnotations:
        """The annotations in a picture mirrored left to right.

        As published, points go to 256 - x, while masks are mirrored as arrays (column j to 255 - j).

        Raises:
            DatasetError: ``symmetry`` lacks the tables for points that are there.
        """
        filled = torch.arange(self._numbers.shape[2], device=self._counts.device)
        there = filled < self._counts[:, None]
        used = torch.zeros_like(self._counts, dtype=torch.bool)
        used[self._rows] = True
        x, y, u, v = self._numbers.unbind(1)
        parts, vertices = self._labels.clone().unbind(1)
        x = torch.where(there, FRAME - x, x)
        if (parts[used] > 0).any():
            u, v = symmetry.mirror_uv(parts.clamp(min=0), u, v)
            table = torch.tensor(MIRRORED_PARTS, device=parts.device)
            parts = torch.where(parts > 0, table[parts.clamp(min=0)], parts)
        for i, name in enumerate(self.mesh_names):
            own = used & (self._meshes == i)
            if own.any():
                vertices[own] = symmetry.mirror_vertices(name, vertices[own])
        table = torch.tensor(MIRRORED_COARSE_PARTS, dtype=torch.uint8, device=self._masks.device)
        return self._like(
            _numbers=torch.stack([x, y, u, v], dim=1),
            _labels=torch.stack([parts, vertices], dim=1),
            _masks=table[self._masks.flip(-1).long()],
        )

    def _like(self, **changed: Any) -> DensePoseAnnotations:
        other = object.__new__(type(self))
        vars(other).update(vars(self) | changed)
        return other
