"""Models that each rank reads its part of: the same bits as whole ones that are sharded, without their memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.model import meta_style
from tests.ranks import apart
from tests.training.test_gradients import micro_batches, take_steps
from tests.training.test_loss import make_model
from wmtp_worker.errors import InputError
from wmtp_worker.model.loading import load
from wmtp_worker.model.lora import add_lora
from wmtp_worker.model.mtp import MTPForCausalLM
from wmtp_worker.model.unread import is_unread, unread
from wmtp_worker.model.value import take_over, value_on
from wmtp_worker.training.gradients import fill, local, spread
from wmtp_worker.training.group import join


class Made(TorchDispatchMode):
    """Bytes of memory that operations take."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in storages((args, kwargs))}
        self.bytes += sum(storage.nbytes() for storage in storages(out) if storage.data_ptr() not in given)
        return out


def storages(tree):
    tensors = (local(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]


def with_lora(model):
    add_lora(model, rank=2, alpha=4.0, seed=7)
    return model


def value_model(policy):
    value = value_on(policy, 8, 3)
    with_lora(value.backbone)
    return value


# by name: folder, heads, and what becomes of the policy before it is sharded
CASES = {
    "tied bf16, heads that are copies": ("plain", 3, lambda policy: policy),
    "rows in another order, heads of its own, adapters": ("meta", 4, with_lora),
    "a value model with adapters": ("ours", 4, value_model),
    "a value model on the trunk": ("plain", 3, lambda policy: value_on(policy, 8, 3, trunk_head=True)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    plain = make_model(1, tied=True, dtype=torch.bfloat16)
    del plain.config.n_future_tokens  # as others' models are
    plain.save_pretrained(folder / "plain")
    make_model(4).save_pretrained(folder / "ours")
    params = meta_style.PARAMS | {"vocab_size": 65}  # of which one shard has more rows than the other
    meta_style.write(folder / "meta", params, meta_style.random_weights(params))
    return folder


def assert_the_same(one, other, case):
    """Names, in the order of the optimizer; what trains, what is tied; numbers."""
    for mine, theirs in (
        (one.named_parameters(), other.named_parameters()),
        (one.named_buffers(), other.named_buffers()),
    ):
        for (name, tensor), (called, like) in zip(mine, theirs, strict=True):
            assert (name, tensor.requires_grad, tensor.dtype) == (called, like.requires_grad, like.dtype), case
            assert local(tensor).equal(local(like)), f"{case}: {name}"
    if isinstance(one, MTPForCausalLM):
        assert (one.lm_head.weight is one.model.embed_tokens.weight) == one.config.tie_word_embeddings, case


def equal_to_whole(rank, world, folder):
    with join("cpu", 60) as group:
        for case, (name, heads, change) in CASES.items():
            with Made() as everything:
                whole = change(load(folder / name, heads))
            size = sum(parameter.nbytes for parameter in whole.parameters())
            assert everything.bytes >= size, case
            with Made() as made:
                part = change(load(folder / name, heads, unread=True))
                for parameter in part.parameters():
                    assert parameter.is_meta == is_unread(parameter), case
                assert unread(part), case
                gradients = spread(part, group, world)
            assert size / world <= made.bytes < 0.75 * size, case
            expected = spread(whole, group, world)
            assert_the_same(part, whole, case)
            if isinstance(part, MTPForCausalLM):
                for model, summed in ((part, gradients), (whole, expected)):
                    take_steps(model, summed, group.share(micro_batches(heads)))
                assert_the_same(part, whole, f"{case}, after steps")


def test_each_rank_reads_its_shards_and_never_has_the_model(models):
    apart(2, equal_to_whole, models)


@pytest.mark.parametrize("case", CASES)
def test_read_without_shards_it_is_the_model(models, case):
    name, heads, change = CASES[case]
    model = change(load(models / name, heads, unread=True))
    before = list(model.parameters())
    fill(model, unread(model), torch.device("cpu"))
    assert_the_same(model, change(load(models / name, heads)), case)
    # whoever had its parameters has them still
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
    assert not unread(model)


def test_a_value_model_is_compared_with_what_is_not_read_yet(models):
    value = value_on(load(models / "plain", 2), 8, 3, trunk_head=True)
    saved = {name: parameter.data for name, parameter in value.named_parameters()}
    policy = with_lora(load(models / "plain", 2, unread=True))
    take_over(policy, value.config.to_dict(), saved, "the value model")
    assert policy.value_head.norm.weight.equal(value.backbone.norm.weight)
    saved["backbone.layers.1.mlp.up_proj.weight"] = saved["backbone.layers.1.mlp.up_proj.weight"] + 1
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight is not the policy's"):
        take_over(policy, value.config.to_dict(), saved, "the value model")
