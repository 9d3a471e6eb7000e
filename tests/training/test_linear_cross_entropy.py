"""Cross-entropy in chunks against whole logits."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.weighting.reference import gradient_of_cross_entropy, norm
from wmtp_worker.data.packing import IGNORE
from wmtp_worker.training.linear_cross_entropy import PLAIN, LinearCrossEntropy, LossForm, _WeightedSum

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, WIDTH, SHAPE = 37, 6, (3, 7)
FORMS = {"plain": PLAIN, "smoothing": LossForm(0.1, 0.0), "z-loss": LossForm(0.0, 0.02), "both": LossForm(0.2, 0.01)}
MASKS = {
    "all labelled": lambda targets: targets,
    "some": lambda targets: targets.masked_fill(torch.arange(21).view(SHAPE) % 3 == 0, IGNORE),
    # the first two chunks of four
    "a chunk ignored": lambda targets: targets.masked_fill(torch.arange(21).view(SHAPE) < 8, IGNORE),
    "one token": lambda targets: targets.masked_fill(torch.arange(21).view(SHAPE) != 11, IGNORE),
    "all ignored": lambda targets: torch.full_like(targets, IGNORE),
}


def draw(dtype=torch.float64, seed=0):
    """Hidden states, unembedding, targets, weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*SHAPE, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    matrix = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCABULARY, SHAPE, generator=generator)
    weights = torch.rand(SHAPE, generator=generator) * 3
    weights[1, 2:5] = 0
    return hidden.requires_grad_(), matrix.requires_grad_(), targets, weights


def whole(hidden, matrix, targets, form=PLAIN):
    """Cross-entropy and objective of each token, from all logits at once; torch's own label smoothing."""
    logits = F.linear(hidden, matrix).flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.flatten()
    plain = F.cross_entropy(logits, targets, reduction="none")
    smooth = F.cross_entropy(logits, targets, reduction="none", label_smoothing=form.label_smoothing)
    squares = logits.logsumexp(-1).square().where(targets != IGNORE, 0)
    return plain.view(SHAPE), (smooth + form.z_loss * squares).view(SHAPE)


def gradients_of(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("look", [False, True], ids=["weights known", "weights from losses"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradients_pass_gradcheck(form, look):
    hidden, matrix, _, weights = draw()
    hidden, matrix, weights = (part.detach() for part in (hidden[0, :, :3], matrix[:5, :3], weights[0]))
    targets = torch.tensor([4, 0, IGNORE, 2, 4, IGNORE, 1])

    def objective(hidden, matrix):
        loss = LinearCrossEntropy(hidden, matrix, targets, form, chunk=4)
        if look:
            loss.tokens()
        return loss.weighted_sum(weights)[0]

    assert torch.autograd.gradcheck(objective, (hidden.requires_grad_(), matrix.requires_grad_()))


@pytest.mark.parametrize("look", [False, True], ids=["weights known", "weights from losses"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("chunk", [1, 4, 21, 512])
def test_values_and_gradients_equal_those_of_whole_logits(chunk, mask, look):
    hidden, matrix, targets, weights = draw()
    targets, form = mask(targets), FORMS["both"]
    plain, objective = whole(hidden, matrix, targets, form)
    expected = (objective * weights).sum()
    loss = LinearCrossEntropy(hidden, matrix, targets, form, chunk)
    if look:
        torch.testing.assert_close(loss.tokens().cross_entropy, plain)
    found, cross_entropy = loss.weighted_sum(weights)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(cross_entropy, plain.sum())
    for one, other in zip(
        gradients_of(found * 0.3, hidden, matrix), gradients_of(expected * 0.3, hidden, matrix), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("look", [False, True], ids=["weights known", "weights from losses"])
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16 autocast"]
)
def test_lower_precision_is_as_close_as_its_matrix_products(dtype, rtol, look):
    hidden, matrix, targets, weights = draw(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        _, objective = whole(hidden, matrix, targets)  # autocast's logits, then fp32
        loss = LinearCrossEntropy(hidden, matrix, targets, chunk=4)
        if look:
            torch.testing.assert_close(loss.tokens().cross_entropy, objective)
        found, _ = loss.weighted_sum(weights)
        expected = (objective * weights).sum()
    torch.testing.assert_close(found, expected)  # the losses to the precision of fp32
    for one, other in zip(gradients_of(found, hidden, matrix), gradients_of(expected, hidden, matrix), strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm()) < rtol * float(other.norm())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_results_equal_those_of_whole_logits(mask, precision):
    hidden, matrix, targets, _ = draw(torch.float32)
    targets[0, 4] = F.linear(hidden, matrix)[0, 4].argmax()
    targets = mask(targets)
    with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
        plain, _ = whole(hidden, matrix, targets)
        likeliest = F.linear(hidden, matrix).argmax(-1)
        with Widest() as widest:
            found = LinearCrossEntropy(hidden, matrix, targets, chunk=4).results()
    torch.testing.assert_close(found.cross_entropy, plain.detach())
    assert torch.equal(found.right, likeliest == targets)
    assert not found.cross_entropy.requires_grad
    assert widest.products == -(-int((targets != IGNORE).sum()) // 4)  # no gradients


def test_results_of_equally_likely_tokens():
    """The first one counts as the likeliest."""
    loss = LinearCrossEntropy(torch.ones(2, 1), torch.zeros(5, 1), torch.tensor([0, 4]))
    assert loss.results().right.tolist() == [True, False]
    assert loss.results().cross_entropy.tolist() == pytest.approx([math.log(5)] * 2)


def test_the_objective_by_hand():
    """Two logits 0 and ln 3: p = (1/4, 3/4), Z = 4; the label is the first."""
    hidden, matrix = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    loss = LinearCrossEntropy(hidden, matrix, torch.tensor([0]), LossForm(0.2, 0.5))
    found, cross_entropy = loss.weighted_sum(torch.tensor([2.0]))
    assert float(cross_entropy) == pytest.approx(math.log(4))
    smooth = 0.8 * math.log(4) + 0.1 * (math.log(4) + math.log(4 / 3))
    assert found.item() == pytest.approx(2 * (smooth + 0.5 * math.log(4) ** 2))
    found.backward()
    grown = 1 + math.log(4)  # 1 + 2 · 0.5 · log Z
    assert matrix.grad[:, 0].tolist() == pytest.approx([2 * (grown / 4 - 0.8 - 0.1), 2 * (grown * 3 / 4 - 0.1)])


def test_norms_are_those_of_the_slow_reference():
    hidden, matrix, targets, _ = draw(torch.float32)
    targets = MASKS["some"](targets)
    tokens = LinearCrossEntropy(hidden, matrix, targets, chunk=4).tokens()
    rows = zip((hidden @ matrix.T).flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True)
    slow = [[0.0] * VOCABULARY if y == IGNORE else gradient_of_cross_entropy(row, y) for row, y in rows]
    assert tokens.logit_gradient_norm.flatten().tolist() == pytest.approx([norm(one) for one in slow], rel=1e-4)
    by_hidden = (torch.tensor(slow) @ matrix).norm(dim=-1)
    torch.testing.assert_close(tokens.hidden_gradient_norm.flatten(), by_hidden.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_is_learned_moves_nothing_and_stays_finite(precision):
    logits = torch.tensor([[100.0, 0.0, 0.0], [0.0, 100.0, 0.0]], requires_grad=True)
    with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
        loss = LinearCrossEntropy(logits, torch.eye(3), torch.tensor([0, 0]))
    tokens = loss.tokens()
    assert tokens.cross_entropy.tolist() == [0, 100]
    assert tokens.logit_gradient_norm.tolist() == pytest.approx([0, math.sqrt(2)])
    assert tokens.hidden_gradient_norm.tolist() == pytest.approx([0, math.sqrt(2)])


def test_gradients_add_up_where_they_are_told_to():
    hidden, matrix, targets, weights = draw()
    loss, total = LinearCrossEntropy(hidden, matrix, targets, chunk=4), torch.ones(VOCABULARY, WIDTH).double()
    expected = gradients_of(loss.weighted_sum(weights)[0], hidden, matrix)
    found, _ = loss.weighted_sum(weights, into=total)
    found.backward()
    assert matrix.grad is None
    torch.testing.assert_close(total, expected[1] + 1)
    torch.testing.assert_close(hidden.grad, expected[0])


def test_a_factor_that_would_come_too_late_is_refused():
    hidden, matrix, targets, weights = draw()
    found, _ = LinearCrossEntropy(hidden, matrix, targets).weighted_sum(weights, into=torch.zeros_like(matrix))
    with pytest.raises(ValueError, match=r"cannot be multiplied by 0\.5"):
        (found / 2).backward()


def test_the_backward_pass_does_not_ask_the_device():
    # on meta nothing can be asked; on a GPU it can, and the whole queue is waited for
    gradient = torch.empty(3, 4, device="meta")
    context = SimpleNamespace(saved_tensors=(gradient, None), once=True, dtype=torch.float32)
    factor = torch.ones((), device="meta")
    assert _WeightedSum.backward(context, factor, factor)[0].shape == gradient.shape


def test_a_frozen_unembedding_gets_no_gradient():
    hidden, matrix, targets, weights = draw()
    expected = gradients_of(LinearCrossEntropy(hidden, matrix, targets, chunk=4).weighted_sum(weights)[0], hidden)
    matrix = matrix.detach()
    with Widest() as widest:
        loss = LinearCrossEntropy(hidden, matrix, targets, chunk=4)
        loss.tokens()
        looked_at = widest.products
        found, _ = loss.weighted_sum(weights)
    assert widest.products == looked_at  # nothing to look at twice
    assert gradients_of(found, hidden)[0].equal(expected[0])


class Widest(TorchDispatchMode):
    """The largest tensor that any operation makes, and how many matrix products there are."""

    def __init__(self):
        super().__init__()
        self.elements, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return out


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("look", [False, True], ids=["weights known", "weights from losses"])
def test_nothing_is_ever_larger_than_a_chunk_of_logits(look, precision):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 50, 4, generator=generator, requires_grad=True)
    matrix = torch.randn(64, 4, generator=generator, requires_grad=True)
    targets = torch.randint(64, (2, 50), generator=generator)
    with Widest() as widest, torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
        loss = LinearCrossEntropy(hidden, matrix, targets, FORMS["both"], chunk=8)
        if look:
            loss.tokens()
        loss.weighted_sum(torch.ones(2, 50))[0].backward()
    assert 400 <= widest.elements <= 8 * 64
    assert widest.products == 13 * (4 if look else 3)  # logits, both gradients; the logits once more


def test_tokens_without_a_label_or_a_weight_cost_nothing():
    hidden, matrix, targets, weights = draw()
    with Widest() as widest:
        loss = LinearCrossEntropy(hidden, matrix, MASKS["one token"](targets), chunk=4)
        loss.tokens()
        loss.weighted_sum(torch.zeros_like(weights))
    assert widest.products == 2  # of the one chunk's logits and hidden gradient


def test_large_weights_are_no_less_exact():
    hidden, matrix, targets, weights = draw()
    small = gradients_of(LinearCrossEntropy(hidden, matrix, targets).weighted_sum(weights)[0], hidden, matrix)
    large = gradients_of(LinearCrossEntropy(hidden, matrix, targets).weighted_sum(weights * 1e6)[0], hidden, matrix)
    for one, other in zip(large, small, strict=True):
        torch.testing.assert_close(one / 1e6, other)


def test_two_runs_are_equal_to_the_bit():
    def once():
        hidden, matrix, targets, weights = draw(torch.float32)
        found, _ = LinearCrossEntropy(hidden, matrix, targets, chunk=4).weighted_sum(weights)
        return found, *gradients_of(found, hidden, matrix)

    assert all(one.equal(other) for one, other in zip(once(), once(), strict=True))
