"""What models and evaluators need to know of the mesh of `shapes` bodies: geodesic distances,
symmetry, features.

Geodesics are shortest ways over the mesh as it is, flat triangles and sharp edges. From each vertex
the triangles around are unfolded into the plane, a few deep: vertices that can be seen in there
have an exact distance. The shortest way over chains of such stretches (Floyd and Warshall) is
longer than the geodesic only where that passes through no vertex for more triangles than were
unfolded.
"""

import io
from functools import cache

import numpy as np

from d2ext.data.densepose.parts import NUM_PARTS
from d2ext.data.shapes.body_mesh import body_mesh, mirror_chart

__all__ = [
    "FEATURES",
    "body_geodesics",
    "body_npz",
    "chart_vertices",
    "geodesics",
    "geodesics_npy",
    "uv_symmetry_npz",
]

# Eigenvectors of the mesh that describe a vertex to CSE; published are 256 for 27,554 vertices.
FEATURES = 64
# Triangles to unfold from a vertex: with more the distances of the body change by 0.01 % in the mean.
_UNFOLDED = 12
# Rows that are relaxed at a time, so that they stay in the processor's cache.
_ROWS = 64
_CELLS = 256  # of a table of the mirrored U and V


def _unfold(vertices: np.ndarray, triangles: np.ndarray, depth: int) -> np.ndarray:
    """(V, V) float32: distances along straight lines over at most 1 + `depth` triangles; else
    inf."""
    n = len(vertices)
    result = np.full((n, n), np.inf)
    # A half-edge is a vertex times n and the next one; across it lies the triangle of the opposite one.
    turned = np.concatenate([np.roll(triangles, -i, axis=1) for i in range(3)])
    keys = turned[:, 0] * n + turned[:, 1]
    order = np.argsort(keys)
    keys, apexes = keys[order], turned[order, 2]

    def length(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.linalg.norm(vertices[a] - vertices[b], axis=1)

    # A window is an edge (a, b) seen from a source at the origin, counter-clockwise, between two lines.
    source, a, b = turned.T
    result[source, a] = result[a, source] = length(source, a)
    sides = length(source, b)
    cos = np.einsum("ij,ij->i", vertices[a] - vertices[source], vertices[b] - vertices[source])
    cos /= length(source, a) * sides
    zero = np.zeros_like(cos)
    pa = np.stack([length(source, a), zero], axis=1)
    pb = sides[:, None] * np.stack([cos, np.sqrt(np.clip(1 - cos**2, 0, None))], axis=1)
    low, high = pa, pb
    for _ in range(depth):
        apex = apexes[np.searchsorted(keys, b * n + a)]
        edge = pb - pa
        base = np.linalg.norm(edge, axis=1)
        near = length(a, apex)
        along = (near**2 + base**2 - length(b, apex) ** 2) / (2 * base)
        off = np.sqrt(np.clip(near**2 - along**2, 0, None))
        edge /= base[:, None]
        away = np.stack([edge[:, 1], -edge[:, 0]], axis=1)
        pc = pa + along[:, None] * edge + off[:, None] * away
        after_low, before_high = _cross(low, pc), _cross(pc, high)
        seen = (after_low >= 0) & (before_high >= 0)
        ends = source[seen], apex[seen]
        np.minimum.at(result, ends, np.linalg.norm(pc[seen], axis=1))
        first, second = after_low > 0, before_high > 0
        # What is seen through the two other edges of the triangle.
        nearer = np.where((before_high > 0)[:, None], pc, high)
        farther = np.where((after_low > 0)[:, None], pc, low)
        source = np.concatenate([source[first], source[second]])
        a, b = np.concatenate([a[first], apex[second]]), np.concatenate([apex[first], b[second]])
        pa = np.concatenate([pa[first], pc[second]])
        low = np.concatenate([low[first], farther[second]])
        high = np.concatenate([nearer[first], high[second]])
        pb = np.concatenate([pc[first], pb[second]])
    np.fill_diagonal(result, 0)
    return np.minimum(result, result.T).astype(np.float32)


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def geodesics(vertices: np.ndarray, triangles: np.ndarray, depth: int = _UNFOLDED) -> np.ndarray:
    """Distances over the surface of a closed mesh, in the unit of its vertices; time grows as V^3.

    Args:
        vertices: (V, 3) float64
        triangles: (T, 3) int64, all turned the same way
        depth: how many triangles are unfolded from each; 0: ways along edges only

    Returns:
        (V, V) float32, symmetric
    """
    distance = _unfold(vertices, triangles, depth)
    way = np.empty((_ROWS, len(vertices)), np.float32)
    for over in range(len(vertices)):
        first, second = distance[:, over, None].copy(), distance[over].copy()
        for start in range(0, len(vertices), _ROWS):
            rows = distance[start : start + _ROWS]
            np.add(first[start : start + _ROWS], second, out=way[: len(rows)])
            np.minimum(rows, way[: len(rows)], out=rows)
    return distance


@cache
def body_geodesics() -> np.ndarray:
    """(V, V) float32 of the mean body, metres. Read-only; takes some two seconds the first time."""
    mesh = body_mesh()
    result = geodesics(mesh.vertices, mesh.triangles)
    result.setflags(write=False)
    return result


def geodesics_npy() -> bytes:
    """The file of geodesics: the strictly lower triangle by rows, entry i (i - 1) / 2 + j for i >
    j, as in DensePose's Pdist_matrix (NOTES.md, *GPS evaluation*); float32, metres."""
    distances = body_geodesics()
    stream = io.BytesIO()
    np.save(stream, distances[np.tril_indices(len(distances), -1)])
    return stream.getvalue()


def chart_vertices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mesh's vertices on the charts; one on a border of parts is on several.

    Returns:
        vertices: (C,) int64
        parts: (C,) int64
        uv: (C, 2) float64
    """
    mesh = body_mesh()
    keys = mesh.parts[:, None] * len(mesh.vertices) + mesh.triangles
    keys, first = np.unique(keys, return_index=True)
    parts, vertices = np.divmod(keys, len(mesh.vertices))
    return vertices, parts, mesh.uv.reshape(-1, 2)[first]


@cache
def _features() -> np.ndarray:
    """(V, 64) float32: eigenvectors of the Laplacian of the mesh's graph (edges count as the
    inverse of their length) but the constant one, scaled to a mean square of 1."""
    mesh = body_mesh()
    n = len(mesh.vertices)
    near = np.zeros((n, n))
    for i in range(3):
        a, b = mesh.triangles[:, i], mesh.triangles[:, i - 1]
        near[a, b] = near[b, a] = 1 / np.linalg.norm(mesh.vertices[a] - mesh.vertices[b], axis=1)
    laplacian = np.diag(near.sum(axis=1)) - near
    vectors = np.linalg.eigh(laplacian)[1][:, 1 : FEATURES + 1]
    # Of either sign: the largest number is positive.
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(FEATURES)]
    return (vectors * np.sign(largest) * np.sqrt(n)).astype(np.float32)


def body_npz() -> bytes:
    """The file of the mesh, an .npz of

    - ``vertices`` (V, 3) float32, metres, x right, y down, z away, ``triangles`` (T, 3) int64;
    - ``chart_vertices``, ``chart_parts`` (C,) int64, ``chart_u``, ``chart_v`` (C,) float32: the
      vertices on the charts, one on a border on each of the parts;
    - ``vertex_transforms`` (V,) int64: mirror vertices, as DensePose's files call them;
    - ``features`` (V, 64) float32 for CSE.
    """
    mesh = body_mesh()
    vertices, parts, uv = chart_vertices()
    stream = io.BytesIO()
    np.savez(
        stream,
        vertices=mesh.vertices.astype(np.float32),
        triangles=mesh.triangles,
        chart_vertices=vertices,
        chart_parts=parts,
        chart_u=uv[:, 0].astype(np.float32),
        chart_v=uv[:, 1].astype(np.float32),
        vertex_transforms=mesh.mirror,
        features=_features(),
    )
    return stream.getvalue()


def uv_symmetry_npz() -> bytes:
    """The file of mirrored U and V, as :func:`~d2ext.data.densepose.parts.read_uv_symmetry` reads
    it: ``U_transforms`` and ``V_transforms``, (24, 256, 256) float32 by part, V, U."""
    # A cell's middle: U and V are cut, not rounded, to find their cell.
    middle = np.minimum((np.arange(_CELLS) + 0.5) / (_CELLS - 1), 1)
    uv = np.stack(np.meshgrid(middle, middle), axis=2)
    tables = np.stack([mirror_chart(part, uv) for part in range(1, NUM_PARTS + 1)])
    stream = io.BytesIO()
    tables = tables.astype(np.float32)
    np.savez_compressed(stream, U_transforms=tables[..., 0], V_transforms=tables[..., 1])
    return stream.getvalue()
