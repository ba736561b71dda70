"""A sampler whose engine is a process of its own: a fork, with the weights of that moment."""

import multiprocessing
import pickle
import time

from gspo_lightning.sampling import GroupSampler


class ForkedSampler(GroupSampler):
    """GroupSampler in a child process.

    Args:
        seconds: That the child waits before it draws.
        broken: Whether the child ends without completions.
    """

    apart = True

    def __init__(self, seconds=0.0, broken=False, **options):
        super().__init__(**({"group_size": 4, "max_new_tokens": 6} | options))
        self.seconds = seconds
        self.broken = broken
        self.intervals = []  # of each child: when it began, when its completions were there

    def begin(self, policy, batch, *, seed):
        fork = multiprocessing.get_context("fork")
        receiver, sender = fork.Pipe(duplex=False)
        child = fork.Process(target=self._draw, args=(sender, policy, batch, seed), daemon=True)
        child.start()
        sender.close()
        begun = time.perf_counter()

        def wait():
            samples = pickle.loads(receiver.recv_bytes())
            self.intervals.append((begun, time.perf_counter()))
            return samples

        return wait

    def _draw(self, sender, policy, batch, seed):
        time.sleep(self.seconds)
        if not self.broken:
            sender.send_bytes(pickle.dumps(self.sample(policy, batch, seed=seed)))
