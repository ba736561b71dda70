"""What a policy takes on each card and on its host, for several numbers of ranks: a table.

Decides which figures are shown. Nothing is loaded but a config, so no card is needed, nor the
memory that a model wants.
"""

import argparse
from typing import Any

from gspo_lightning.bench.cases import BenchError, positive
from gspo_lightning.bench.report import table
from gspo_lightning.policy import PolicyConfig
from gspo_lightning.policy.lora import LoRAConfig
from gspo_lightning.run.memory import without_weights
from gspo_lightning.sharding.memory import (
    CACHE,
    GRADIENTS,
    IN_UPDATE,
    LARGEST_FILE,
    Ranks,
    Work,
    host_peak,
    on_card,
    on_host,
    peak,
    state_of,
)


def add_arguments(part: argparse.ArgumentParser) -> None:
    part.add_argument("--policy", required=True, help="a folder or a name on the hub")
    part.add_argument("--ranks", type=positive, nargs="+", default=[1, 8, 16, 32])
    part.add_argument("--ranks_of_machine", type=positive, default=8)
    part.add_argument("--strategy", choices=("fsdp2", "ddp"), default="fsdp2")
    part.add_argument("--rollout", choices=("gathered", "in_step"), default="gathered")
    part.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    part.add_argument("--lora", type=positive, metavar="RANK", help="train adapters of this rank")
    part.add_argument("--keep_activations", action="store_true", help="recompute none of them")
    part.add_argument("--prompt_tokens", type=positive, default=2048)
    part.add_argument("--new_tokens", type=positive, default=2048)
    part.add_argument("--group_size", type=positive, default=8)
    part.add_argument("--decoded", type=positive, default=32, help="completions at the same time")
    part.add_argument("--micro_batch_tokens", type=positive, default=16384)


def needs(options: argparse.Namespace) -> int:
    """Print the table."""
    try:
        config = PolicyConfig(
            options.policy,
            dtype=options.dtype,
            lora=options.lora and LoRAConfig(rank=options.lora),
            gradient_checkpointing=not options.keep_activations,
        )
        model = without_weights(config)
    except ValueError as error:
        raise BenchError(str(error)) from error
    found = None if model is None else rows(model, options)
    if found is None:
        raise BenchError(f"--policy {options.policy}: its config does not give its sizes")
    print(f"    {options.typed}\n")
    print(table(found))
    return 0


def rows(model: Any, options: argparse.Namespace) -> list[list[str]] | None:
    """Rows of the table, GB (1e9 bytes); None if the model's config does not name its sizes."""
    work = Work.of_rows(
        options.prompt_tokens,
        options.new_tokens,
        options.decoded,
        rows=options.decoded,
        group_size=options.group_size,
        limit=options.micro_batch_tokens,
        half_precision=True,
        device="cuda",
    )
    alone = on_card(model, work)
    if alone is None:
        return None
    titles = ["ranks", "weights, gradients, moments", "update, at most", "rollout", "its cache"]
    found = [[*titles, "at most", "a machine's memory"]]
    for count in options.ranks:
        sharded = options.strategy == "fsdp2" and count > 1
        in_parts = 3 * alone[GRADIENTS] > LARGEST_FILE
        on_machine = min(count, options.ranks_of_machine)
        gathers = options.rollout == "gathered"
        ranks = Ranks(count, on_machine, sharded, gathers, in_parts=in_parts)
        parts = on_card(model, work, ranks)
        assert parts is not None
        state, cache = state_of(parts), alone[CACHE]
        update = state + max(parts[name] for name in IN_UPDATE)
        rollout = parts["weights"] + parts["Adam"] + parts[CACHE] - cache
        host = host_peak(on_host(model, ranks, "cuda"))
        sizes = (state, update, rollout, cache, peak(parts), host)
        found.append([str(count), *(f"{size / 1e9:.0f}" for size in sizes)])
    return found
