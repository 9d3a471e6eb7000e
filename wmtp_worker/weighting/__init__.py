"""Token weights, one file a family: pure functions of tensors.

Every family returns `w[b, t, k]` (float32, shape [batch, time, heads], no gradient): the weight of head k+1's loss at
position t, whose label is the token at position t + k + 1. Positions without a label weigh 0.
"""
