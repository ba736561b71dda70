"""A sampler whose engine is a process of its own: a fork, with the weights of that moment."""

import multiprocessing
import pickle
from types import SimpleNamespace

from gspo_lightning.sampling import GroupSampler


class ForkedSampler(GroupSampler):
    """GroupSampler in a child process.

    Args:
        broken: Whether the child ends without completions.
    """

    apart = True

    def __init__(self, broken=False, **options):
        super().__init__(**({"group_size": 4, "max_new_tokens": 6} | options))
        self.broken = broken

    def begin(self, policy, batch, *, seed):
        fork = multiprocessing.get_context("fork")
        receiver, sender = fork.Pipe(duplex=False)
        child = fork.Process(target=self._draw, args=(sender, policy, batch, seed), daemon=True)
        child.start()
        sender.close()
        return SimpleNamespace(result=lambda: pickle.loads(receiver.recv_bytes()))

    def _draw(self, sender, policy, batch, seed):
        if not self.broken:
            sender.send_bytes(pickle.dumps(self.sample(policy, batch, seed=seed)))
