"""What a comparison consists of: a plan, its runs, and what each run adds to its algorithm.

Decides which settings compared runs share.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from gspo_lightning.start.shipped import config_list, find_config

RECORD = "record.json"  # written into a run's folder at its end, so that it marks a complete run


@dataclass(frozen=True)
class Section:
    """One table of a comparison.

    Args:
        title: Heading in the report.
        algorithms: Names of overlays in ``configs/algorithm``; ``grpo + kl/off`` has a further
            overlay on top.
        updates: Optimizer steps per rollout, in one epoch; one arm for each.
        seeds: What ``seed_everything`` takes; the same for every arm, so that arms are paired.
        configs: Config files on top of the plan's.
        baseline: Algorithm that the others are compared with, at the same number of updates.
        experts: Whether to look at the experts of a mixture (``ExpertShift``).
        text: What the reader must know, put under the heading.
    """

    title: str
    algorithms: list[str]
    updates: list[int]
    seeds: list[int]
    configs: tuple[str, ...] = ()
    baseline: str = "gspo"
    experts: bool = False
    text: str = ""


@dataclass(frozen=True)
class Arm:
    """One run: an algorithm, its number of updates, a seed. Equal arms are run once."""

    algorithm: str
    updates: int
    seed: int
    configs: tuple[str, ...]
    experts: bool

    @property
    def name(self) -> str:
        """Of the run's folder."""
        on_top = "".join(f"{Path(config).stem}-" for config in self.configs)
        algorithm = self.algorithm.replace(" ", "").replace("/", "_")
        return f"{on_top}{algorithm}-{self.updates}-seed{self.seed}"


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Args:
        configs: Config files that every run begins with.
        completions: Completions that each run samples.
        validate_every: Rollouts between two evaluations on held-out prompts.
        sections: Tables of the report, by name.
        text: Introduction of the report.
    """

    configs: list[str]
    completions: int
    validate_every: int
    sections: dict[str, Section]
    text: str = ""

    def files(self, arm: Arm) -> list[str]:
        """The config files of a run but the one that the comparison adds."""
        return [*self.configs, *arm.configs, *map(str, overlays(arm.algorithm))]


def read_plan(path: str) -> Plan:
    """Read a plan from YAML.

    Raises:
        ValueError: For a missing file, an unknown key or a value out of range, naming it.
    """
    path, _ = find_config(path)
    if not Path(path).is_file():
        raise ValueError(f"there is no plan {path}; compare/arithmetic is one of the package")
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("sections"), dict):
        raise ValueError(f"{path}: a plan needs `sections`, by name")
    sections = {
        name: build(Section, f"{path}: sections.{name}", entry)
        for name, entry in content["sections"].items()
    }
    plan = build(Plan, path, content | {"sections": sections})
    for name, section in sections.items():
        if not section.algorithms or not section.updates or not section.seeds:
            raise ValueError(f"{path}: sections.{name} needs algorithms, updates and seeds")
        for file in (file for name in section.algorithms for file in overlays(name)):
            if not file.is_file():
                kind = f"{file.parent.name}/"
                known = [c.removeprefix(kind) for c in config_list() if c.startswith(kind)]
                raise ValueError(f"{path}: sections.{name}: there is no {file}; there are {known}")
    for config in [*plan.configs, *(c for s in sections.values() for c in s.configs)]:
        if not Path(find_config(config)[0]).is_file():
            raise ValueError(f"{path}: there is no config {config} (looked in {Path.cwd()})")
    return plan


def build(kind: Any, where: str, entry: Any) -> Any:
    """Make a dataclass of a dict, naming the key that it does not have or that is missing."""
    names = {field.name for field in fields(kind)}
    if not isinstance(entry, dict) or entry.keys() - names:
        wrong = sorted(entry.keys() - names) if isinstance(entry, dict) else entry
        raise ValueError(f"{where}: unknown {wrong}; known: {', '.join(sorted(names))}")
    try:
        return kind(**entry)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def overlays(algorithm: str) -> list[Path]:
    """The overlays of an algorithm: its own, and what is put on top.

    >>> [f"{file.parent.name}/{file.name}" for file in overlays("grpo + kl/off")]
    ['algorithm/grpo.yaml', 'kl/off.yaml']
    """
    first, *others = (name.strip() for name in algorithm.split("+"))
    return [
        Path(find_config(f"configs/{name}.yaml")[0]) for name in (f"algorithm/{first}", *others)
    ]


def arms(section: Section) -> Iterator[Arm]:
    """The runs of a section."""
    for algorithm, updates, seed in product(section.algorithms, section.updates, section.seeds):
        yield Arm(algorithm, updates, seed, tuple(section.configs), section.experts)


def settings(plan: Plan, arm: Arm) -> dict[str, Any]:
    """What a comparison changes in an algorithm's overlay, as one more overlay.

    The same number of updates, of completions and of held-out evaluations for all, and a reference,
    without weight in the loss where the algorithm has none, so that the KL divergence is measured
    for all.
    """
    known = merged(plan.files(arm))
    model, data = known["model"]["init_args"], known["data"]["init_args"]
    size = data["prompts_per_rollout"] * model["sampler"]["init_args"]["group_size"]
    own: dict[str, Any] = {"num_epochs": 1, "num_minibatches": arm.updates}
    if model.get("reference") is None:
        own["reference"] = {}
    share, kept = {"completions": plan.completions}, {"every_n_rollouts": 20, "keep_last": 1}
    callbacks: list[dict[str, Any]] = [
        {"class_path": "gspo_lightning.compare.experiment.RunRecord", "init_args": share},
        {"class_path": "gspo_lightning.RolloutCheckpoint", "init_args": kept},
    ]
    if arm.experts:  # first, so that the record finds the experts' figures
        callbacks.insert(0, {"class_path": "gspo_lightning.compare.experiment.ExpertShift"})
    return {
        "trainer": {"callbacks": callbacks, "val_check_interval": plan.validate_every},
        "model": {"init_args": own},
        "data": {"init_args": {"num_rollouts": -(-plan.completions // size)}},
    }


def merged(files: list[str]) -> dict[str, Any]:
    """Config files as one tree, later ones win key by key."""

    def merge(below: Any, above: Any) -> Any:
        if not isinstance(below, dict) or not isinstance(above, dict):
            return above
        return below | {key: merge(below.get(key), value) for key, value in above.items()}

    tree: dict[str, Any] = {}
    for file in files:
        text = Path(find_config(file)[0]).read_text(encoding="utf-8")
        tree = merge(tree, yaml.safe_load(text))
    return tree
