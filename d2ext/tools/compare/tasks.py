"""The systems that solve a task, Detectron2's among them, on the built-in `shapes`.

Each keeps the optimizer and the augmentation of its config; data, batch and iterations are equal, or
with --seconds data, batch and time of training.
"""

from __future__ import annotations

from d2ext.tools.compare.comparison import COMPARISONS, Arm, Comparison

_SIZES = {"APs": "small", "APm": "medium", "APl": "large"}


def _coco(task: str, name: str) -> dict[str, str]:
    """Columns of COCO's AP."""
    columns = {"AP": name, "AP50": "AP50", "AP75": "AP75", **_SIZES}
    return {f"{task}/{metric}": title for metric, title in columns.items()}


@COMPARISONS.register()
def detection() -> Comparison:
    """Boxes: from corners, centres, anchors, proposals."""
    return Comparison(
        summary="CornerNet, both CenterNets, RetinaNet and Faster R-CNN: box AP",
        arms={
            "retinanet": Arm("RetinaNet", "baselines/retinanet_shapes.yaml"),
            "faster_rcnn": Arm("Faster R-CNN", "baselines/faster_rcnn_shapes.yaml"),
            "cornernet": Arm("CornerNet", "cornernet/cornernet_shapes.yaml"),
            "centernet_triplets": Arm(
                "CenterNet, triplets", "centernet_triplets/centernet_triplets_shapes.yaml"
            ),
            "centernet": Arm("CenterNet, points", "centernet/centernet_shapes.yaml"),
        },
        columns=_coco("bbox", "box AP"),
        overrides=("SOLVER.MAX_ITER", "1000"),
    )


@COMPARISONS.register()
def instance_segmentation() -> Comparison:
    """Masks from prototypes, or from a head on each box."""
    return Comparison(
        summary="YOLACT and Mask R-CNN: mask AP",
        arms={
            "mask_rcnn": Arm("Mask R-CNN", "baselines/mask_rcnn_shapes.yaml"),
            "yolact": Arm("YOLACT", "yolact/yolact_R_18_shapes.yaml"),
        },
        columns={**_coco("segm", "mask AP"), "bbox/AP": "box AP"},
        overrides=("SOLVER.MAX_ITER", "1000"),
    )


@COMPARISONS.register()
def poses() -> Comparison:
    """Things with their landmarks in whole images; LandmarkNet, which is given boxes, is in
    ``landmark-heads``."""
    return Comparison(
        summary="CenterNet for poses and Keypoint R-CNN: keypoint AP",
        arms={
            "keypoint_rcnn": Arm("Keypoint R-CNN", "baselines/keypoint_rcnn_shapes.yaml"),
            "centernet": Arm("CenterNet, points", "centernet/centernet_pose_shapes.yaml"),
        },
        columns={
            **{f"keypoints/{metric}": metric for metric in ("AP", "AP50", "AP75", "APm", "APl")},
            "bbox/AP": "box AP",
        },
        overrides=("SOLVER.MAX_ITER", "1000"),
    )


@COMPARISONS.register()
def faces() -> Comparison:
    """Boxes and five points; of RetinaFace also with its mesh."""
    retinaface = "retinaface/mobilenet025_shapes.yaml"
    return Comparison(
        summary="RetinaFace, CenterNet and Keypoint R-CNN: AP of faces, NME of their points",
        arms={
            "keypoint_rcnn": Arm("Keypoint R-CNN", "baselines/keypoint_rcnn_faces_shapes.yaml"),
            "centernet": Arm("CenterNet, points", "centernet/centernet_faces_shapes.yaml"),
            "retinaface": Arm(
                "RetinaFace", retinaface, ("MODEL.RETINAFACE.MESH.NUM_VERTICES", "0")
            ),
            "retinaface_mesh": Arm("RetinaFace with mesh", retinaface),
        },
        columns={
            "bbox/AP": "box AP",
            "faces/AP50-all": "AP50",
            "faces/AP50-from16": "AP50 from 16 pixels",
            "points/NME-all": "points NME %",
            "points/recall-all": "points found %",
            "mesh/NME-all": "mesh NME %",
        },
        overrides=("SOLVER.MAX_ITER", "1000", "SOLVER.IMS_PER_BATCH", "8"),
    )


@COMPARISONS.register()
def surfaces() -> Comparison:
    """DensePose's two descriptions of a surface."""
    return Comparison(
        summary="DensePose with charts and with embeddings: AP of surfaces",
        arms={
            "charts": Arm("charts (U, V)", "densepose/densepose_shapes.yaml"),
            "embeddings": Arm("embeddings (CSE)", "densepose/densepose_cse_shapes.yaml"),
        },
        columns={
            "densepose_gps/AP": "GPS AP",
            "densepose_gpsm/AP": "GPSm AP",
            "densepose_segm/AP": "mask AP",
            "bbox/AP": "box AP",
        },
    )
