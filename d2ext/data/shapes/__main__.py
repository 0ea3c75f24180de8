"""``python -m d2ext.data.shapes OUT --split val --num N``: write the data set as files."""

import argparse
import re
import sys
from pathlib import Path

from d2ext.data.shapes.body_sets import export_bodies
from d2ext.data.shapes.export import export_images
from d2ext.data.shapes.export_video import VIDEO_FORMATS, export_video
from d2ext.data.shapes.face_sets import export_faces
from d2ext.data.shapes.sets import BodySet, FaceSet, ShapesSet, VideoSet


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected SIZE or HEIGHTxWIDTH in pixels, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2ext.data.shapes",
        description="Write the built-in data set in the layout of COCO 2017: images, instances, "
        "keypoints, panoptic; with --video, clips with tracks in several forms; with --faces, "
        "faces with points and meshes; with --bodies, persons with points on their surface.",
    )
    parser.add_argument("out", type=Path, help="folder to write to; other splits in it stay")
    parser.add_argument("--split", default="val", help="train, val or any other word (%(default)s)")
    parser.add_argument("--num", type=int, default=200, help="images, or clips (%(default)s)")
    parser.add_argument(
        "--size", type=_size, default=(256, 256), help="SIZE or HEIGHTxWIDTH in pixels (256)"
    )
    parser.add_argument("--seed", type=int, default=0, help="other scenes (%(default)s)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--video", action="store_true", help="write clips")
    kind.add_argument(
        "--faces", action="store_true", help="write heads: boxes of faces, five points, meshes"
    )
    kind.add_argument(
        "--bodies",
        action="store_true",
        help="write persons in DensePose-COCO's form, and their mesh",
    )
    parser.add_argument("--length", type=int, default=12, help="frames per clip (%(default)s)")
    parser.add_argument(
        "--format", choices=VIDEO_FORMATS, default="ytvis", help="of clips (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace this split in OUT")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)
    height, width = args.size
    try:
        if args.video:
            every = 5 if args.format == "cityscapes_vps" else 1
            clips = VideoSet(args.split, args.num, height, width, args.seed, args.length, every)
            written = export_video(clips, args.out, args.format, overwrite=args.overwrite)
        elif args.faces:
            faces = FaceSet(args.split, args.num, height, width, args.seed)
            written = export_faces(faces, args.out, overwrite=args.overwrite)
        elif args.bodies:
            bodies = BodySet(args.split, args.num, height, width, args.seed)
            written = export_bodies(bodies, args.out, overwrite=args.overwrite)
        else:
            images = ShapesSet(args.split, args.num, height, width, args.seed)
            written = export_images(images, args.out, overwrite=args.overwrite)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for target in written:
        print(args.out / target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
