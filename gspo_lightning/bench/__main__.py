"""Benchmarks: seconds by phase, tokens per second, utilisation and memory, against other engines.

gspo bench                        the main table, against TRL
gspo bench --table groups         another table; or --cases S/32/geo/8/kl ...
gspo bench --quick                does it run at all? half a minute
gspo bench scaling                curves over group, prompt, completion, batch
gspo bench loss                   log-probs against full logits
gspo bench checkpoint             seconds to write a checkpoint and to go on
gspo bench memory                 memory, files and threads over 500 rollouts
gspo bench ranks                  one rank and two: seconds, and what is waiting
gspo bench shards                 host memory of ranks that share a policy
gspo bench start                  seconds to the first line and first rollout
gspo bench needs                  what a policy takes on each card and machine, by ranks

A case is MODEL/PROMPT/LENGTH/GROUP, `/kl` behind it for a reference policy: the model's size (S, M,
0.6B), the longest prompt in tokens (the shortest is 5/8 of it), `geo` for completions whose lengths
are geometric with mean 32 and limit 128, or the one length of all.

Decides which runs are made: each in a process of its own, the engines in turn (A B A B). Every run
is a line of JSON in --out; the tables on standard output are Markdown. Ratios are of CPU seconds,
which a busy machine does not stretch; on a GPU of seconds.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from gspo_lightning.bench import (
    cases,
    memory,
    needs,
    parts,
    ranks,
    scaling,
    shards,
    start,
    worker,
)
from gspo_lightning.bench.report import Run, report
from gspo_lightning.run.terminal_log import say
from gspo_lightning.start.typed import program

TABLES = {
    "main": ["S/32/geo/8", "S/256/geo/8", "S/32/128/8", "S/32/64/8/kl"],
    "medium": ["M/32/geo/8", "M/32/64/8/kl"],
    "groups": ["S/32/geo/4", "S/32/geo/8", "S/32/geo/16"],
    "rollout": ["S/32/64/8", "S/256/64/8", "S/256/64/32"],
    "gpu": ["0.6B/256/512/8"],
}
QUICK = {"cases": [cases.Case.parse("S/32/8/4")], "repeats": 1, "steps": 1, "warmup": 0}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; without a command it is ``compare``."""
    parser = argparse.ArgumentParser(
        prog=f"{program(alone=True)} bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    engines = command("compare", compare, "engines in turn on the same work (the default)")
    work = engines.add_mutually_exclusive_group()
    work.add_argument("--table", choices=TABLES, help="cases by name; without it main")
    work.add_argument("--cases", nargs="+", type=cases.Case.parse, metavar="CASE")
    work.add_argument("--quick", action="store_true", help="one tiny case, once")
    both = ["gspo_lightning", "trl"]
    engines.add_argument("--engines", nargs="+", choices=cases.ENGINES, default=both)
    engines.add_argument("--repeats", type=cases.positive, default=2)
    curves = command("scaling", scaling.scaling, "curves of time and memory, as a picture")
    scaling.add_arguments(curves)
    for several in (engines, curves):
        cases.add_run_arguments(several)
        several.add_argument("--assets", default="runs/bench/assets", help="models and prompts")
        several.add_argument("--out", type=Path, default=Path("runs/bench/runs.jsonl"))
    loss = command("loss", parts.loss, "log-probs and their gradient against full logits")
    parts.add_loss_arguments(loss)
    checkpoint = command("checkpoint", parts.checkpoint, "seconds to write one, to go on from it")
    parts.add_checkpoint_arguments(checkpoint)
    text = "memory, open files and threads over a long run of small rollouts"
    memory.add_arguments(command("memory", memory.memory, text))
    text = "seconds from the command to its first line and to the demo's first rollout"
    start.add_arguments(command("start", start.start, text))
    text = "seconds of a rollout with one rank and with several, and the share that is waiting"
    ranks.add_arguments(command("ranks", ranks.ranks, text))
    text = "host memory of ranks that cut a policy, while it is loaded and exported"
    shards.add_arguments(command("shards", shards.shards, text))
    text = "memory of each card and each machine for several numbers of ranks; nothing is loaded"
    needs.add_arguments(command("needs", needs.needs, text))
    worker.add_arguments(command("worker", worker.print_run, "one run, JSON on the last line"))
    known = {"-h", "--help", *commands.choices}
    return parser.parse_args(argv if argv and argv[0] in known else ["compare", *argv])


def compare(options: argparse.Namespace) -> int:
    """Run all engines on all cases, in turn, and print the tables."""
    if options.quick:
        vars(options).update(QUICK)
    work = options.cases or [cases.Case.parse(text) for text in TABLES[options.table or "main"]]
    cases.check(options, [(case, options.prompts_per_rollout) for case in work])
    wanted = [(c, i, e) for c in work for i in range(options.repeats) for e in options.engines]
    runs: list[Run] = []
    for done, (case, repeat, name) in enumerate(wanted, start=1):
        run = {"case": str(case), "name": name, "repeat": repeat}
        run |= cases.one_run(case, name, options)
        cases.keep(run, runs, f"[{done}/{len(wanted)}] {case} {name}", options.out)
    print(cases.heading(options, runs))
    print(report(runs))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code, 2 where something that it needs is not there."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    options.typed = shlex.join(["python", "-m", "gspo_lightning.bench", *argv])
    try:
        return options.run(options)
    except cases.BenchError as error:
        say(f"error: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
