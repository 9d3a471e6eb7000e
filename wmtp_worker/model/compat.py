"""Whether two models read the same tokens."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wmtp_worker.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what tokenizers with one vocabulary still do differently: spaces, lines, digits, letters beyond ASCII, special tokens
_PROBE = " def f(x):\n\n    return x + 1234567  # naïve, 你好 🙂 <s></s>\r\n\tİ ﬁ e\u0301"


@dataclass(frozen=True)
class Named:
    """A model's tokenizer, and what to call the model in an error: `the policy (work/models/smollm2)`."""

    name: str
    tokenizer: "PreTrainedTokenizerBase"


def check_same_tokens(one: Named, other: Named) -> None:
    """Raise `InputError`, naming both, unless every token of `one` is the same to `other`, which may know further ones.

    Weights that one model computes are laid on another's tokens: with two vocabularies they would mean nothing.
    """
    if difference := _difference(one, other):
        raise InputError(
            f"{one.name} and {other.name} have different tokenizers: {difference}",
            where="the tokenizers of both models",
            fix="use models of one family, whose tokenizers are the same",
        )


def check_vocabulary(owner: Named, model: str, embeddings: int) -> None:
    """Raise `InputError` if the model called `model`, of `embeddings` rows, lacks one for some token of `owner`."""
    if (size := len(owner.tokenizer)) > embeddings:
        raise InputError(
            f"the tokenizer of {owner.name} has {size} tokens, the embedding of {model} {embeddings}",
            where=model,
            fix="use the tokenizer that belongs to the model",
        )


def _difference(one: Named, other: Named) -> str | None:
    first, second = one.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    for token, number in sorted(first.items(), key=lambda item: item[1]):
        if second.get(token) != number:
            return f"{token!r} is token {number} of {len(first)} and {second.get(token, 'none')} of {len(second)}"
    for special in ("bos_token_id", "eos_token_id"):
        ours, theirs = getattr(one.tokenizer, special), getattr(other.tokenizer, special)
        if ours != theirs:
            return f"{special} is {ours} and {theirs}"
    for split in (False, True):
        options = {"add_special_tokens": False, "split_special_tokens": split}
        if one.tokenizer(_PROBE, **options)["input_ids"] != other.tokenizer(_PROBE, **options)["input_ids"]:
            return "their vocabulary is one, but they cut the same text into other tokens"
    return None
