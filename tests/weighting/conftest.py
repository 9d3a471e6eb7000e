import random

import pytest
import torch

from tests.weighting.reference import random_segments


@pytest.fixture(params=range(4))
def batch(request):
    """(segment_ids, labelled) of a few packed rows: sequences of 1 to 6 tokens, padding, prompts without labels."""
    rng = random.Random(request.param)
    segments = torch.tensor([random_segments(rng, 13) for _ in range(3)])
    generator = torch.Generator().manual_seed(request.param)
    labels = torch.where(torch.rand(3, 13, generator=generator) < 0.7, 5, -100)
    labels[segments == 0] = -100
    heads = 3
    labelled = torch.zeros(3, 13, heads, dtype=torch.bool)
    for row in range(3):
        for t in range(13):
            for k in range(1, heads + 1):
                if t + k < 13 and segments[row, t] == segments[row, t + k] and labels[row, t + k] != -100:
                    labelled[row, t, k - 1] = True
    return segments, labelled
