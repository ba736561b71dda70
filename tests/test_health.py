import warnings

import pytest

from gspo_lightning.health import PATIENCE, Health
from gspo_lightning.objectives import Objective


def figures(clipped=0.1, noise=0.0):
    return {"train/clip_fraction_sequences": clipped, "policy/ratio_noise": noise}


def test_a_clip_that_never_fires_is_reported_once():
    # fact 19
    health = Health(Objective(), steps=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(PATIENCE - 1):
            health.check(figures(clipped=0.0))
        assert not caught
        for _ in range(PATIENCE):
            health.check(figures(clipped=0.0))
    assert [str(w.message)[:23] for w in caught] == ["nothing was clipped for"]


def test_one_step_per_rollout_cannot_clip_and_is_not_reported():
    health = Health(Objective(), steps=1)
    for _ in range(2 * PATIENCE):
        health.check(figures(clipped=0.0))  # warnings are errors


def test_a_clipped_rollout_starts_the_count_again():
    health = Health(Objective(), steps=4)
    for _ in range(3):
        for _ in range(PATIENCE - 1):
            health.check(figures(clipped=0.0))
        health.check(figures(clipped=0.01))


def test_noise_above_a_third_of_the_clip_range_is_reported():
    # fact 18
    health = Health(Objective(), steps=4)
    health.check(figures(noise=0.9e-4))
    with pytest.warns(UserWarning, match="noise of 1.1e-04"):
        health.check(figures(noise=1.1e-4))


def test_a_token_clip_range_on_a_sequence_ratio_is_reported():
    with pytest.warns(UserWarning, match="0.2 never clips a length-normalised ratio"):
        Health(Objective(clip_low=0.2, clip_high=0.2), 4).check_settings()
    Health(Objective(ratio="token", clip_low=0.2, clip_high=0.2), 4).check_settings()
    Health(Objective(ratio="sequence_sum", clip_low=0.2, clip_high=0.2), 4).check_settings()
