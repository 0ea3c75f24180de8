"""What each process of a distributed evaluation runs; in a module of its own, since it is spawned."""

import json
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from d2ext.config import get_cfg
from d2ext.evaluation import build_evaluator
from tests.evaluation.test_video_instances import IDS, NAMES, annotation, predicted, video


def evaluate_a_video(folder: str) -> None:
    """Each process has a whole video; ids of both begin at 1, and the second process's changes."""
    records = [video(n, [[annotation(1, 4 * t, 4)] for t in range(4)]) for n in (11, 12)]
    DatasetCatalog.register("video_processes", lambda: records)
    ids = {c: i for i, c in enumerate(IDS)}
    MetadataCatalog.get("video_processes").set(
        evaluator_type="ytvis", thing_classes=NAMES, thing_dataset_id_to_contiguous_id=ids
    )
    evaluator = build_evaluator(get_cfg(), "video_processes", folder)
    evaluator.reset()
    for frame in records[comm.get_rank()]["frames"]:
        track = 2 if comm.get_rank() and frame["frame"] >= 2 else 1
        output = predicted(frame["annotations"], track_ids=[track])
        evaluator.process([frame], [{"instances": output}])
    results = evaluator.evaluate()
    (Path(folder) / f"{comm.get_rank()}.json").write_text(json.dumps(results))
