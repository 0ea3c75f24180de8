"""Write docs/models.md: every config, with what its header says of it.

python scripts/model_table.py
"""

from __future__ import annotations

from pathlib import Path

from d2ext import model_zoo

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "models.md"
HEAD = """# Models

The configs, to be named with their folder (`--config-file yolact/yolact_R_50_550.yaml`), with their
schedules (iterations x images each) and what their files say. Published figures are those of the papers
and their repositories; none was measured here, since the data and the weights are downloads.
Made by `python scripts/model_table.py`.
"""
# Folder -> heading with the page of the system.
SYSTEMS = {
    "yolact": "[YOLACT](yolact.md)",
    "yolact_edge": "[YolactEdge](yolact_edge.md)",
    "upsnet": "[UPSNet](panoptic.md)",
    "vpsnet": "[VPSNet](vpsnet.md)",
    "cornernet": "[CornerNet](keypoint_detectors.md)",
    "centernet_triplets": "[CenterNet (triplets)](keypoint_detectors.md)",
    "centernet": "[CenterNet (points)](keypoint_detectors.md)",
    "landmarks": "[LandmarkNet](landmarks.md)",
    "retinaface": "[RetinaFace](retinaface.md)",
    "densepose": "[DensePose](densepose.md)",
    "flow": "[Optical flow](vpsnet.md#optical-flow)",
    "baselines": "[Detectron2's own models](detectron2.md)",
}


def header(path: Path) -> str:
    """The comment at the top of a config, or of the one that it is based on."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    if comment:
        return " ".join(comment)
    base = next((line.split('"')[1] for line in lines if line.startswith("_BASE_")), None)
    return "" if base is None else f"as `{Path(base).stem}`"


def row(path: Path) -> str:
    """A line of the table."""
    name = path.relative_to(ROOT / "configs").as_posix()
    cfg = model_zoo.get_config(name)
    what = header(path).replace("|", "\\|")
    schedule = f"{cfg.SOLVER.MAX_ITER:,} x {cfg.SOLVER.IMS_PER_BATCH}"
    return f"| `{path.name}` | {schedule} | {what} |"


def table() -> str:
    """The page."""
    parts = [HEAD]
    for folder, heading in SYSTEMS.items():
        files = sorted((ROOT / "configs" / folder).glob("*.yaml"))
        # Neither what others are based on, nor checks that learn a few images by heart.
        rows = [row(f) for f in files if not f.name.startswith("Base-") and "overfit" not in f.name]
        parts.append(
            f"\n## {heading}\n\nIn `{folder}/`.\n\n| config | schedule | |\n| --- | --- | --- |\n"
        )
        parts.append("\n".join(rows) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    TARGET.write_text(table(), encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)} is written.")
