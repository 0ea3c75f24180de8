"""What fusion and tracking bring to panoptic segmentation of videos (VPSNet, arXiv 2006.11339).

All arms begin with the same image model and are trained as long on the same clips; the flow network is
trained once, too, and frozen. Arms without a track head get their ids from a tracker.
"""

from __future__ import annotations

from d2ext.tools.compare.comparison import COMPARISONS, Arm, Comparison, Plot

_VPSNET = "vpsnet/vpsnet_shapes.yaml"
_TRACKER = ("TEST.TRACKER", "NorfairTracker", "TEST.TRACKER_MIN_SCORE", "0.5")
_FLOW = ("MODEL.FLOW.NAME", "PyramidFlow", "MODEL.FLOW.WEIGHTS", "{flow}")
_TASK, _VISIBILITY = "video_panoptic_seg", "video_panoptic_visibility"
_WINDOWS = (0, 5, 10, 15)


@COMPARISONS.register()
def video_panoptic() -> Comparison:
    """UPSNet and VPSNet's variants on the clips of the built-in `shapes`."""
    start = ("MODEL.WEIGHTS", "{image}")
    keys = {k: f"{_TASK}/VPQ_{k}" for k in _WINDOWS}
    return Comparison(
        summary="UPSNet, and VPSNet with tracking, fusion, both: Video Panoptic Quality",
        prepared={
            "image": Arm(
                "UPSNet on images", "upsnet/upsnet_shapes.yaml", ("SOLVER.MAX_ITER", "1200")
            ),
            "flow": Arm("optical flow", "flow/pyramid_flow_shapes.yaml"),
        },
        arms={
            "upsnet": Arm(
                "UPSNet a frame, tracker", "vpsnet/upsnet_video_shapes.yaml", (*start, *_TRACKER)
            ),
            "track": Arm("VPSNet Track", _VPSNET, (*start, "MODEL.VPSNET.FUSION", "False")),
            "fuse": Arm(
                "VPSNet Fuse, tracker",
                _VPSNET,
                (*start, *_FLOW, "MODEL.VPSNET.TRACK", "False", *_TRACKER),
            ),
            "fusetrack": Arm("VPSNet FuseTrack", _VPSNET, (*start, *_FLOW)),
        },
        # More clips than for validation, so that there are enough hidden objects.
        overrides=("DATASETS.TEST", "('shapes_test_video_panoptic',)"),
        columns={
            f"{_TASK}/VPQ": "VPQ",
            **{key: f"k = {k}" for k, key in keys.items()},
            f"{_TASK}/VPQ_th": "VPQ things",
            f"{_TASK}/VPQ_st": "VPQ stuff",
            f"{_TASK}/STQ": "STQ",
            f"{_VISIBILITY}/recall_0_visible": "recall, visible",
            f"{_VISIBILITY}/recall_0_hidden": "recall, hidden",
        },
        curves={"windows": {float(k): key for k, key in keys.items()}},
        plots={"windows": Plot("window k, frames", "VPQ")},
    )
