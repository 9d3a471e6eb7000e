"""Two models read the same tokens, or the error names both."""

import json

import pytest

from wmtp_worker.data.tokenizer import PACKAGED, load_tokenizer
from wmtp_worker.errors import InputError
from wmtp_worker.model.compat import Named, check_same_tokens, check_vocabulary


@pytest.fixture
def changed(tmp_path):
    """`changed(edit)`: the packaged tokenizer with its tokenizer.json edited."""

    def make(edit, **config):
        for path in PACKAGED.iterdir():
            if path.is_file():
                (tmp_path / path.name).write_bytes(path.read_bytes())
        document = json.loads((tmp_path / "tokenizer.json").read_text())
        edit(document)
        (tmp_path / "tokenizer.json").write_text(json.dumps(document))
        if config:
            written = json.loads((tmp_path / "tokenizer_config.json").read_text())
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(written | config))
        return Named("the reference model (models/other)", load_tokenizer(tmp_path))

    return make


POLICY = Named("the policy (models/mine)", load_tokenizer(PACKAGED))


def swap(document):
    vocabulary = document["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def shorten(document):
    document["model"]["merges"] = document["model"]["merges"][:100]


def test_same_tokens_are_welcome(changed):
    check_same_tokens(POLICY, changed(lambda document: None))


def test_further_tokens_of_the_other_are_welcome_but_not_of_the_policy(changed):
    more = changed(lambda document: None)
    more.tokenizer.add_tokens(["[PAD]"])
    check_same_tokens(POLICY, more)
    with pytest.raises(InputError, match=r"'\[PAD\]' is token \d+ of \d+ and none of"):
        check_same_tokens(more, POLICY)


@pytest.mark.parametrize(
    ("edit", "config", "words"),
    [
        (swap, {}, "is token 300 of 2048 and 301 of 2048"),
        (shorten, {}, "cut the same text into other tokens"),
        (lambda document: None, {"eos_token": "<s>"}, "eos_token_id is"),
    ],
)
def test_difference_is_named_with_both_models(changed, edit, config, words):
    with pytest.raises(InputError, match=words) as caught:
        check_same_tokens(POLICY, changed(edit, **config))
    assert "the policy (models/mine) and the reference model (models/other)" in caught.value.what
    assert caught.value.fix


def test_embedding_too_small_for_the_tokens():
    check_vocabulary(POLICY, "the value model (models/v)", 2048)
    with pytest.raises(InputError, match=r"the policy .* has 2048 tokens, .*the value model .* 2047"):
        check_vocabulary(POLICY, "the value model (models/v)", 2047)
