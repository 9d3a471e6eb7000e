"""Token weights, one file a family: pure functions of tensors.

Alignment, stated once. Heads are k = 1…n. Head k at position t predicts the token at t + k, so whatever is known of a
token j (its value difference, its excess loss, its reward) weighs head k at position t = j - k:

    w[b, t, k-1]  belongs to  labels[b, t+k],  reference logits[b, t+k-1],  values[b, t+k] - values[b, t+k-1]

`spans.ahead` turns a quantity of tokens, [batch, time], into one of (position, head), [batch, time, heads].

Every family returns float32 [batch, time, heads] without gradient; where there is no label the weight is 0, and what
stands there in the inputs (NaN too) has no influence. Inputs may be bf16 or fp32; all arithmetic is fp32.
`normalise.normalise` follows, the same for each family. Families that look at the policy's own losses (rho1,
gradient) are called head by head, with heads = 1, so that a head is forgotten before the next one runs.
"""
