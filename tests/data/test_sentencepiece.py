"""The fast tokenizer made from a SentencePiece model gives the ids that SentencePiece itself gives."""

import os
import random
import sysconfig
from pathlib import Path

import pytest
import sentencepiece

from wmtp_worker.data.sentencepiece import from_sentencepiece
from wmtp_worker.data.tokenizer import digest, load_tokenizer
from wmtp_worker.errors import InputError

AWKWARD = [
    *("", " ", "  ", "\n", "hello", "  hello", " hello world ", "a  b   c", "\t\tx", "\r\n"),
    *("<s> x </s>", "<unk>", "<0x0A>", "x<0x0A>y", "\u2581a", "a\u2581b", "\u200b", "\ufeffabc"),
    *("héllo 你好 🙂 \x00 \x7f", "ﬁ", "e\u0301", "İ", "    " * 40 + "x", "def f(x):\n        return x  # ok\n"),
]


def train(path: Path, files: int = 12, **changes: object) -> Path:
    """A small model trained on the standard library, as Llama's was: BPE, bytes, digits, runs of spaces."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
    lines = [line for file in sources for line in file.read_text(errors="replace").splitlines()]
    options: dict[str, object] = {
        "vocab_size": 700,
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "minloglevel": 2,
    }
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=file, **options | changes)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("spm") / "tokenizer.model")


@pytest.fixture(params=["trained here", "Mistral's"])
def model(request, trained):
    if request.param == "trained here":
        return trained
    folder = os.environ.get("WMTP_TEST_DATA")
    if folder is None:
        pytest.skip("WMTP_TEST_DATA is not set, so Mistral's tokenizer is not there")
    return Path(folder) / "tokenizers" / "mistral-v1-sentencepiece.model"


def as_text(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_ids_and_text_are_those_of_sentencepiece(model):
    slow, fast = sentencepiece.SentencePieceProcessor(model_file=str(model)), from_sentencepiece(model)
    assert len(fast) == len(slow)
    assert (fast.bos_token_id, fast.eos_token_id, fast.unk_token_id) == (slow.bos_id(), slow.eos_id(), slow.unk_id())
    draw = random.Random(5)
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    texts = AWKWARD + [file.read_text(errors="replace")[:10_000] for file in draw.sample(files, 30)]
    for _ in range(100):
        kinds = [range(32, 127), range(0x20, 0xD7FF), range(32, 33), range(10, 11), range(0x1F600, 0x1F650)]
        texts.append("".join(chr(draw.choice(draw.choice(kinds))) for _ in range(100)))
    for text in texts:
        ids = slow.encode(text)
        assert as_text(fast, text) == ids, text[:80]
        assert fast.decode(ids) == slow.decode(ids), text[:80]


def test_folder_with_only_a_sentencepiece_model_is_a_tokenizer(trained, tmp_path):
    fast = load_tokenizer(trained.parent)
    fast.save_pretrained(tmp_path)
    text = "def f(x):\n    return x + 1\n"
    assert as_text(load_tokenizer(tmp_path), text) == as_text(fast, text)
    assert load_tokenizer(tmp_path).eos_token == "</s>"
    assert digest(trained.parent) != digest(tmp_path)
    before = digest(trained.parent)
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.model").write_bytes(trained.read_bytes() + b"\x0a\x00")
    assert digest(other) != before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "unigram"}, "is not BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes the text"),
        ({"remove_extra_whitespaces": True}, "changes the text"),
        ({"treat_whitespace_as_suffix": True}, "end of words"),
        ({"user_defined_symbols": ["<FILL>"]}, "never cut"),
    ],
)
def test_model_that_could_not_be_followed_exactly_is_refused(tmp_path, changes, words):
    path = train(tmp_path / "tokenizer.model", files=1, vocab_size=400, **changes)
    with pytest.raises(InputError, match=words) as caught:
        from_sentencepiece(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xff no protobuf", b"[1, 2]", b"IQ== 0\nIg== 1\nIw== 2\n"])
def test_what_is_no_sentencepiece_model_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match="not a SentencePiece model") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.where == str(tmp_path / "tokenizer.model")
