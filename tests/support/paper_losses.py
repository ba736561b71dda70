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


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def over_tokens(b, advantages, gain, over=None):
    """Minus the gain of each token, gain(i, t, advantage), summed and divided."""
    total = 0
    for i, n in enumerate(b.lengths):
        for t in range(n):
            total = total - gain(i, t, advantages[i])
    return total / (sum(b.lengths) if over is None else over)


def ratio_of(b, i, t):
    return torch.exp(b.lp[i, t] - b.old[i, t])


def all_normalized(b, rewards=None):
    rewards = b.rewards if rewards is None else rewards
    return [normalized(rewards, i, b.size) for i in range(len(b.lengths))]


def dual_clip(b):
    """Dual clip, eq. 2: max(min(r A, clip(r) A), c A) where A < 0."""

    def gain(i, t, advantage):
        value = clipped_gain(ratio_of(b, i, t), advantage, 0.2, 0.2)
        return torch.clamp(value, min=3.0 * advantage) if advantage < 0 else value

    return over_tokens(b, all_normalized(b), gain)


def sapo(b):
    """SAPO, eq. 5 and 6."""
    total = 0
    for i, n in enumerate(b.lengths):
        advantage = normalized(b.rewards, i, b.size)
        tau = 1.0 if advantage > 0 else 1.05
        gates = [4 / tau * sigmoid(tau * (ratio_of(b, i, t) - 1)) for t in range(n)]
        total = total - mean(gates) * advantage
    return total / len(b.lengths)


def gmpo(b):
    """GMPO, eq. 4: sgn(A) min(sgn(A) log r, sgn(A) clip(log r)), averaged before exp."""
    total = 0
    for i, n in enumerate(b.lengths):
        advantage = normalized(b.rewards, i, b.size)
        sign = 1 if advantage > 0 else -1
        logs = []
        for t in range(n):
            log = b.lp[i, t] - b.old[i, t]
            logs.append(sign * torch.minimum(sign * log, sign * torch.clamp(log, -0.4, 0.4)))
        total = total - torch.exp(mean(logs)) * advantage
    return total / len(b.lengths)


def luspo(b):
    """LUSPO: GSPO's loss of a completion times its length."""
    total = 0
    for i, n in enumerate(b.lengths):
        ratio = torch.exp(sum(b.lp[i, t] - b.old[i, t] for t in range(n)) / n)
        total = total - n * clipped_gain(ratio, normalized(b.rewards, i, b.size), 3e-4, 4e-4)
    return total / len(b.lengths)


def vespo(b):
    """VESPO as TRL has it: phi(w) = e^lambda w^k e^(-lambda w), detached."""
    weights = []
    for i, n in enumerate(b.lengths):
        w = torch.exp(sum(b.lp[i, t] - b.old[i, t] for t in range(n))).detach()
        k, scale = (2.0, 3.0) if normalized(b.rewards, i, b.size) >= 0 else (3.0, 2.0)
        weights.append(torch.e**scale * w**k * torch.exp(-scale * w))
    return over_tokens(b, all_normalized(b), lambda i, t, a: weights[i] * a * b.lp[i, t])


def places(b):
    return [(i, t) for i, n in enumerate(b.lengths) for t in range(n)]


def high_entropy(b):
    """The 80/20 rule, eq. 6: DAPO's loss of the fifth of the tokens with the highest entropy."""
    advantages = all_normalized(b, with_length_penalty(b))
    order = sorted(places(b), key=lambda place: -b.entropy[place].item())
    wanted = set(order[: (len(order) - 1) // 5 + 1])

    def gain(i, t, advantage):
        return clipped_gain(ratio_of(b, i, t), advantage, 0.2, 0.28) if (i, t) in wanted else 0

    return over_tokens(b, advantages, gain)


def deepseek(b):
    """DeepSeek-V3.2, eq. 7 to 9."""
    total = 0
    for i, n in enumerate(b.lengths):
        advantage = centred(b.rewards, i, b.size)
        fallen = mean([(b.old[i, t] - b.lp[i, t]).item() for t in range(n)])
        kept = advantage >= 0 or fallen <= 0.5
        for t in range(n):
            ratio = ratio_of(b, i, t)
            gain = clipped_gain(ratio, advantage, 0.2, 0.2) if kept else 0
            total = total - (gain - 0.04 * ratio * k3(b.lp[i, t], b.ref[i, t])) / n
    return total / len(b.lengths)


def covariances(b):
    advantages = all_normalized(b)
    lp = {(i, t): b.lp[i, t].item() for i, t in places(b)}
    middle = mean(list(lp.values())), mean([advantages[i] for i, _ in lp])
    return {(i, t): (x - middle[0]) * (advantages[i] - middle[1]) for (i, t), x in lp.items()}


def clip_cov(b):
    """Clip-Cov, eq. 10 and 11; which tokens are drawn is the caller's to say."""

    def gain(i, t, advantage):
        if (i, t) in b.drawn:
            return 0
        return clipped_gain(ratio_of(b, i, t), advantage, 0.2, 0.2)

    assert all(1 < covariances(b)[place] < 5 for place in b.drawn)
    return over_tokens(b, all_normalized(b), gain)


def kl_cov(b):
    """KL-Cov, eq. 12 and 13, its KL as verl has it: the change of the log-prob."""
    found = covariances(b)
    few = max(1, int(2e-3 * len(found)))
    wanted = set(sorted(found, key=lambda place: -found[place])[:few])

    def gain(i, t, advantage):
        penalty = torch.abs(b.lp[i, t] - b.old[i, t]) if (i, t) in wanted else 0
        return ratio_of(b, i, t) * advantage - 1.0 * penalty

    return over_tokens(b, all_normalized(b), gain)


def penalised(b, beta):
    """Rewards less the KL penalty of the whole completion."""
    kl = [
        sum((b.old[i, t] - b.ref[i, t]).item() for t in range(n)) for i, n in enumerate(b.lengths)
    ]
    return [reward - beta * k for reward, k in zip(b.rewards, kl, strict=True)]


def rloo(b):
    """RLOO, eq. 7, with the ratio of the whole completion."""
    rewards, total = penalised(b, 0.05), 0
    for i, n in enumerate(b.lengths):
        others = [rewards[j] for j in group_of(i, b.size) if j != i]
        ratio = torch.exp(sum(b.lp[i, t] - b.old[i, t] for t in range(n)))
        total = total - clipped_gain(ratio, rewards[i] - mean(others), 0.2, 0.2)
    return total / len(b.lengths)


def scaled(values):
    """Values by (i, t), shifted and scaled to mean 0 and deviation 1."""
    every = list(values.values())
    middle = mean(every)
    deviation = (sum((x - middle) ** 2 for x in every) / (len(every) - 1)) ** 0.5
    return {place: (x - middle) / (deviation + EPS) for place, x in values.items()}


def reinforce_plus_plus(b):
    """REINFORCE++: reward less the KL of the tokens to come, over the deviation of all tokens."""
    values = {}
    for i, t in places(b):
        to_come = range(t, b.lengths[i])
        kl = sum((b.old[i, s] - b.ref[i, s]).item() for s in to_come)
        values[i, t] = b.rewards[i] - 0.01 * kl
    advantages = scaled(values)
    gain = lambda i, t, _: clipped_gain(ratio_of(b, i, t), advantages[i, t], 0.2, 0.2)  # noqa: E731
    return over_tokens(b, b.rewards, gain)


def reinforce_plus_plus_baseline(b):
    """REINFORCE++ with baseline; k2 = (log p - log ref)^2 / 2 in the loss."""
    advantages = scaled({(i, t): centred(b.rewards, i, b.size) for i, t in places(b)})

    def gain(i, t, _):
        k2 = (b.lp[i, t] - b.ref[i, t]) ** 2 / 2
        return clipped_gain(ratio_of(b, i, t), advantages[i, t], 0.2, 0.2) - 0.01 * k2

    return over_tokens(b, b.rewards, gain)


def opo(b):
    """OPO, eq. 6: the baseline is the mean reward weighted by length."""
    advantages = []
    for i in range(len(b.lengths)):
        group = list(group_of(i, b.size))
        weighted = sum(b.lengths[j] * b.rewards[j] for j in group)
        advantages.append(b.rewards[i] - weighted / sum(b.lengths[j] for j in group))
    gain = lambda i, t, a: clipped_gain(ratio_of(b, i, t), a, 0.2, 0.2)  # noqa: E731
    return over_tokens(b, advantages, gain)


def gpg(b):
    """GPG, eq. 6: log-probs, no ratio; more where groups are flat."""
    rows = range(len(b.lengths))
    flat = [len({b.rewards[j] for j in group_of(i, b.size)}) == 1 for i in rows]
    alpha = len(flat) / (len(flat) - sum(flat))
    advantages = [alpha * centred(b.rewards, i, b.size) for i in rows]
    return over_tokens(b, advantages, lambda i, t, a: a * b.lp[i, t])


def pass_at_k(b):
    """The lead of the best over the second, to the best alone, over the group's deviation."""
    total = 0
    for i, n in enumerate(b.lengths):
        group = [b.rewards[j] for j in group_of(i, b.size)]
        first, second = sorted(group, reverse=True)[:2]
        middle = mean(group)
        deviation = (sum((r - middle) ** 2 for r in group) / (len(group) - 1)) ** 0.5
        advantage = (first - second) / (deviation + EPS) if b.rewards[i] == first else 0.0
        gains = [clipped_gain(ratio_of(b, i, t), advantage, 0.2, 0.2) for t in range(n)]
        total = total - mean(gains)
    return total / len(b.lengths)
