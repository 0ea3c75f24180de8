"""Surfaces of persons in `d2ext predict`: how they are drawn, and files of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from torch import Tensor

from d2ext.codecs.densepose import (
    ChartPredictions,
    charts_in_boxes,
    paste_results,
    quantize,
    vertices_in_boxes,
)
from d2ext.config import ConfigError
from d2ext.data.densepose.charts import (
    ChartTriangles,
    read_chart_triangles,
    read_chart_vertices,
)
from d2ext.data.faces import read_topology
from d2ext.data.image_io import read_image
from d2ext.files import atomic_write
from d2ext.tools.command_line import CommandError
from d2ext.utils.drawing import select, write_picture
from d2ext.utils.surfaces import STYLES, SurfaceDrawer, atlas_tiles


def add_surface_arguments(parser: argparse.ArgumentParser) -> None:
    """How surfaces are drawn, and what is written of them."""
    add = parser.add_argument
    help_text = (
        "lay this texture on the persons: an atlas of 6 rows and 4 columns of tiles, by part"
    )
    add("--texture", metavar="FILE", help=help_text)
    help_text = "write part, U and V of each picture, and of each person into coco_results.json"
    add("--save-surfaces", type=Path, metavar="DIR", help=help_text)
    help_text = "write the points of each person on the mesh of a body"
    add("--save-points", type=Path, metavar="DIR", help=help_text)
    add(
        "--body",
        nargs="+",
        metavar="FILE",
        help="of --save-points: the mesh on the charts, UV_Processed.mat or .npz, and the vertices of a "
        "body in any pose, .npy (V, 3) or .obj (default: the mesh of the config's data set)",
    )


def surface_drawer(args: argparse.Namespace) -> SurfaceDrawer:
    """What draws surfaces, by ``--draw`` and ``--texture``.

    Raises:
        CommandError: the texture is no atlas.
    """
    if args.texture:
        try:
            tiles = atlas_tiles(read_image(args.texture, "RGB"))
        except ValueError as error:
            raise CommandError(f"--texture '{args.texture}': {error}") from error
        return SurfaceDrawer(tiles=tiles, alone=True)
    alone = args.draw in STYLES
    return SurfaceDrawer(args.draw if alone else "parts", alone=alone)


class SurfaceReader:
    """Reads surfaces from a model's instances; embeddings by way of the mesh that is on the charts."""

    def __init__(self, metadata: Metadata, required: bool) -> None:
        """
        Args:
            metadata: of the data set; ``densepose_mesh``, ``densepose_mesh_name``: for embeddings
            required: the command asks for surfaces
        """
        self._metadata, self._required = metadata, required

    def __call__(self, instances: Instances, threshold: float) -> dict[str, Any]:
        """What to add to a model's output, computed on its device.

        Args:
            instances: of the model
            threshold: of scores, as of :func:`~d2ext.utils.drawing.select`

        Returns:
            ``surfaces``: of each person (3, h, w) uint8 in the box; ``surface`` (3, H, W) uint8 and
            ``surface_persons`` (H, W) int32 of the image, the best person on top; on the CPU. Nothing
            where there are none.

        Raises:
            ConfigError: there are none, and they are required.
        """
        if not instances.has("pred_densepose"):
            if self._required:
                raise ConfigError(
                    "The model predicts no surfaces: --draw parts, u, v and isolines, --texture, "
                    "--save-surfaces and --save-points are for DensePose."
                )
            return {}
        instances = select(instances, threshold, instances.scores.device)
        predictions, boxes = instances.pred_densepose, instances.pred_boxes.tensor
        if isinstance(predictions, ChartPredictions):
            surfaces = [quantize(result) for result in charts_in_boxes(predictions, boxes)]
        else:
            name, charts = self._metadata.get("densepose_mesh_name"), self._charts()
            vertices = (predictions.vertices or {}).get(name or "")
            if vertices is None or charts is None:
                if self._required:
                    raise ConfigError(
                        "Surfaces of embeddings are drawn and written by a mesh on the charts of a "
                        "body, one of the model's: metadata `densepose_mesh`, `densepose_mesh_name`."
                    )
                return {}
            table = charts.to(boxes.device)
            surfaces = [
                table[:, r.vertices] * r.mask
                for r in vertices_in_boxes(predictions, boxes, vertices.to(boxes.device))
            ]
        surface, persons = paste_results(surfaces, boxes, instances.image_size)
        return {
            "surfaces": [x.cpu() for x in surfaces],
            "surface": surface.cpu(),
            "surface_persons": persons.cpu(),
        }

    def _charts(self) -> Tensor | None:
        """(3, V) uint8: where each vertex of the mesh is on the charts."""
        path = self._metadata.get("densepose_mesh")
        if not path:
            return None
        charts = read_chart_vertices(path)
        table = torch.zeros(3, int(charts.vertices.max()) + 1, dtype=torch.uint8)
        known = charts.vertices >= 0
        values = np.column_stack([charts.parts, charts.uv * 255])[known].T.astype(np.uint8)
        table[:, charts.vertices[known]] = torch.from_numpy(values)
        return table


class SurfaceWriter:
    """Writes the surfaces of each image.

    - ``NAME_IMAGE_IUV.png``: part, 255 U, 255 V of each pixel, in the order in which OpenCV reads
      them (part is blue), and ``NAME_IMAGE_INDS.png``: the place of the person among the image's
      results, from 1; 0: none.
    - ``NAME_IMAGE_PERSON.npz``: of the person's n pixels ``pixels`` (n, 2) x, y; ``parts``, ``u``,
      ``v`` (n,); ``vertices`` (n,) int64, the nearest vertex of the mesh; ``points`` (n, 3), where they
      are on the body, in its unit.
    """

    def __init__(
        self,
        surfaces: Path | None,
        points: Path | None,
        triangles: ChartTriangles | None = None,
        vertices: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            surfaces, points: folders; None: none are written.
            triangles: of the mesh, for points.
            vertices: (V, 3) of the body, for points.
        """
        self._surfaces, self._points = surfaces, points
        self._triangles, self._vertices = triangles, vertices
        self.saves_surfaces = surfaces is not None

    def write(self, image_id: int, file: str, output: dict[str, Any]) -> None:
        """Write those of an image; the output has what :class:`SurfaceReader` adds."""
        name = f"{Path(file).stem}_{image_id}"
        if self._surfaces is not None:
            persons = output["surface_persons"].numpy()
            persons = persons.astype(np.uint8 if persons.max(initial=0) < 256 else np.uint16)
            surface = output["surface"].permute(1, 2, 0).numpy()
            write_picture(self._surfaces / f"{name}_IUV.png", surface)
            write_picture(self._surfaces / f"{name}_INDS.png", persons)
        if self._points is not None:
            self._points.mkdir(parents=True, exist_ok=True)
            corners = output["instances"].pred_boxes.tensor[:, :2].long().tolist()
            for i, (surface, corner) in enumerate(zip(output["surfaces"], corners, strict=True), 1):
                with atomic_write(self._points / f"{name}_{i}.npz") as stream:
                    np.savez_compressed(stream, **self._on_body(surface.numpy(), corner))

    def _on_body(self, surface: np.ndarray, corner: list[int]) -> dict[str, np.ndarray]:
        assert self._triangles is not None and self._vertices is not None
        rows, columns = np.nonzero(surface[0])
        parts, u, v = surface[:, rows, columns]
        places = self._triangles.locate(parts.astype(np.int64), u / 255, v / 255)
        return {
            "pixels": np.stack([columns, rows], axis=1) + corner,
            "parts": parts,
            "u": (u / 255).astype(np.float32),
            "v": (v / 255).astype(np.float32),
            "vertices": places.nearest,
            "points": places.positions(self._vertices).astype(np.float32),
        }


def surface_writer(args: argparse.Namespace, metadata: Metadata) -> SurfaceWriter:
    """By ``--save-surfaces``, ``--save-points`` and ``--body``.

    Raises:
        CommandError: no mesh, or no vertices of a body.
        DatasetError: they cannot be read.
    """
    if args.save_points is None:
        return SurfaceWriter(args.save_surfaces, None)
    files = args.body or [metadata.get("densepose_mesh")]
    if not files[0]:
        raise CommandError("--save-points: the data set has no mesh, name it with --body.")
    triangles = read_chart_triangles(files[0])
    vertices = triangles.positions
    if len(files) > 1:
        path = files[1]
        vertices = np.load(path) if path.endswith(".npy") else read_topology(path)[0]
    if vertices is None:
        raise CommandError(
            f"--body '{files[0]}' has no vertices of a body: name a file of them too."
        )
    if len(vertices) <= triangles.vertices.max():
        raise CommandError(
            f"--body: the mesh has {triangles.vertices.max() + 1} vertices, the body {len(vertices)}."
        )
    return SurfaceWriter(args.save_surfaces, args.save_points, triangles, vertices)
