"""What users get wrong in configs, options and run folders."""

from support.bad_input_cases import (
    MARKED,
    Case,
    callback,
    key,
    loop,
    model,
    reward,
    rule,
    yaml,
    zipped,
)

WITHOUT_POLICY = f"""
model: {{class_path: gspo_lightning.GSPOModule, init_args: {{rewards: {{a: {{fn: {MARKED}}}}}}}}}
data: {{class_path: gspo_lightning.PromptData, init_args: {{path: prompts.jsonl}}}}
""".encode()

CONFIG = [
    key("misspelt at the top", ("`modl.kl_coef`", "`model`"), "--modl.kl_coef 1"),
    key("misspelt option", ("kl_coeff", "`kl_coef`"), "--model.kl_coeff 1"),
    key("group size 1", ("sampler.group_size", ">= 2", "got 1"), "--model.sampler.group_size 1"),
    key("temperature 0", ("temperature", "above 0", "0.0"), "--model.sampler.temperature 0"),
    key("temperature below 0", ("temperature", "-1.0"), "--model.sampler.temperature -1"),
    key("temperature nan", ("temperature", "nan"), "--model.sampler.temperature .nan"),
    key("no new tokens", ("max_new_tokens", ">= 1", "0"), "--model.sampler.max_new_tokens 0"),
    key("text for a number", ("group_size", "int", "many"), "--model.sampler.group_size many"),
    key("clip below 0", ("clip_low", "[0, 1]", "-0.1"), "--model.objective.clip_low -0.1"),
    key("clip nan", ("clip_high", "nan"), "--model.objective.clip_high .nan"),
    key(
        "unknown ratio",
        ("model.objective.ratio", "sequence", "tokens"),
        "--model.objective.ratio tokens",
    ),
    key(
        "uneven mini-batches",
        ("num_minibatches", "divide", "16", "got 3"),
        "--model.num_minibatches 3",
    ),
    key("micro-batch 0", ("micro_batch_size", ">= 1", "0"), "--model.micro_batch_size 0"),
    key("negative KL coefficient", ("kl_coef", "-1"), "--model.kl_coef -1"),
    key("learning rate nan", ("learning_rate", "nan"), "--model.optimizer.learning_rate .nan"),
    key("weight decay nan", ("weight_decay", "nan"), "--model.optimizer.weight_decay .nan"),
    key("beta 1", ("betas", "[0, 1)", "1.0"), "--model.optimizer.betas [0.9,1.0]"),
    key("ks above samples", ("evaluation.ks", "num_samples", "9"), "--model.evaluation.ks [1,9]"),
    key(
        "unknown correct",
        ("evaluation.correct", "corect", "correct"),
        "--model.evaluation.correct corect",
    ),
    yaml(
        "no reward", ("model.rewards", "empty"), model("rewards: {}, evaluation: {correct: null}")
    ),
    key("seed as text", ("seed_everything", "abc"), "--seed_everything abc"),
    key("seed below 0", ("seed_everything", ">= 0", "-5"), "--seed_everything -5"),
    key("seed too large", ("seed_everything", "2**32"), f"--seed_everything {2**32}"),
    key("no batches", ("limit_train_batches is 0", "out"), "--trainer.limit_train_batches 0"),
    key("no batches, as a share", ("limit_train_batches",), "--trainer.limit_train_batches 0.0"),
    key("no steps", ("max_steps is 0", "leave it out"), "--trainer.max_steps 0"),
    key("no epochs", ("max_epochs is 0", "leave it out"), "--trainer.max_epochs 0"),
    key(
        "accelerator not there",
        ("trainer.accelerator", "CUDA", "cpu"),
        "--trainer.accelerator cuda",
    ),
    key(
        "device not there",
        ("model.reference.device", "cuda:7", "cpu"),
        "--model.reference.device cuda:7",
    ),
    key("device word", ("model.reference.device", "gpu", "policy"), "--model.reference.device gpu"),
    key("frozen device not there", ("frozen_device", "cuda:7"), "--model.frozen_device cuda:7"),
    key("schedule without length", ("max_epochs", "-5", "-1"), "--trainer.max_epochs -5"),
    key(
        "too few prompts per rollout",
        ("data.prompts_per_rollout", ">= 1", "0"),
        "--data.prompts_per_rollout 0",
    ),
    key("val_check_interval", ("val_check_interval", "99"), "--trainer.val_check_interval 99"),
    yaml(
        "misspelt deep inside",
        ("groop_size", "`group_size`"),
        model("sampler: {init_args: {groop_size: 2}}"),
    ),
    yaml("a list of rewards", ("model.rewards", "dict"), model("rewards: [{fn: " + MARKED + "}]")),
    yaml("reward without fn", ("model.rewards", "fn"), reward("weight: 1")),
    yaml(
        "reward module not there",
        ("model.rewards.fn", "nowhere", "PYTHONPATH"),
        reward("fn: nowhere.score"),
    ),
    yaml(
        "reward function not there",
        ("MarkedAnser", "MarkedAnswer"),
        reward("fn: {class_path: gspo_lightning.rewards.terms.MarkedAnser}"),
    ),
    yaml("reward is a number", ("model.rewards.fn", "import path", "3"), reward("fn: 3")),
    yaml(
        "reward weight nan", ("weight", "finite", "nan"), reward("fn: " + MARKED + ", weight: .nan")
    ),
    yaml("reward clip order", ("clip", "low < high"), reward("fn: " + MARKED + ", clip: [1, 0]")),
    yaml(
        "reward function of one argument",
        ("model.rewards.a.fn", "(rows, completions)"),
        reward("fn: bad_rewards.one_argument"),
    ),
    yaml(
        "class_path to a function",
        ("model:", "bad_rewards.one_argument", "class_path"),
        "model: {class_path: bad_rewards.one_argument}",
    ),
    yaml(
        "class_path to a module",
        ("model:", "gspo_lightning.module", "class_path"),
        "model: {class_path: gspo_lightning.module}",
    ),
    yaml(
        "a sampler that cannot sample",
        ("model.sampler", "PromptData", "Sampler", "class_path"),
        model("sampler: {class_path: gspo_lightning.PromptData, init_args: {path: p}}"),
    ),
    yaml(
        "class_path to another class",
        ("model:", "PromptData", "class_path"),
        "model: {class_path: gspo_lightning.PromptData}",
    ),
    yaml(
        "class_path is a file",
        ("model:", "./evil.py", "dotted name"),
        "model: {class_path: ./evil.py}",
    ),
    yaml(
        "class_path is code",
        ("model:", "__import__", "dotted name"),
        "model: {class_path: \"__import__('os').mkdir('x')\"}",
    ),
    yaml(
        "callback unknown",
        ("trainer.callbacks", "AdaptivKL", "`AdaptiveKL`"),
        callback("gspo_lightning.AdaptivKL"),
    ),
    yaml(
        "callback is no callback",
        ("trainer.callbacks", "GroupSampler", "Callback"),
        callback("gspo_lightning.GroupSampler"),
    ),
    yaml("KL target 0", ("target", "> 0", "0"), rule("{target: 0}")),
    yaml(
        "KL horizon too short",
        ("horizon", "must exceed", "got 2"),
        rule("{target: 0.1, horizon: 2}"),
    ),
    yaml("KL without reference", ("AdaptiveKL", "model.reference"), model("reference: null")),
    yaml(
        "export outside the run",
        ("path", "../out"),
        callback("gspo_lightning.HFExport", "{path: ../out}"),
    ),
    yaml(
        "checkpoint never",
        ("every_n_rollouts", "0"),
        callback("gspo_lightning.RolloutCheckpoint", "{every_n_rollouts: 0}"),
    ),
    yaml(
        "the same key twice",
        ("config: overlay.yaml:2", "model", "twice"),
        model("num_epochs: 1}}\nmodel: {init_args: {num_epochs: 2"),
    ),
    yaml("a tab", ("config: overlay.yaml:2",), "model:\n\tinit_args: {}"),
    yaml("an open bracket", ("config: overlay.yaml:1",), "model: ["),
    yaml("a list for a config", ("config: overlay.yaml",), "- model"),
    yaml("a word for a config", ("config: overlay.yaml",), "hello"),
    yaml(
        "YAML that makes objects",
        ("config: overlay.yaml:1", "python/object"),
        "model: !!python/object/apply:os.mkdir [exploded]",
    ),
    Case(
        "config not there",
        ("config", "gone.yaml", "lists the package's"),
        options="--config gone.yaml",
    ),
    Case("config is a folder", ("config", "policy", "YAML file"), options="--config policy"),
    Case(
        "config is empty",
        ("config", "empty.yaml", "empty", "configs arithmetic` shows one"),
        options="--config empty.yaml",
        files={"empty.yaml": b""},
    ),
    Case(
        "config is binary",
        ("config", "b.yaml"),
        options="--config b.yaml",
        files={"b.yaml": b"\x00\x01\x02model"},
    ),
    Case(
        "config is not UTF-8",
        ("config", "b.yaml", "UTF-8"),
        options="--config b.yaml",
        files={"b.yaml": b"model: \xff\xfe"},
    ),
    Case(
        "config is a loop",
        ("config", "b.yaml", "configs` lists the package's"),
        options="--config b.yaml",
        files={"b.yaml": loop},
    ),
    Case(
        "required key missing",
        ("model", "policy.path", "config"),
        options="--config b.yaml",
        config="",
        files={"b.yaml": WITHOUT_POLICY},
    ),
]
FOLDERS = [
    key(
        "run folder through a file",
        ("trainer.default_root_dir", "gspo.yaml/run"),
        "--trainer.default_root_dir gspo.yaml/run",
    ),
    key(
        "run folder is a file",
        ("trainer.default_root_dir", "gspo.yaml"),
        "--trainer.default_root_dir gspo.yaml",
    ),
    key(
        "run folder in a read-only file system",
        ("trainer.default_root_dir", "/proc/run"),
        "--trainer.default_root_dir /proc/run",
    ),
    Case(
        "a run folder without permission",
        ("trainer.default_root_dir", "run", "Permission"),
        files={"run": lambda path: path.mkdir(0o500)},
    ),
    Case("run folder is a loop", ("trainer.default_root_dir", "run"), files={"run": loop}),
    Case(
        "run folder of another run",
        ("run", "already holds a run", "--ckpt_path last", "default_root_dir"),
        files={"run/checkpoints/rollout=000001.ckpt": zipped},
    ),
    Case(
        "run folder of a finished run without checkpoints",
        ("run holds a finished run", "default_root_dir", "remove run/finished"),
        files={"run/finished": b"", "run/samples.jsonl": b"{}\n"},
    ),
    Case(
        "foreign config",
        ("run/config.yaml", "not written by a run", "default_root_dir"),
        files={"run/config.yaml": b"mine: 1\n"},
    ),
    Case(
        "leftovers and broken data",
        ("data.path: prompts.jsonl:1",),
        files={
            "prompts.jsonl": b"x\n",
            "run/config.yaml": b"# lightning.pytorch==2.6.6\n",
            "run/events.out.tfevents.1.mine": b"x",
            "run/samples.jsonl": b"{}\n",
            "run/log.txt": b"old\n",
        },
    ),
    Case(
        "predict through a file",
        ("trainer.default_root_dir",),
        "--trainer.default_root_dir gspo.yaml/run",
        command="predict",
    ),
]
