"""Held-out puzzles, answered greedily.

torchrun … -m sslr1.evaluate CONFIG [model.path=FOLDER …]      a table of accuracies with standard errors
python -m sslr1.evaluate --probes [FOLDER] [--count N]         what blind solvers score on the puzzles themselves
"""

import torch

from sslr1 import model, puzzles
from sslr1.data import held_out
from sslr1.model import parallel


class Evaluator:
    """The same held-out puzzles each time; drawn once, rendered when asked."""

    def __init__(self, built):
        self.built = built
        config = built.config
        options = {
            "seed": config.train.seed,
            "spec": built.spec,
            "thinking": config.puzzles.thinking,
            "wordings": config.puzzles.wordings,
            "composed": config.puzzles.composed,
            "rank": built.world.rank,
            "world_size": built.world.size,
        }
        self.batches = {
            name: held_out(
                built.evaluation.store,
                built.evaluation.held_out,
                name,
                config.puzzles.levels[name],
                config.eval.count,
                **options,
            )
            for name in config.puzzles.mixture
        }

    def run(self) -> dict:
        """{eval/<puzzle>/exact, accuracy, format, chance, n} over all ranks."""
        out = {}
        for name, batches in self.batches.items():
            sums = torch.zeros(5, dtype=torch.float64, device=self.built.world.device)
            for batch in batches:
                prompts = model.prompts(batch, self.built.tokenizer)
                groups = self.built.engine.generate(prompts, group_size=1, temperature=0)
                for answer, chance, group in zip(batch.answers, batch.chance, groups):
                    score = self.built.score(answer, group.samples[0].text)
                    sums += sums.new_tensor([score.exact, score.accuracy, score.format_ok, chance, 1])
            *means, n = parallel.all_reduce(sums).tolist()
            for key, total in zip(("exact", "accuracy", "format", "chance"), means):
                out[f"eval/{name}/{key}"] = total / n
            out[f"eval/{name}/n"] = int(n)
        return out


def main():
    import argparse

    from rich.console import Console
    from rich.table import Table

    from sslr1 import entry
    from sslr1.records import standard_error

    parser = argparse.ArgumentParser(prog="python -m sslr1.evaluate", description="Accuracy on held-out puzzles.")
    parser.add_argument("config", nargs="?", help="a YAML file, e.g. configs/tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--probes",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="score blind solvers on puzzles from a folder of images (procedural scenes unless given); no model is loaded; "
        "exit status 1 if a bound does not hold",
    )
    parser.add_argument("--count", type=int, default=2000, help="puzzles a probe and level")
    parser.add_argument("--puzzle", nargs="+", choices=puzzles.NAMES, default=puzzles.NAMES, help="of these (--probes)")
    arguments = parser.parse_args()
    if arguments.probes is not None:
        from sslr1 import probes

        raise SystemExit(probes.report(arguments.probes or None, arguments.count, arguments.puzzle))
    if (arguments.count, arguments.puzzle) != (2000, puzzles.NAMES):
        parser.error("--count and --puzzle go with --probes; for held-out puzzles set eval.count and puzzles.mixture")
    if arguments.config is None:
        parser.error("a configuration is needed, or --probes")
    with entry.built(arguments.config, arguments.overrides) as built:
        result = Evaluator(built).run()
        if built.world.main:
            table = Table(title=f"Held-out accuracy (exact, greedy) of {built.model_path}")
            for column in ("puzzle", "level", "chance", "accuracy", "s.e.", "format", "puzzles"):
                table.add_column(column, justify="left" if column == "puzzle" else "right")
            for name in built.config.puzzles.mixture:
                exact, chance, form, n = (result[f"eval/{name}/{k}"] for k in ("exact", "chance", "format", "n"))
                table.add_row(
                    name,
                    str(built.config.puzzles.levels[name]),
                    f"{chance:.1%}",
                    f"{exact:.1%}",
                    f"{100 * standard_error(exact, n):.1f}",
                    f"{form:.1%}",
                    str(n),
                )
            Console().print(table)


if __name__ == "__main__":
    main()
