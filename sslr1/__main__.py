"""The commands, their options and their help: `sslr1 train …`, which is the same as `python -m sslr1.train …`.

Nothing large is imported before an answer is known to need it. How a command ends: 0 done; 2 refused, or ended by
something that its user can mend, in one line; 1 anything else, and a probe's bound that isn't shown to hold; 130
interrupted.
"""

import argparse
import runpy
import sys
from collections import namedtuple

import sslr1
from sslr1.puzzles import NAMES

ALL = NAMES, (1, 2, 3, 4)  # puzzles and levels
OVERRIDES = {"nargs": "*", "metavar": "section.key=value", "help": "settings over the file's (docs/configuration.md)"}

PUZZLES = {"nargs": "+", "choices": NAMES, "metavar": "NAME"}


class Parser(argparse.ArgumentParser):
    """With defaults in the help, and a word on settings that were given as if they were options."""

    def __init__(self, **options):
        super().__init__(formatter_class=_Help, **options)

    def error(self, message):
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0]
        key, equals, value = unknown.lstrip("-").partition("=")
        if unknown != message:
            from sslr1.config.file import meant

            if equals or "." in key or meant(key) != [key]:
                settings = " or ".join(f"{name}={value or 'VALUE'}" for name in meant(key))
                message = f"{unknown} is no option; settings have no dashes: {settings}"
        super().error(message)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        if action.default in (None, False, *ALL):
            return action.help
        return super()._get_help_string(action)


def _allow_functions(parser):
    parser.add_argument(
        "--allow-functions",
        action="store_true",
        help="import functions (tasks.NAME.function) that a configuration in a run's or a model's folder names",
    )


def train(parser):
    parser.add_argument("config", nargs="?", help="a YAML file, e.g. configs/tiny.yaml; the defaults with --size")
    parser.add_argument("overrides", **OVERRIDES)
    parser.add_argument(
        "--plan",
        type=int,
        metavar="GPUS",
        help="print memory and communication of each of so many GPUs, and start nothing; config.json is enough",
    )
    parser.add_argument("--size", metavar="NAME", help="with --plan: of a published model, e.g. qwen2.5-vl-7b")
    _allow_functions(parser)
    parser.add_argument("--card", metavar="NAME", help="with --plan: fit and time on a GPU, e.g. h100 or rtx4090")


def _settle_train(parser, arguments):
    if arguments.plan is None and (arguments.size or arguments.card):
        parser.error("--size and --card go with --plan")
    if arguments.size and "=" in (arguments.config or ""):  # a setting: there is no file
        arguments.overrides.insert(0, arguments.config)
        arguments.config = None
    elif arguments.config is None and not arguments.size:
        parser.error("a configuration is needed, or --plan with --size")


def warmup(parser):
    parser.add_argument("config", help="a YAML file")
    parser.add_argument("out", help="folder for the warmed-up model")
    _allow_functions(parser)
    parser.add_argument("overrides", **OVERRIDES)


def evaluate(parser):
    parser.add_argument(
        "what",
        nargs="?",
        help="a YAML file, a run folder, a checkpoint of one, or a Hugging Face folder (an adapter's, too)",
    )
    parser.add_argument("overrides", **OVERRIDES)
    parser.add_argument(
        "--levels", nargs="+", choices=("all", "1", "2", "3", "4"), help="of all puzzles (default: the configuration's)"
    )
    parser.add_argument(
        "--puzzle",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(NAMES)} and the configuration's tasks (default: the configuration's, all tasks)",
    )
    parser.add_argument(
        "--form",
        choices=("direct", "thinking", "both"),
        help="(default: the configuration's, and direct for a benchmark)",
    )
    _allow_functions(parser)
    parser.add_argument("--benchmark", metavar="FILE.tsv", help="a benchmark in VLMEvalKit's form")
    parser.add_argument("--name", help="the benchmark's (default: the file's)")
    parser.add_argument("--circular", action="store_true", help="also with the options rotated: right if all are")
    parser.add_argument(
        "--max-pixels", type=_positive, default=12_845_056, help="of a benchmark's question, all pictures together"
    )
    parser.add_argument("--max-tokens", type=_positive, default=1024, help="of an answer to a benchmark")
    parser.add_argument(
        "--out", metavar="FILE.json", help="write the numbers there, and a log of every sample to FILE.jsonl"
    )
    parser.add_argument("--baseline", metavar="FILE.jsonl", help="such a log, to compare with question by question")
    parser.add_argument(
        "--probes",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="score blind solvers on puzzles from a folder of images (procedural scenes unless given); no model is "
        "loaded; exit status 1 unless every bound is shown to hold",
    )
    parser.add_argument("--count", type=_positive, default=2000, help="puzzles a probe and level")


def preview(parser):
    parser.add_argument("folder", help="a folder of images")
    parser.add_argument("--out", default="preview", help="folder for the PNG files")
    parser.add_argument("--puzzle", **PUZZLES, default=NAMES, help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument(
        "--level", nargs="+", type=int, choices=ALL[1], default=ALL[1], metavar="N", help="of 1 to 4 (default: all)"
    )
    parser.add_argument("--count", type=int, default=2, help="puzzles of each level")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other puzzles")
    parser.add_argument("--min-side", type=int, default=252, help="px that an image's shorter side has at least")
    parser.add_argument("--html", action="store_true", help="also write index.html, a quiz of the puzzles")


def report(parser):
    parser.add_argument("folder", help="a run folder, e.g. runs/demo")
    parser.add_argument("--out", help="the file to write (default: report.html in the run folder)")


def compare(parser):
    parser.add_argument("first", help="a run folder, e.g. runs/demo")
    parser.add_argument("second", help="another one")
    parser.add_argument("--out", default="compare.html", help="the file to write")


def overlap(parser):
    parser.add_argument(
        "images", nargs="+", metavar="IMAGES", help="folders, .tar archives, parquet files; as data.path"
    )
    parser.add_argument(
        "--against", required=True, metavar="BENCHMARK", help="images as before, or a benchmark in VLMEvalKit's form"
    )
    parser.add_argument("--out", default="excluded.txt", metavar="FILE", help="for data.exclude")
    parser.add_argument("--column", metavar="NAME", help="of IMAGES' parquet files (default: found)")


def export(parser):
    kinds = parser.add_subparsers(dest="what", required=True)
    of_model = kinds.add_parser("model", help="a run's model as a Hugging Face folder")
    of_model.add_argument("source", metavar="RUN", help="a run's folder, or one of its checkpoints")
    of_model.add_argument("out", metavar="OUT", help="a new or empty folder")
    of_model.add_argument(
        "--checkpoint",
        choices=("best", "newest"),
        default="best",
        help="which of the run's: best by held-out accuracy, or newest",
    )
    of_model.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the weights (default: what the run computed in)",
    )
    of_model.add_argument(
        "--adapter",
        action="store_true",
        help="of a run with model.lora its adapter alone (default: merged into its base)",
    )
    of_puzzles = kinds.add_parser("puzzles", help="puzzles as the data of another trainer")
    of_puzzles.add_argument("folder", metavar="IMAGES", help="a folder of images")
    of_puzzles.add_argument("out", metavar="OUT", help="a new or empty folder")
    of_puzzles.add_argument(
        "--format", dest="trainer", choices=("trl", "verl", "easyr1", "ms-swift"), required=True, help="whose"
    )
    of_puzzles.add_argument("--count", type=_count, help="puzzles to train on (default: one an image)")
    of_puzzles.add_argument(
        "--val", type=_count, default=0, help="puzzles from held-out images, in a file of their own"
    )
    of_puzzles.add_argument("--puzzle", **PUZZLES, help=f"of {', '.join(NAMES)}, in turn (default: all)")
    of_puzzles.add_argument("--level", nargs="+", type=int, help="each of these (default: where each starts)")
    of_puzzles.add_argument("--seed", type=int, default=0, help="another one draws other puzzles")
    of_puzzles.add_argument("--direct", action="store_true", help="ask for the answer alone, without <think></think>")
    of_puzzles.add_argument("--composed", action="store_true", help="all pictures of a puzzle on one")
    of_puzzles.add_argument("--model", help="the model's folder, whose picture sizes are kept (default: Qwen2.5-VL's)")
    of_puzzles.add_argument("--max-pixels", type=_count, help="largest picture, px (default: the model's)")
    of_puzzles.add_argument(
        "--min-side", type=int, default=252, help="images of a shorter side under this are passed over"
    )
    of_puzzles.add_argument(
        "--max-side", type=int, default=768, help="images of a longer side over this are reduced to it"
    )
    of_puzzles.add_argument(
        "--image-format",
        choices=("png", "jpeg"),
        default="png",
        help="of the pictures: lossless, or JPEG of quality 95 without subsampling",
    )
    of_puzzles.add_argument("--workers", type=_positive, help="processes (default: as many as processors)")


def _count(text) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def _positive(text) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


Command = namedtuple("Command", "options about settle", defaults=(lambda parser, arguments: None,))
MODULES = {"compare": "report.compare", "overlap": "evaluate.overlap"}
COMMANDS = {  # each is the module of that name, or of that in MODULES
    "train": Command(train, "train a multimodal language model on puzzles by GRPO", _settle_train),
    "warmup": Command(warmup, "teach a model folder the format of answers only"),
    "evaluate": Command(evaluate, "accuracy on held-out puzzles and on benchmarks; blind solvers"),
    "preview": Command(preview, "look at the puzzles that a folder of images gives"),
    "report": Command(report, "write report.html of a run folder"),
    "compare": Command(compare, "two runs on one page: curves, and differences on held-out puzzles"),
    "overlap": Command(overlap, "images to train on that a benchmark shows, too"),
    "export": Command(export, "a run's model, or puzzles, for use elsewhere"),
}


def parsed(command, argv=None):
    """The arguments of a command (default: of this process). Ends the program where they are wrong, and where help is
    asked for."""
    options, about, settle = COMMANDS[command]
    module = f"sslr1.{MODULES.get(command, command)}"
    prog = f"python -m {module}" if sslr1.program() == module else f"sslr1 {command}"
    parser = Parser(prog=prog, description=f"{about[0].upper()}{about[1:]}.")
    options(parser)
    parse = parser.parse_intermixed_args if parser._subparsers is None else parser.parse_args  # which can't mix
    arguments = parse(argv)
    settle(parser, arguments)
    return arguments


def answer(command) -> None:
    """End a program that is only asked for help, or wrongly, before it imports anything."""
    command = next((name for name, module in MODULES.items() if module == command), command)
    if command in COMMANDS:
        parsed(command)


def main():
    sslr1.begin_program()
    listed = "\n".join(f"  {name:<10}{command.about}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="sslr1",
        usage="sslr1 COMMAND …",
        description=f"{sslr1.__doc__.splitlines()[0]}\n\n{listed}",
        epilog="sslr1 COMMAND --help says more. `python -m sslr1.COMMAND …` and, on several GPUs, "
        "`torchrun … -m sslr1.COMMAND …` are the same.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sslr1 {sslr1.__version__}")
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help="one of these")
    asked = parser.parse_args(sys.argv[1:2]).command
    if asked is None:
        return parser.print_help()
    del sys.argv[1]
    parsed(asked)
    runpy.run_module(f"sslr1.{MODULES.get(asked, asked)}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
