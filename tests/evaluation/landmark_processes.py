"""What each process of a distributed evaluation runs; in a module of its own, since it is spawned."""

import json
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm

from d2ext.evaluation import LandmarkEvaluator


def evaluate_a_part(folder: str) -> None:
    """Each process predicts every second of five images, the one on image i with an error of i."""
    points = [[10.0, 10, 2], [20, 10, 2], [15, 30, 1]]
    records = [
        {
            "image_id": i,
            "annotations": [
                {
                    "id": 7,
                    "bbox": [0, 0, 100, 100],
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": 0,
                    "keypoints": [v for p in points for v in p],
                }
            ],
        }
        for i in range(5)
    ]
    DatasetCatalog.register("landmark_processes", lambda: records)
    MetadataCatalog.get("landmark_processes").set(keypoint_names=["a", "b", "c"])
    evaluator = LandmarkEvaluator("landmark_processes")
    evaluator.reset()
    for record in records[comm.get_rank() :: comm.get_world_size()]:
        output = Instances((100, 100))
        output.pred_keypoints = torch.tensor([points])
        output.pred_keypoints[..., 0] += record["image_id"]
        evaluator.process([record], [{"instances": output}])
    results = evaluator.evaluate()
    path = Path(folder) / f"{comm.get_rank()}.json"
    path.write_text(json.dumps(results))
