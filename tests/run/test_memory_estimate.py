"""The memory that the plan announces, against what a process then takes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.repository import PYTHONPATH

pytestmark = pytest.mark.slow

# A process of its own: the peak is that of a process, and this one has run other tests.
RUN = """
import sys
import torch
from pathlib import Path
from lightning.pytorch import Callback
from support.tiny_run import make_module, make_trainer, write_prompts
from gspo_lightning.data.prompts import PromptData
from gspo_lightning.run.plan import plan_lines
from gspo_lightning.sampling import GroupSampler

torch.set_num_threads(1)

class Look(Callback):
    def on_train_start(self, trainer, module):
        print(*plan_lines(trainer, module), sep="\\n")
    def on_train_batch_end(self, trainer, module, outputs, *_):
        peak = max(v for k, v in outputs["metrics"].items() if k.startswith("memory/"))
        print("measured", peak - before)

root, precision, new_tokens = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**30
module = make_module(
    root / "model", sampler=GroupSampler(8, new_tokens), num_minibatches=2, micro_batch_size=16
)
data = PromptData(str(write_prompts(root / "p.jsonl")), prompts_per_rollout=4, num_rollouts=1)
make_trainer(root, callbacks=[Look()], precision=precision).fit(module, data)
"""


LAYERS = {  # what backward keeps of them decides
    "vocab_size": 8192,  # large enough for the libraries' own memory not to matter
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
}
TIED = LAYERS | {  # two gradients of one large matrix decide
    "vocab_size": 65536,
    "hidden_size": 640,
    "num_hidden_layers": 2,
    "intermediate_size": 1024,
    "tie_word_embeddings": True,
}


@pytest.mark.recipes  # tests/sharding/test_needs.py counts bytes; this is a real process
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("shape", "precision", "new_tokens"),
    [
        (LAYERS, "bf16-mixed", 128),
        (TIED, "32-true", 16),
    ],
    ids=["layers in half precision", "a large tied vocabulary"],
)
def test_the_estimate_is_within_a_quarter_of_what_is_measured(
    tmp_path, make_model, tokenizer, shape, precision, new_tokens
):
    model = make_model("qwen3", **shape)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    environment = {"PYTHONPATH": PYTHONPATH, "PL_GLOBAL_SEED": "0"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), precision, str(new_tokens)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    size, unit = re.search(r"about ([\d.]+) (MiB|GiB) for the policy", done.stdout).groups()
    estimate = float(size) / (1024 if unit == "MiB" else 1)
    measured = max(map(float, re.findall(r"measured ([\d.]+)", done.stdout)))
    assert estimate == pytest.approx(measured, rel=0.25), done.stdout
