"""What only a GPU can tell: its tests, whole runs, speed and memory, in parts of a few minutes.

    python benchmarks/gpu_check.py tests runs speed memory cards      or some of them
    python benchmarks/gpu_check.py --dry                              on a CPU, with a tiny model
    python benchmarks/gpu_check.py table                              what was measured so far

Each figure is a line of JSON in --out as soon as it is known, so that a part that ends early has
not run in vain; the table of all figures, those not measured among them, is Markdown. A figure that
could not be made is said with its reason, and the exit code is 1.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the files beside this one, installed or not

from gspo_lightning.bench import cases  # noqa: E402
from support.run_folder import assert_same, scalars, state  # noqa: E402

SECONDS = 480  # of a part, at most
MICRO_BATCHES = (1, 2, 4, 8)
Found = Iterator[tuple[str, Any]]


@dataclass
class Check:
    """What all parts share.

    Attributes:
        dry: Whether it is tried on a CPU with a tiny model.
        out: Folder of runs, assets and figures.
        hardware: The overlay of the machine, as options.
    """

    dry: bool
    out: Path
    hardware: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.hardware = ["--config", "hardware/cpu" if self.dry else "hardware/one_gpu"]

    @property
    def case(self) -> cases.Case:
        """The work that speed and memory are measured on."""
        return cases.Case.parse("S/32/8/8" if self.dry else "0.6B/256/128/8")

    @property
    def options(self) -> dict[str, Any]:
        """How every process is started."""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        return {"cwd": ROOT, "env": environment, "stderr": subprocess.STDOUT, "text": True}

    def folder(self, name: str) -> Path:
        """Of a new run."""
        return self.out / "runs" / f"{name}-{time.time_ns()}"

    def command(self, *words: str, ok: tuple[int, ...] = (0,)) -> str:
        """What Python prints with these arguments; RuntimeError with its last lines if it fails."""
        done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, **self.options)
        if done.returncode not in ok:
            last = " / ".join(done.stdout.strip().splitlines()[-3:])
            raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {last}")
        return done.stdout

    def words(self, folder: Path, rollouts: int, config: str, *more: str) -> list[str]:
        """The arguments of a training that validates nothing."""
        words = ["-m", "gspo_lightning", "fit", "--config", config, *self.hardware, *more]
        words += ["--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0"]
        words += ["--data.num_rollouts", str(rollouts)]
        return [*words, "--trainer.default_root_dir", str(folder)]

    def fit(self, name: str, *more: str, config: str = "arithmetic") -> Path:
        """Train a few rollouts and return the run's folder."""
        folder = self.folder(name)
        self.command(*self.words(folder, 2 if self.dry else 5, config, *more))
        return folder

    def assets(self) -> tuple[Path, Path]:
        """Model and prompts of the case."""
        dtype = "float32" if self.dry else "bfloat16"
        options = argparse.Namespace(assets=self.out / "assets", dtype=dtype)
        return cases.assets(self.case, options)


def seconds_per_rollout(folder: Path) -> float:
    """Of all phases; the first rollout, in which kernels are set up, left out."""
    found = scalars(folder)
    phases = [found[f"time/{name}"][1:] for name in ("rollout", "score", "optimise")]
    return sum(value for phase in phases for _, value in phase) / len(phases[0])


def tests(check: Check) -> Found:
    """The tests marked gpu; in a dry run they are skipped, and that is counted."""
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-m", "gpu", "tests")
    said = check.command(*words, ok=(0, 1)).splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", said)}
    yield "tests passed", counts.get("passed", 0)
    yield "tests failed", counts.get("failed", 0) + counts.get("error", 0)


def runs(check: Check) -> Found:
    """The demos in each precision and with frozen models in each place; kill and resume."""
    policy = "--model.init_args.policy"
    variants: dict[str, tuple[str, ...]] = {
        "float32": (),
        "bfloat16": (f"{policy}.dtype", "bfloat16"),
        "bf16-mixed": ("--trainer.precision", "bf16-mixed"),
        "recorded steps": () if check.dry else ("--model.init_args.sampler.cuda_graphs", "true"),
    }
    for name, words in variants.items():
        yield f"demo, {name}", seconds_per_rollout(check.fit("demo", *words))
    for name, device in {"beside the policy": "policy", "on the CPU": "cpu"}.items():
        words = ("--model.frozen_device", device)
        folder = check.fit("frozen", *words, config="preference")
        yield f"preference demo, frozen models {name}", seconds_per_rollout(folder)
    yield "resume bit-identical", _resumes(check)


def _resumes(check: Check) -> bool:
    """Whether a run that was killed ends with the checkpoint of one that was not."""
    rollouts = 12  # two more than the demo's first checkpoint is of
    whole, folder = check.folder("whole"), check.folder("killed")
    check.command(*check.words(whole, rollouts, "arithmetic"))
    words = [*check.words(folder, rollouts, "arithmetic"), "--ckpt_path", "auto"]
    with subprocess.Popen(
        [sys.executable, *words], **check.options, stdout=subprocess.DEVNULL
    ) as run:
        while run.poll() is None and not list(folder.glob("checkpoints/*.ckpt")):
            time.sleep(0.02)
        run.kill()
    if (folder / "checkpoints" / f"rollout={rollouts:06d}.ckpt").exists():
        raise RuntimeError("the run had ended before it could be killed")
    check.command(*words)
    for part in ("state_dict", "optimizer_states"):
        assert_same(state(folder, rollouts)[part], state(whole, rollouts)[part])
    return True


def speed(check: Check) -> Found:
    """A step of this project, eager and recorded, of `generate` and of TRL; micro-batch sizes."""
    device, dtype = ("cpu", "float32") if check.dry else ("cuda", "bfloat16")
    few = ["--steps", "1", "--warmup", "0"] if check.dry else ["--steps", "3", "--warmup", "1"]
    prompts = "4" if check.dry else "16"
    same = ["--device", device, "--dtype", dtype, *few, "--prompts-per-rollout", prompts]

    def bench(engine: str, parts: int) -> dict[str, Any]:
        file = check.out / f"bench-{time.time_ns()}.jsonl"
        words = ["--cases", str(check.case), "--repeats", "1", "--engines", engine]
        words += [*same, "--micro-batches", str(parts), "--out", str(file)]
        words += ["--assets", str(check.out / "assets")]
        check.command("-m", "gspo_lightning", "bench", "compare", *words)
        return json.loads(file.read_text().splitlines()[-1])

    engines = {"one by one": "gspo_lightning", "generate": "generate", "TRL": "trl"}
    if not check.dry:
        engines |= {"recorded": "graphs"}
    for name, engine in engines.items():
        run = bench(engine, 1)
        wall = run["wall_seconds"]
        yield f"step, {name}", wall["total"]
        yield f"sampling, {name}", wall["rollout"]
    for parts in MICRO_BATCHES[:2] if check.dry else MICRO_BATCHES:
        share = bench("gspo_lightning", parts)["mfu"]["optimise"]
        yield f"update's share of the peak, {parts} micro-batches", share


def memory(check: Check) -> Found:
    """Peak memory of a run against what its plan said."""
    model, prompts = check.assets()
    folder = check.folder("memory")
    words = ["--config", "base", *check.hardware, "--policy", str(model), "--data", str(prompts)]
    words += ["--reward", "gspo_lightning.bench.cases.letters_a_to_m"]
    words += ["--data.num_rollouts", "2", "--trainer.default_root_dir", str(folder)]
    words += ["--data.prompts_per_rollout", "4" if check.dry else "16"]
    words += ["--model.init_args.sampler.max_new_tokens", str(check.case.limit)]
    words += ["--model.init_args.policy.dtype", "float32" if check.dry else "bfloat16"]
    said = check.command("-m", "gspo_lightning", "fit", *words)
    planned = re.search(r"^memory +about ([\d.]+) ([MG])iB", said, re.M)
    if planned is None:
        raise RuntimeError(f"the plan says no memory: {said[:300]}")
    yield "planned GiB", float(planned[1]) / (1024 if planned[2] == "M" else 1)
    peaks = {tag: points for tag, points in scalars(folder).items() if "memory/" in tag}
    phases = [f"memory/{name}_gib" for name in ("rollout", "score", "optimise")]
    yield "peak GiB", max(value for name in phases for _, value in peaks[name])


def cards(check: Check) -> Found:
    """Two GPUs: frozen models on the second, ranks of DDP and of FSDP2; FSDP2 on one of them."""
    if check.dry:
        ranks = ("--trainer.strategy", "fsdp2", "--trainer.devices")
        yield "demo, fsdp2 on one card", seconds_per_rollout(check.fit("one", *ranks, "1"))
        yield "demo, fsdp2 on two cards", seconds_per_rollout(check.fit("two", *ranks, "2"))
        return
    yield "demo, single device", seconds_per_rollout(check.fit("single"))
    fsdp2 = ("--trainer.strategy", "fsdp2")
    yield "demo, fsdp2 on one card", seconds_per_rollout(check.fit("one", *fsdp2))
    offload = check.out / "offload.yaml"
    strategy = {"class_path": "gspo_lightning.FSDP2", "init_args": {"cpu_offload": True}}
    offload.write_text(json.dumps({"trainer": {"strategy": strategy}}))  # JSON is YAML, too
    folder = check.fit("offload", "--config", str(offload))
    yield "demo, fsdp2 with cpu_offload", seconds_per_rollout(folder)
    if torch.cuda.device_count() < 2:
        return
    words = ("--config", "hardware/two_gpu")
    folder = check.fit("apart", *words, config="preference")
    yield "preference demo, frozen models on a second card", seconds_per_rollout(folder)
    two = ("--trainer.devices", "2", "--trainer.strategy")
    yield "demo, ddp on two cards", seconds_per_rollout(check.fit("ddp", *two, "ddp"))
    yield "demo, fsdp2 on two cards", seconds_per_rollout(check.fit("fsdp2", *two, "fsdp2"))


PARTS: dict[str, Callable[[Check], Found]] = {
    "tests": tests,
    "runs": runs,
    "speed": speed,
    "memory": memory,
    "cards": cards,
}
DECIDES = {  # by part and figure: what is done about it
    "tests passed": "whether a GPU is supported at all",
    "tests failed": "what is mended first",
    "demo, float32": "the number that the others of the demo are compared with",
    "demo, bfloat16": "whether the half precision of small models is worth its noise",
    "demo, bf16-mixed": "which of the two precisions the overlay one_gpu proposes",
    "demo, recorded steps": "whether sampler.cuda_graphs becomes the default on GPUs",
    "preference demo, frozen models beside the policy": "what one_gpu sets frozen_device to",
    "preference demo, frozen models on the CPU": "whether small reward models belong there",
    "resume bit-identical": "whether the promise of exact resume holds on a GPU",
    "step, one by one": "what recordings and other engines are compared with",
    "step, recorded": "whether sampler.cuda_graphs becomes the default on GPUs",
    "step, generate": "whether an own decoder is worth its code on a GPU",
    "step, TRL": "what the README may claim",
    "sampling, one by one": "the part of the step that engines differ in",
    "sampling, recorded": "the part of the step that engines differ in",
    "sampling, generate": "the part of the step that engines differ in",
    "sampling, TRL": "the part of the step that engines differ in",
    **{
        f"update's share of the peak, {parts} micro-batches": "the default of micro_batch_size"
        for parts in MICRO_BATCHES
    },
    "planned GiB": "whether the plan can be trusted to refuse a run",
    "peak GiB": "whether the plan can be trusted to refuse a run",
    "demo, single device": "what FSDP2 on one card is compared with",
    "demo, fsdp2 on one card": "what FSDP2 costs where it is not needed",
    "demo, fsdp2 with cpu_offload": "whether the pages may call it more than tried on a CPU",
    "preference demo, frozen models on a second card": "what two_gpu is worth",
    "demo, ddp on two cards": "the number of ranks that the README proposes for small policies",
    "demo, fsdp2 on two cards": "from which size on FSDP2 pays",
}


def table(file: Path) -> str:
    """All figures as Markdown; of one that was measured again the newest."""
    lines = file.read_text().splitlines() if file.is_file() else []
    found = {line["figure"]: line for line in map(json.loads, lines)}
    rows = ["| figure | value | decides |", "|---|---:|---|"]
    for name, decides in DECIDES.items():
        value = found.get(name, {"value": "not measured"})["value"]
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        rows.append(f"| {name} | {text} | {decides} |")
    return "\n".join(rows)


def measure(part: str, check: Check, file: Path) -> bool:
    """Write down the figures of a part; whether all of them could be made."""
    begun = time.perf_counter()
    device = "cpu" if check.dry else torch.cuda.get_device_name()
    same = {"part": part, "device": device, "torch": torch.__version__}
    try:
        for name, value in PARTS[part](check):
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(same | {"figure": name, "value": value}) + "\n")
            print(f"{part}: {name}: {value}", flush=True)
    except (RuntimeError, AssertionError, cases.BenchError, KeyError) as error:
        print(f"{part}: failed: {error}", flush=True)
        return False
    seconds = time.perf_counter() - begun
    print(f"{part}: done in {seconds:.0f} s, of at most {SECONDS}", flush=True)
    return seconds < SECONDS


def main(argv: list[str] | None = None) -> int:
    """Measure what was asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "table", []], default=[])
    parser.add_argument("--dry", action="store_true", help="on a CPU, with a tiny model")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check")
    options = parser.parse_args(argv)
    if not (options.dry or options.parts == ["table"] or torch.cuda.is_available()):
        parser.error("there is no GPU here; --dry tries the parts on a CPU with a tiny model")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / ("dry.jsonl" if options.dry else "figures.jsonl")
    check = Check(options.dry, options.out.resolve())
    parts = [part for part in options.parts or PARTS if part != "table"]
    done = [measure(part, check, file) for part in parts]
    print(table(file))
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
