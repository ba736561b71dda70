"""Parts measured by themselves: log-probs under a large vocabulary, checkpoints and continuing.

Decides what log-probs are compared with: the plain way, a log-softmax over the logits of all
positions.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import gspo_lightning as gspo
from gspo_lightning.bench.cases import bare_trainer, heading, in_process, letters_a_to_m, resident
from gspo_lightning.bench.report import number, table
from gspo_lightning.checkpoint.files import find_checkpoint
from gspo_lightning.checkpoint.io import AtomicCheckpointIO
from gspo_lightning.guards.memory import peaks, reset_peaks
from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.run.one_line import quiet
from gspo_lightning.run.terminal_log import say
from gspo_lightning.start.shipped import DATA
from gspo_lightning.step import CPU

DEMO = DATA / "arithmetic"
Clocks = tuple[float, float]  # wall and CPU seconds


def plain_logprobs(model: Any, prompt: Tensor, completion: Tensor) -> Tensor:
    """Log-softmax over the logits of all positions."""
    ids = torch.cat([prompt, completion], 1)
    logits = model(input_ids=ids, use_cache=False).logits
    distribution = logits[:, :-1].float().log_softmax(-1)
    return distribution.gather(-1, ids[:, 1:, None])[:, prompt.shape[1] - 1 :, 0]


def own_logprobs(model: Any, prompt: Tensor, completion: Tensor) -> Tensor:
    """The same from ``completion_logprobs``, as an update calls it."""
    masks = [torch.ones_like(ids, dtype=torch.bool) for ids in (prompt, completion)]
    arguments = prompt, masks[0], completion, masks[1]
    return completion_logprobs(model, *arguments, group_size=len(prompt)).logprobs


LOGPROBS = {"full logits": plain_logprobs, "gspo_lightning": own_logprobs}


def add_loss_arguments(part: argparse.ArgumentParser) -> None:
    part.add_argument("--vocabulary", type=int, default=151936)
    part.add_argument("--hidden", type=int, default=1024)
    part.add_argument("--sequences", type=int, default=8, help="completions, one group")
    part.add_argument("--tokens", type=int, default=128, help="of each completion")
    part.add_argument("--repeats", type=int, default=2)
    part.add_argument("--threads", type=int, default=1)
    way = "measure this one here, JSON on the last line"
    part.add_argument("--way", choices=LOGPROBS, help=way)
    part.add_argument("--frozen", action="store_true", help="with it: the embedding is not trained")


def loss(options: argparse.Namespace) -> int:
    """Time and memory of log-probs and their gradient, each way in processes of its own."""
    if options.way is not None:
        print(json.dumps(measure_loss(options)))
        return 0
    names = ("vocabulary", "hidden", "sequences", "tokens", "threads")
    arguments = [f"--{name}={getattr(options, name)}" for name in names]
    kinds = [(way, frozen) for frozen in (True, False) for way in LOGPROBS]
    found: dict[tuple[str, bool], list[dict[str, float]]] = {kind: [] for kind in kinds}
    for repeat in range(options.repeats):
        for way, frozen in kinds:
            command = ["-m", "gspo_lightning.bench", "loss", f"--way={way}", *arguments]
            command += ["--frozen"] if frozen else []
            result = in_process(command, options.threads)
            found[way, frozen].append(result)
            say(f"[{repeat + 1}/{options.repeats}] {way}: {result['cpu_seconds']:.2f} CPU s")
    rows = [["embedding", "log-probs", "CPU seconds", "peak MiB above start", "of which gradients"]]
    for (way, frozen), results in found.items():
        middle = {name: median(result[name] for result in results) for name in results[0]}
        memory = (f"{middle[name]:,.0f}" for name in ("extra_mib", "gradients_mib"))
        kind = "frozen" if frozen else "trained"
        rows.append([kind, way, number(middle["cpu_seconds"]), *memory])
    print(heading(options, []))
    print(table(rows))
    return 0


def measure_loss(options: argparse.Namespace) -> dict[str, float]:
    """One forward and backward pass of a model that is little more than its head."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
        intermediate_size=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.get_input_embeddings().weight.requires_grad_(not options.frozen)  # the head's, too
    trained = [p for p in model.parameters() if p.requires_grad]
    prompt = torch.randint(2, options.vocabulary, (1, 8)).expand(options.sequences, -1)

    def step(length: int) -> None:
        completion = torch.randint(2, options.vocabulary, (options.sequences, length))
        logprobs = LOGPROBS[options.way](model, prompt, completion)
        torch.autograd.grad(logprobs.mean(), trained)

    step(2)  # what is made once is no part of the figures
    reset_peaks([CPU])
    base, start = resident(), time.process_time()
    step(options.tokens)
    return {
        "cpu_seconds": time.process_time() - start,
        "extra_mib": 1024 * peaks([CPU])[CPU] - base,
        "gradients_mib": sum(p.numel() * p.element_size() for p in trained) / 2**20,
    }


def add_checkpoint_arguments(part: argparse.ArgumentParser) -> None:
    part.add_argument("--model", default=str(DEMO / "policy"))
    part.add_argument("--prompts", default=str(DEMO / "train.jsonl"))
    part.add_argument("--writes", type=int, default=20)
    part.add_argument("--starts", type=int, default=5, help="fresh and continued, in turn")
    part.add_argument("--threads", type=int, default=1)


def checkpoint(options: argparse.Namespace) -> int:
    """Seconds to write a checkpoint, through to the disk, and to start with one or without."""
    torch.set_num_threads(options.threads)
    writes = Writes(options.writes)
    pairs: list[tuple[Clocks, Clocks]] = []
    with tempfile.TemporaryDirectory(dir=".") as folder, quiet():  # not /tmp, often memory
        short_run(options, Path(folder), [writes])
        for turn in range(options.starts):
            own = Path(folder, str(turn))
            fresh = short_run(options, own, [gspo.RolloutCheckpoint(1)])
            pairs.append((fresh, short_run(options, own, [gspo.RolloutCheckpoint(1)], "last")))
    milliseconds = [1000 * seconds for seconds in writes.seconds]
    cells = [writes.size / 1e6, median(milliseconds), max(milliseconds), 1000 * writes.cpu]
    rows = [["checkpoint MB", "median ms", "longest ms", "CPU ms"], [number(c) for c in cells]]
    print(heading(options, []))
    print(table(rows))
    if pairs:
        print("\n" + table(starts(pairs)))
    return 0


def starts(pairs: list[tuple[Clocks, Clocks]]) -> list[list[str]]:
    """Rows of a table: fresh and continued starts, medians, and the median of their ratios."""
    fresh, continued = zip(*pairs, strict=True)
    ratios = [[b / a for a, b in zip(*pair, strict=True)] for pair in pairs]
    rows = [["from nothing to the first rollout", "seconds", "CPU seconds"]]
    for name, found in {"fresh": fresh, "continued": continued, "ratio": ratios}.items():
        rows.append([name, *(number(median(clock)) for clock in zip(*found, strict=True))])
    return rows


def short_run(
    options: argparse.Namespace, folder: Path, callbacks: list[Callback], ckpt: str | None = None
) -> Clocks:
    """One rollout of a run, the first or the next one; how long it took until it began."""
    wall, cpu, begun = time.perf_counter(), time.process_time(), Begun()
    seed_everything(0, verbose=False)
    module = gspo.GSPOModule(
        gspo.PolicyConfig(options.model),
        rewards={"letters": gspo.RewardTerm(letters_a_to_m)},
        sampler=gspo.GroupSampler(group_size=4, max_new_tokens=8),
    )
    trainer = bare_trainer(
        folder,
        [begun, *callbacks],
        accelerator="cpu",
        enable_checkpointing=any(isinstance(c, gspo.RolloutCheckpoint) for c in callbacks),
        plugins=[AtomicCheckpointIO()],
    )
    rollouts = 1 if ckpt is None else 2
    data = gspo.PromptData(options.prompts, prompts_per_rollout=4, num_rollouts=rollouts)
    path = find_checkpoint(folder, ckpt)
    trainer.fit(module, data, ckpt_path=path, weights_only=True if path else None)
    assert begun.rollout == rollouts
    return begun.at[0] - wall, begun.at[1] - cpu


class Begun(Callback):
    """Reads the clocks when the first rollout of a run begins, and says which one that was."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.at: Clocks = (time.perf_counter(), time.process_time())
        self.rollout = trainer.fit_loop.total_batch_idx + 1


class Writes(Callback):
    """Writes a checkpoint many times behind the first rollout."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.seconds: list[float] = []
        self.cpu = 0.0  # mean seconds
        self.size = 0  # bytes

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        path = Path(trainer.default_root_dir, "timed.ckpt")
        cpu = time.process_time()
        for _ in range(self.count):
            start = time.perf_counter()
            trainer.save_checkpoint(path, weights_only=False)
            self.seconds.append(time.perf_counter() - start)
        self.cpu = (time.process_time() - cpu) / self.count
        self.size = path.stat().st_size
