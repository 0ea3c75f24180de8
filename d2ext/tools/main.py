"""``d2ext COMMAND ...``: one program for everything, the same as ``python -m d2ext``."""

from __future__ import annotations

import importlib
import sys

# Command → (module with `run(arguments) -> exit status`, what it does).
COMMANDS = {
    "train": ("d2ext.tools.train", "train a model and evaluate it, on one or many GPUs or the CPU"),
    "evaluate": ("d2ext.tools.evaluate", "evaluate a trained model on a data set"),
    "predict": ("d2ext.tools.predict", "run a model on images, videos or a camera"),
    "web": ("d2ext.tools.web", "show predictions of one or several models on a web page"),
    "convert": ("d2ext.tools.convert", "convert a published checkpoint to one that d2ext loads"),
    "visualize-data": ("d2ext.tools.visualize_data", "draw annotations as training gets them"),
    "export": ("d2ext.tools.export", "write a trained model as ONNX, torch.export or AOTInductor"),
    "benchmark": ("d2ext.tools.benchmark", "measure the speed of a model or of the operators"),
    "compare": ("d2ext.tools.compare", "train several models with one budget and compare them"),
    "info": ("d2ext.info", "show versions, what is compiled, and which GPU there is"),
}
_WIDTH = max(map(len, COMMANDS))
HELP = f"""usage: d2ext COMMAND ...

Dense recognition systems for Detectron2. Commands:

{chr(10).join(f"  {name.ljust(_WIDTH)}  {summary}" for name, (_, summary) in COMMANDS.items())}

`d2ext COMMAND --help` shows a command's options and examples. A config file is a path or a name in the
model zoo, such as yolact/yolact_R_50_550.yaml.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; its exit status, 2 if there is no such command, 130 after Ctrl-C."""
    words = sys.argv[1:] if arguments is None else arguments
    command = words[0] if words else "--help"
    if command in ("-h", "--help", "--version"):
        from d2ext.version import __version__

        print(f"d2ext {__version__}" if command == "--version" else HELP)
        return 0 if words else 2
    if command not in COMMANDS:
        print(f"error: there is no command {command!r}.\n\n{HELP}", file=sys.stderr)
        return 2
    # What the command's help calls itself.
    sys.argv = [f"d2ext {command}", *words[1:]]
    try:
        return importlib.import_module(COMMANDS[command][0]).run(words[1:])
    except KeyboardInterrupt:  # of a command that has nothing to say about it
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
