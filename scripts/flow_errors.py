"""Mean end-point errors of estimators of optical flow on a pair of images with known flow.

    python scripts/flow_errors.py frame10.png frame11.png flow10.flo \\
        --estimator PyramidFlow output/flow/model_final.pth --picture flow.png

No motion and OpenCV's DIS are always among them. The picture shows the first image, the known flow and
those that were estimated, in one scale of colours.
"""

import argparse

import numpy as np
import torch
from tabulate import tabulate
from torchvision.utils import save_image

from d2ext import get_cfg
from d2ext.checkpoint.flow import load_flow_weights
from d2ext.data.image_io import read_image
from d2ext.data.video.flow import read_flow
from d2ext.evaluation.optical_flow import WRONG, end_point_errors
from d2ext.modeling.flow import FlowEstimator, build_flow
from d2ext.modeling.flow.colors import flow_colors


def estimator(name: str, weights: str = "") -> FlowEstimator:
    cfg = get_cfg()
    cfg.MODEL.FLOW.NAME = name
    flow = build_flow(cfg)
    if weights:
        load_flow_weights(flow, weights)
    return flow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("current", help="the image that the flow starts from")
    parser.add_argument("reference", help="the image that it leads to")
    parser.add_argument("flow", help="Middlebury .flo")
    parser.add_argument(
        "--estimator", nargs=2, action="append", default=[], metavar=("NAME", "WEIGHTS")
    )
    parser.add_argument("--picture", help="where to write one")
    args = parser.parse_args()

    target = read_flow(args.flow)
    images = [torch.from_numpy(read_image(f, "RGB").copy()) for f in (args.current, args.reference)]
    pair = [image.permute(2, 0, 1)[None].float() for image in images]
    flows = {"no motion": torch.zeros(2, *target.shape[:2])}
    for name, weights in [("DIS", ""), *args.estimator]:
        flows[name] = estimator(name, weights)(*pair)[0]
    rows = []
    for name, flow in flows.items():
        errors = end_point_errors(flow.numpy(), target)
        rows.append([name, errors.mean(), 100 * (errors > WRONG).mean()])
    header = ["estimator", "end-point error, px", f"off by more than {WRONG:g} px, %"]
    print(tabulate(rows, header, floatfmt=".3f"))
    if args.picture:
        known = torch.from_numpy(np.nan_to_num(target)).permute(2, 0, 1)
        largest = float(known.norm(dim=0).max())
        pictures = [flow_colors(flow, largest) for flow in (known, *flows.values())]
        save_image(torch.cat([pair[0][0] / 255, *pictures], dim=2), args.picture)


if __name__ == "__main__":
    main()
