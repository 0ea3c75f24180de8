"""Keep a checkpoint's weights alone, in half precision: small enough to lie in the repository.

python scripts/halve_checkpoint.py output/faces/model_final.pth scripts/demo_faces.pth
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def halve(source: Path, target: Path) -> None:
    """Write ``{"model": weights}``, floats as float16."""
    weights = torch.load(source, map_location="cpu", weights_only=True)["model"]
    halved = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    torch.save({"model": halved}, target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    halve(arguments.source, arguments.target)
