"""Predicted panoptic videos as files, in the form of Cityscapes-VPS (arXiv 2006.11339): a PNG for each
frame, whose pixels hold segment ids as R + 256 G + 65536 B, and COCO's panoptic JSON with ``area`` and,
where they are known, ``score`` and ``track_id`` of each segment.

A segment id is the place of the class (from 1) times ``label_divisor`` of the file, plus the track id
of a thing, 0 for stuff: an object has one id, and one colour, over its clip. A thing without a track id
gets a number of its own in its frame, counted down from ``label_divisor`` - 1.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data.catalog import Metadata

from d2ext.files import atomic_write

__all__ = ["PanopticVideoWriter", "read_map", "segment_places"]

# Ids of a PNG have three bytes.
_NUM_IDS = 256**3
_UNLISTED = 65535
# Factors of the class: the larger one leaves room for 166 classes.
_DIVISORS = 100_000, 10_000


def segment_places(
    ids: np.ndarray, segments: Sequence[dict[str, Any]], file_name: str
) -> np.ndarray:
    """Places of a map's pixels in the list of its segments.

    Args:
        ids: (H, W) ids; 0 and below: no segment
        segments: with ``id``
        file_name: for the message

    Returns:
        (H, W) uint16: 0 no segment, i + 1 the i-th

    Raises:
        ValueError: ids that are not listed
    """
    ids = np.maximum(ids, 0)
    listed = {int(s["id"]): place for place, s in enumerate(segments, 1) if s["id"] > 0}
    if max(int(ids.max(initial=0)), *listed, 0) < _NUM_IDS:
        table = np.full(max(int(ids.max(initial=0)), *listed, 0) + 1, _UNLISTED, np.uint16)
        table[0] = 0
        for number, place in listed.items():
            table[number] = place
        places = table[ids]
    else:  # the table would be too large
        values, inverse = np.unique(ids, return_inverse=True)
        listed = {**listed, 0: 0}
        table = np.array([listed.get(v, _UNLISTED) for v in values.tolist()], np.uint16)
        places = table[inverse].reshape(ids.shape)
    unlisted = np.unique(ids[places == _UNLISTED])[:5].tolist()
    if unlisted:
        raise ValueError(
            f"The predicted panoptic map of '{file_name}' has ids {unlisted} that its segments_info "
            "lacks."
        )
    return places


class PanopticVideoWriter:
    """Writes the PNGs of clips, and gives what their JSON file lists.

    Attributes:
        categories: of the JSON file; classes that the metadata do not name are added as they come
        divisor: ``label_divisor`` of the JSON file
    """

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        """
        Args:
            folder: of the PNGs; made when needed
            metadata: names of the classes and, where it has them, the data set's own category ids
        """
        self._folder = folder
        self.categories: list[dict[str, Any]] = []
        self._places: dict[tuple[bool, int], int] = {}
        known = metadata.as_dict() if hasattr(metadata, "as_dict") else vars(metadata)
        for isthing, contiguous, name, number in _classes(known):
            self._add(isthing, contiguous, name, number)
        self.divisor = next(
            d for d in _DIVISORS if d == _DIVISORS[-1] or (len(self._places) + 1) * d < _NUM_IDS
        )

    def _add(self, isthing: bool, contiguous: int, name: str, number: int | None) -> int:
        taken = {category["id"] for category in self.categories}
        if number is None:
            number = max(taken, default=0) + 1
        self.categories.append({"id": number, "name": name, "isthing": int(isthing)})
        self._places[isthing, contiguous] = len(self.categories)
        return len(self.categories)

    def write(
        self, name: str, image_id: Any, places: np.ndarray, segments: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        """Write the PNG of a frame.

        Args:
            name: of the PNG in the folder
            image_id: of the frame
            places: (H, W) of :func:`segment_places`
            segments: with ``category_id`` (contiguous), ``isthing`` and, for things, ``track_id`` (-1:
                none) and ``score``

        Returns:
            the frame's entry for ``annotations`` of the JSON file; segments that have no pixel are not
            in it, those with one id are one

        Raises:
            ValueError: a track id that the PNG cannot hold
        """
        areas = np.bincount(places.reshape(-1), minlength=len(segments) + 1).tolist()[1:]
        table = np.zeros(len(segments) + 1, np.int64)
        infos: dict[int, dict[str, Any]] = {}
        for i, (segment, area) in enumerate(zip(segments, areas, strict=True), 1):
            if not area:
                continue
            isthing, category = bool(segment["isthing"]), int(segment["category_id"])
            place = self._places.get((isthing, category)) or self._add(
                isthing, category, f"{'thing' if isthing else 'stuff'} {category}", None
            )
            track = int(segment.get("track_id", -1)) if isthing else 0
            number = place * self.divisor + (track if track >= 0 else self.divisor - i)
            if track >= self.divisor or number >= _NUM_IDS:
                raise ValueError(
                    f"Track {track} of class {place} does not fit into the ids of a PNG, of which each "
                    f"class has {self.divisor}."
                )
            table[i] = number
            info = infos.setdefault(
                number,
                {"id": number, "category_id": self.categories[place - 1]["id"], "area": 0},
            )
            info["area"] += area
            if segment.get("score") is not None:
                info["score"] = max(float(segment["score"]), info.get("score", 0.0))
            if isthing and track >= 0:
                info["track_id"] = track
        bgr = np.empty((*places.shape, 3), np.uint8)
        for channel, shift in enumerate((16, 8, 0)):
            bgr[..., channel] = (table >> shift & 255).astype(np.uint8)[places]
        _write_png(self._folder / name, bgr)
        return {"image_id": image_id, "file_name": name, "segments_info": list(infos.values())}


def read_map(path: Path) -> np.ndarray:
    """(H, W) int32 segment ids of a PNG that was written here."""
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if bgr is None:
        raise OSError(f"cannot read '{path}'")
    values = bgr.astype(np.int32)
    return values[..., 2] + (values[..., 1] << 8) + (values[..., 0] << 16)


def _classes(metadata: dict[str, Any]) -> list[tuple[bool, int, str, int | None]]:
    """Whether a thing, contiguous id, name and the data set's id (None: unknown) of all classes."""
    things, stuff = (list(metadata.get(f"{kind}_classes") or ()) for kind in ("thing", "stuff"))
    ids = [metadata.get(f"{kind}_dataset_id_to_contiguous_id") for kind in ("thing", "stuff")]
    separated = things != stuff
    if ids[0] is not None and ids[1] is not None:
        result: list[tuple[bool, int, str, int | None]] = [
            (True, c, things[c], d) for d, c in ids[0].items()
        ]
        # Separated: stuff class 0 stands for all things.
        of_stuff = {d: c for d, c in ids[1].items() if d not in ids[0] and (c or not separated)}
        return result + [(False, c, stuff[c], d) for d, c in of_stuff.items()]
    first = int(bool(stuff) and stuff[0] == "things")
    return [
        *((True, i, name, None) for i, name in enumerate(things)),
        *((False, i, name, None) for i, name in enumerate(stuff) if i >= first),
    ]


def _write_png(path: Path, bgr: np.ndarray) -> None:
    # Without parameters OpenCV encodes runs, which suits maps: a third of the time of its level 1.
    encoded, data = cv2.imencode(".png", bgr)
    if not encoded:
        raise OSError(f"cannot encode '{path}'")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(data.tobytes())
