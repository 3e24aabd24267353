import random

import numpy as np
import torch

from dist_fusion.checkpoint.randomness import derived_seed, random_state, restore_random_state, seed_everything


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()]


def test_all_generators_go_on_where_they_were(tmp_path):
    seed_everything(5)
    draws()  # an odd number of normal ones: numpy and python keep the second of a pair
    torch.save(random_state(), tmp_path / "rank-0.pt")
    expected = [draws(), draws()]
    seed_everything(6)
    restore_random_state(torch.load(tmp_path / "rank-0.pt", weights_only=True))
    assert [draws(), draws()] == expected


def test_ranks_that_were_not_there_draw_numbers_of_their_own():
    seeds = {derived_seed(seed, rank, step) for seed in range(3) for rank in range(8) for step in (0, 10, 20)}
    assert len(seeds) == 72
    assert derived_seed(1, 2, 3) == derived_seed(1, 2, 3)
    seed_everything(max(seeds))  # any of them will do
