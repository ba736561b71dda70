"""What a run left in its folder, and the comparison of two runs bit for bit."""

from pathlib import Path

import torch

from gspo_lightning.checkpoint.files import list_checkpoints


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def assert_same(left, right, where="checkpoint"):
    """Bit-identical trees of plain values and tensors."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for i, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where


def state(folder, number):
    """Everything in a checkpoint but the counters of validation batches and names of log files."""
    file = Path(folder, "checkpoints", f"rollout={number:06d}.ckpt")
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint.pop("event_files")
    loops = checkpoint["loops"]["fit_loop"]
    checkpoint["loops"] = {k: v for k, v in loops.items() if "val_loop" not in k}
    return checkpoint


def scalars(folder):
    """{tag: [(step, value), ...]} as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        # sorted: files opened within one second, as only tests do, are read in any order
        tag: sorted((point.step, point.value) for point in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }


def curves(folder):
    return {
        tag: v for tag, v in scalars(folder).items() if not tag.startswith(("time/", "memory/"))
    }
