"""Evaluate a trained model.

Examples:
    d2ext evaluate --config-file yolact/yolact_R_50_550.yaml MODEL.WEIGHTS output/model_final.pth
    d2ext evaluate --config-file CONFIG --dataset fruits --val-json val.json --val-images val/ \\
        MODEL.WEIGHTS output/model_final.pth
    d2ext evaluate --run output/mine
    d2ext evaluate --exported mine.onnx
    d2ext evaluate --config-file output/config.yaml --resume
    d2ext evaluate --config-file CONFIG --analyze MODEL.WEIGHTS model_final.pth

The evaluator follows from the data set's type. --resume takes the last checkpoint in OUTPUT_DIR; --run
the model, classes and data of a training's folder, in which evaluation/ gets the results; --exported
a file of `d2ext export`.
Results are printed and written to OUTPUT_DIR/results.json.
"""

from __future__ import annotations

import argparse

from d2ext.tools import train
from d2ext.tools.command_line import add_exported_argument, add_run_argument


def run(arguments: list[str] | None = None) -> int:
    """Run the tool; its exit status."""
    parser = train.build_parser(__doc__)
    parser.set_defaults(eval_only=True)
    add_run_argument(parser)
    add_exported_argument(parser)
    for action in parser._actions:
        if action.dest in ("eval_only", "epochs") or action.dest.startswith("train_"):
            action.help = argparse.SUPPRESS
    return train.run(arguments, parser)
