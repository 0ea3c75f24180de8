"""Show predictions on a web page: an image or a short video in, picture and results out.

    d2ext web --config-file yolact/yolact_R_50_550.yaml --weights model_final.pth
    d2ext web --run output/mine
    d2ext web --config-file yolact/yolact_R_50_550.yaml --weights yolact.pth \\
        --config-file upsnet/upsnet_R_50_coco.yaml --weights upsnet.pth
    d2ext web --exported mine.onnx --run output/mine

Each --config-file (with its --weights), --run and --exported is a system; all of them predict on what is
uploaded, side by side. The results are those of `d2ext predict`: coco_results.json. The page is for this
machine only; --host 0.0.0.0 opens it to the network, where everyone may then upload files.

Needs `pip install d2ext[web]` (gradio). Exit status: 0 after Ctrl-C; 2 if the command is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from d2ext.config import ConfigError, add_options_argument, load_config, merge_options
from d2ext.data.image_io import is_image
from d2ext.data.saved_metadata import class_metadata
from d2ext.engine.run_folder import load_run
from d2ext.engine.video_predictor import FramePredictor
from d2ext.export import ExportedFile
from d2ext.model_zoo import find_config_file
from d2ext.tools import predict
from d2ext.tools.command_line import CommandError, make_parser, positive
from d2ext.tools.prediction_files import Job
from d2ext.utils.terminal import show_log, silence_foreign
from d2ext.utils.video import VideoError, VideoReader

# The table of results on the page: its columns, and how many rows; the file has all.
_COLUMNS = ["image or frame", "class", "score", "x, y, width, height"]
_SHOWN = 100


class System:
    """A model with its weights.

    Args:
        name: over its results.
        cfg: its config, with ``MODEL.WEIGHTS``.
        exported: use this file instead of building the model.
        max_frames: of a video.
    """

    def __init__(
        self, name: str, cfg: CfgNode, exported: ExportedFile | None = None, max_frames: int = 300
    ) -> None:
        self.name, self._cfg, self._max_frames = name, cfg, max_frames
        self._metadata = class_metadata(cfg)
        self._predictor = FramePredictor(cfg, None if exported is None else exported.model(cfg))

    def __call__(self, file: str, threshold: float, folder: Path) -> tuple[Path, Path]:
        """Predict on an image or a video; the paths of the picture or video, and of the results.

        Args:
            threshold: instances of a lower score are left out.
            folder: where they are written.

        Raises:
            CommandError: the file cannot be read, or is too large.
        """
        source, score = Path(file), str(threshold)
        words = ["--config-file", "", "--input", file, "--output", str(folder)]
        args = predict.build_parser().parse_args([*words, "--confidence-threshold", score])
        args.max_frames = self._max_frames
        predict.complete(args, self._cfg, self._metadata)
        self._predictor.reset()
        folder.mkdir(parents=True, exist_ok=True)
        if is_image(file):
            picture, results = folder / f"{source.stem}.png", folder / "coco_results.json"
            job = Job(source, picture, 1)
            problems = predict.run_on_images(self._predictor, [job], self._metadata, args)
            if problems:
                raise CommandError(problems[0])
            return picture, results
        picture = folder / f"{source.stem}.mp4"
        try:
            predict.run_on_video(self._predictor, VideoReader(file), picture, self._metadata, args)
        except VideoError as error:
            raise CommandError(
                f"'{source.name}' is neither an image nor a video: {error}"
            ) from error
        return picture, folder / f"{source.stem}_coco_results.json"

    def table(self, results: Path) -> list[list[Any]]:
        """Frame or image, class, score and box (x, y, width, height) of the first results."""
        names = self._metadata.get("thing_classes") or []
        ids = self._metadata.get("thing_dataset_id_to_contiguous_id") or {}
        rows = []
        for x in json.loads(results.read_text(encoding="utf-8"))[:_SHOWN]:
            index = ids.get(x["category_id"], x["category_id"])
            name = names[index] if index < len(names) else f"class {index}"
            box = ", ".join(f"{v:.0f}" for v in x["bbox"])
            rows.append([x["image_id"], name, round(x["score"], 3), box])
        return rows


def build_page(systems: Sequence[System], folder: Path) -> Any:
    """The page, as ``gradio.Blocks``.

    Args:
        folder: for results, a sub-folder for each upload.
    """
    import gradio as gr

    hidden = gr.update(value=None, visible=False)

    def run(file: str | None, threshold: float) -> list[Any]:
        if not file:
            gr.Warning("Upload an image or a video first.")
            return gr.skip()
        found: list[Any] = []
        target = Path(tempfile.mkdtemp(dir=folder))
        for i, system in enumerate(systems):
            try:
                picture, results = system(file, threshold, target / str(i))
            except (CommandError, ConfigError, OSError) as error:
                reason = str(error).replace(file, Path(file).name)  # not where gradio keeps it
                note = gr.update(value=f"**Error:** {reason}", visible=True)
                found += [note, hidden, hidden, [], None]
                continue
            video = picture.suffix == ".mp4"
            found += [
                hidden,
                gr.update(value=None if video else str(picture), visible=not video),
                gr.update(value=str(picture) if video else None, visible=video),
                system.table(results),
                str(results),
            ]
        return found

    with gr.Blocks(title="d2ext", analytics_enabled=False) as page:
        gr.Markdown(
            "# d2ext\nUpload an image or a short video: each system shows what it sees in it."
        )
        with gr.Row():
            file = gr.File(label="Image or video", file_types=["image", "video"], type="filepath")
            with gr.Column():
                threshold = gr.Slider(0, 1, 0.5, label="Least score")
                button = gr.Button("Predict", variant="primary")
        outputs: list[Any] = []
        with gr.Row():
            for system in systems:
                with gr.Column():
                    gr.Markdown(f"### {system.name}")
                    outputs += [
                        gr.Markdown(visible=False),
                        gr.Image(label="Picture", interactive=False),
                        gr.Video(label="Video", interactive=False, visible=False),
                        gr.Dataframe(headers=_COLUMNS),
                        gr.File(label="All results (COCO)"),
                    ]
        button.click(run, [file, threshold], outputs, concurrency_limit=1)  # models have state
    return page


class _Append(argparse.Action):
    """Appends (option, value) to the list of systems, so that they keep their order."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        namespace.systems = [*(namespace.systems or []), (option.lstrip("-"), values)]


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    for option, metavar, text in (
        ("--config-file", "FILE", "a path, or a name in the model zoo; may be given several times"),
        ("--weights", "FILE", "checkpoint of the --config-file before it"),
        ("--run", "DIR", "the folder of a training; may be given several times"),
        ("--exported", "FILE", "a file of `d2ext export`; may be given several times"),
    ):
        add(option, dest="systems", action=_Append, metavar=metavar, help=text)
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=positive, default=7860, help="(default: %(default)s)")
    help_text = "of a video; later ones are left out (default: %(default)s)"
    add("--max-frames", type=positive, default=300, metavar="N", help=help_text)
    add_options_argument(parser)
    return parser


def load_systems(args: argparse.Namespace) -> list[System]:
    """The systems of the command line, in its order.

    Raises:
        ValueError, FileNotFoundError: the command, a config or a checkpoint is wrong.
    """
    given: list[tuple[str, CfgNode, ExportedFile | None]] = []
    for option, value in args.systems or ():
        if option == "weights":
            if not given or given[-1][1].MODEL.WEIGHTS or given[-1][2] is not None:
                raise CommandError(f"--weights {value} belongs behind a --config-file.")
            given[-1][1].MODEL.WEIGHTS = value
        elif option == "exported":
            file = ExportedFile(value)
            given.append((Path(value).name, file.cfg, file))
        elif option == "run":
            given.append((Path(value).resolve().name, load_run(value), None))
        else:
            cfg = load_config(find_config_file(value))
            cfg.MODEL.WEIGHTS = ""
            given.append((Path(value).stem, cfg, None))
    if not given:
        raise CommandError(
            "There is no system: give --config-file and --weights, --run or --exported."
        )
    for name, cfg, exported in given:
        if exported is None and not cfg.MODEL.WEIGHTS:
            raise CommandError(f"{name} has no weights: give --weights behind its --config-file.")
        merge_options(cfg, args.opts)
    return [System(*x, max_frames=args.max_frames) for x in given]


def run(arguments: list[str] | None = None) -> int:
    """Run the tool; its exit status."""
    args = build_parser().parse_args(arguments)
    silence_foreign()
    show_log("d2ext")
    try:
        if find_spec("gradio") is None:
            raise CommandError("The web page needs gradio: pip install d2ext[web]")
        systems = load_systems(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="d2ext_web_") as folder:
        page = build_page(systems, Path(folder))
        try:
            page.launch(server_name=args.host, server_port=args.port, share=False)
        except OSError:  # whose text names gradio's own variables
            place = f"{args.host}:{args.port}"
            print(
                f"error: {place} is in use, or not of this machine: give --port.", file=sys.stderr
            )
            return 2
    return 0
