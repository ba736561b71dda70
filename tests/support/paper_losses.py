"""The loss of each algorithm as its paper writes it: loops over sequences and tokens.

Nothing of gspo_lightning is used. `lp`, `old`, `ref` are (B, T) log-probs, `rewards` a list of B,
`lengths` a list of B, completions of a prompt stand behind one another. Each returns what is to be
minimised.
"""

import torch

EPS = 1e-6  # what this project adds to a standard deviation; the papers print none


def mean(values):
    return sum(values) / len(values)


def group_of(i, size):
    first = i // size * size
    return range(first, first + size)


def centred(rewards, i, size):
    return rewards[i] - mean([rewards[j] for j in group_of(i, size)])


def normalized(rewards, i, size):
    deviations = [centred(rewards, j, size) for j in group_of(i, size)]
    variance = sum(d * d for d in deviations) / (size - 1)
    return centred(rewards, i, size) / (variance**0.5 + EPS)


def clipped_gain(ratio, advantage, low, high):
    held = torch.clamp(ratio, 1 - low, 1 + high)
    return torch.minimum(ratio * advantage, held * advantage)


def k3(lp, ref):
    return torch.exp(ref - lp) - (ref - lp) - 1


def soft_overlong(length, limit, cache):
    """DAPO, eq. 13."""
    if length <= limit - cache:
        return 0.0
    if length <= limit:
        return ((limit - cache) - length) / cache
    return -1.0


def gspo(b):
    """GSPO, eq. 5 to 7."""
    total = 0
    for i, n in enumerate(b.lengths):
        ratio = torch.exp(sum(b.lp[i, t] - b.old[i, t] for t in range(n)) / n)
        total = total + clipped_gain(ratio, normalized(b.rewards, i, b.size), 3e-4, 4e-4)
    return -total / len(b.lengths)


def gspo_token(b):
    """GSPO, eq. 13 and 14."""
    total = 0
    for i, n in enumerate(b.lengths):
        sequence = torch.exp(sum(b.lp[i, t] - b.old[i, t] for t in range(n)) / n).detach()
        advantage = normalized(b.rewards, i, b.size)
        gains = [
            clipped_gain(
                sequence * torch.exp(b.lp[i, t]) / torch.exp(b.lp[i, t]).detach(),
                *(advantage, 3e-4, 4e-4),
            )
            for t in range(n)
        ]
        total = total + mean(gains)
    return -total / len(b.lengths)


def grpo(b):
    """GRPO, eq. 3 and 4."""
    total = 0
    for i, n in enumerate(b.lengths):
        advantage = normalized(b.rewards, i, b.size)
        for t in range(n):
            ratio = torch.exp(b.lp[i, t] - b.old[i, t])
            gain = clipped_gain(ratio, advantage, 0.2, 0.2) - 0.04 * k3(b.lp[i, t], b.ref[i, t])
            total = total + gain / n
    return -total / len(b.lengths)


def with_length_penalty(b):
    slope = round(b.limit / 5)  # 4,096 of 20,480 tokens
    pairs = zip(b.rewards, b.lengths, strict=True)
    return [reward + soft_overlong(n, b.limit, slope) for reward, n in pairs]


def dapo(b):
    """DAPO, eq. 8."""
    rewards, total = with_length_penalty(b), 0
    for i, n in enumerate(b.lengths):
        advantage = normalized(rewards, i, b.size)
        for t in range(n):
            ratio = torch.exp(b.lp[i, t] - b.old[i, t])
            total = total + clipped_gain(ratio, advantage, 0.2, 0.28)
    return -total / sum(b.lengths)


def dr_grpo(b):
    """Dr. GRPO: no division by the standard deviation, a constant in place of the length."""
    total = 0
    for i, n in enumerate(b.lengths):
        advantage = centred(b.rewards, i, b.size)
        for t in range(n):
            ratio = torch.exp(b.lp[i, t] - b.old[i, t])
            total = total + clipped_gain(ratio, advantage, 0.2, 0.2) / b.limit
    return -total / len(b.lengths)


def cispo(b):
    """CISPO: the capped ratio weights the log-prob and has no gradient itself."""
    rewards, total = with_length_penalty(b), 0
    for i, n in enumerate(b.lengths):
        advantage = normalized(rewards, i, b.size)
        for t in range(n):
            ratio = torch.exp(b.lp[i, t] - b.old[i, t]).detach()
            total = total + min(ratio.item(), 1 + 4.0) * advantage * b.lp[i, t]
    return -total / sum(b.lengths)


def gspo_sum(b):
    """GSPO, eq. 5, with the ratio that eq. 7 takes the root of."""
    total = 0
    for i, n in enumerate(b.lengths):
        ratio = torch.exp(sum(b.lp[i, t] - b.old[i, t] for t in range(n)))
        total = total + clipped_gain(ratio, normalized(b.rewards, i, b.size), 0.2, 0.2)
    return -total / len(b.lengths)


def origin_sequence(b):
    """One ratio per completion, relative advantage, mean over completions; mean KL."""
    total = 0
    for i, n in enumerate(b.lengths):
        ratio = torch.exp(sum(b.lp[i, t] for t in range(n)) - sum(b.old[i, t] for t in range(n)))
        total = total - clipped_gain(ratio, centred(b.rewards, i, b.size), 0.2, 0.2)
        total = total + 0.2 * mean([k3(b.lp[i, t], b.ref[i, t]) for t in range(n)])
    return total / len(b.lengths)


def origin_token(b):
    """A ratio per token, summed over the tokens; here over the limit, KL alike."""
    total = 0
    for i, n in enumerate(b.lengths):
        for t in range(n):
            ratio = torch.exp(b.lp[i, t] - b.old[i, t])
            total = total - clipped_gain(ratio, centred(b.rewards, i, b.size), 0.2, 0.2)
            total = total + 0.2 * k3(b.lp[i, t], b.ref[i, t])
    return total / (len(b.lengths) * b.limit)


def advantages_by_sums(b, gamma=1.0, lam=0.95, beta=0.02):
    """GAE as the sum that defines it: over l, (gamma lambda)^l delta_{t+l}; no recursion."""
    advantages, returns = [], []
    for i, n in enumerate(b.lengths):
        rewards = [-beta * (b.old[i, t] - b.ref[i, t]).item() for t in range(n)]
        rewards[n - 1] += b.rewards[i]
        values = [b.old_values[i, t].item() for t in range(n)] + [0.0]
        deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(n)]
        own = [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]
        advantages.append(own)
        returns.append([a + v for a, v in zip(own, values[:n], strict=True)])
    return advantages, returns


def ppo(b):
    """PPO, eq. 7, 9, 11 and 12, mean over all tokens; the value loss clipped as in baselines."""
    advantages, returns = advantages_by_sums(b)
    every = [a for own in advantages for a in own]
    deviation = (sum((a - mean(every)) ** 2 for a in every) / (len(every) - 1)) ** 0.5
    total = 0
    for i, n in enumerate(b.lengths):
        for t in range(n):
            advantage = (advantages[i][t] - mean(every)) / (deviation + EPS)
            ratio = torch.exp(b.lp[i, t] - b.old[i, t])
            total = total - clipped_gain(ratio, advantage, 0.2, 0.2)
            value, old = b.values[i, t], b.old_values[i, t]
            held = old + torch.clamp(value - old, -0.2, 0.2)
            errors = (value - returns[i][t]) ** 2, (held - returns[i][t]) ** 2
            total = total + 0.5 * 0.5 * torch.maximum(*errors)
    return total / len(every)
