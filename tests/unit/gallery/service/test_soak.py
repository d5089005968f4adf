"""The soak's judge: memory that stays passes, a leak does not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.torture.soak import ALLOWED_MIB, rise_mib


@pytest.mark.parametrize(("a_second", "passes"), [(0.0, True), (0.001, True), (0.05, False), (0.5, False)])
def test_a_leak_is_told_from_noise_and_warm_up(a_second, passes):
    seconds = np.arange(600)
    noise = np.random.default_rng(0).normal(0, 2, 600) + 40 * (np.random.default_rng(1).random(600) < 0.05)
    memory = 80 + 60 * (1 - np.exp(-seconds / 30)) + a_second * seconds + noise
    assert (rise_mib(memory) <= ALLOWED_MIB) is passes


def test_memory_that_is_no_number_does_not_pass():
    assert not rise_mib([float("nan")] * 60) <= ALLOWED_MIB
