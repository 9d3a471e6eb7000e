"""The shipped tokenizer: lossless on any text, loadable, and reproducible from the sample."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER_DIR = ROOT / "wmtp_worker" / "data" / "tokenizer"
SAMPLE_DIR = ROOT / "wmtp_worker" / "data" / "sample"
SCRIPT = ROOT / "scripts" / "train_tokenizer.py"

TOKENIZER = AutoTokenizer.from_pretrained(TOKENIZER_DIR)
SPECIAL_IDS = {0, 1, 2}
NASTY = [
    "",
    " ",
    "   leading and trailing   ",
    "\n\n\n",
    "\n    \n\t\t\n \t x",
    "a\r\nb\rc",
    "\x00\x01\x7f\x80\xff",
    "한국어 문장, 띄어쓰기 있음",
    "e\u0301 é Å \u212b ﬁ",
    "👩‍👩‍👧‍👦 🇰🇷 😀 \U0010ffff",
    "\u200b\u2028\u2029\ufeff\u00a0\u3000",
    "<0x0A> <0xE2><0x96><0x81>",
    "▁word ▁ Ġ Ċ ##piece </w>",
    "a </s> b <s><pad>c</s>",
    "hello , world ! it 's n't",
    "def f(x):\n    if x:\n        return 1_000\n",
]


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def problems(split: str) -> list[dict]:
    lines = (SAMPLE_DIR / f"{split}.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return [json.loads(line) for line in lines]


def assert_round_trip(text: str) -> None:
    ids = encode(text)
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
    # neither a special token nor one outside the vocabulary (there is no unknown token)
    assert all(type(index) is int and 2 < index < len(TOKENIZER) for index in ids)


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_nasty_text_survives(text):
    assert_round_trip(text)


@given(st.text())
@settings(deadline=None, max_examples=300)
def test_any_text_survives(text):
    assert_round_trip(text)


@given(st.lists(st.sampled_from([*NASTY, "<0x", "0A>", "</", "s>", " ", "\n"]), max_size=6).map("".join))
@settings(deadline=None, max_examples=200)
def test_joined_nasty_text_survives(text):
    assert_round_trip(text)


def test_samples_survive():
    for problem in problems("train") + problems("validation"):
        for text in (problem["text"], problem["code"], *problem["test_list"], *problem["incorrect_code"]):
            assert_round_trip(text)


def test_all_bytes_are_plain_vocabulary():
    vocabulary = TOKENIZER.get_vocab()
    assert all(f"<0x{value:02X}>" in vocabulary for value in range(256))
    assert set(TOKENIZER.added_tokens_decoder) == SPECIAL_IDS


def test_characters_outside_ascii_become_bytes():
    tokens = TOKENIZER.convert_ids_to_tokens(encode("é한"))
    assert tokens == [f"<0x{value:02X}>" for value in "é한".encode()]


@pytest.mark.parametrize("loader", [AutoTokenizer, PreTrainedTokenizerFast])
def test_loads_with_its_special_tokens(loader, recwarn, caplog, monkeypatch):
    # transformers keeps its messages from other handlers unless told to pass them on
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = loader.from_pretrained(TOKENIZER_DIR)
    assert not recwarn.list
    assert not caplog.records
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", 0)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<s>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", 2)
    assert tokenizer.unk_token is None
    assert len(tokenizer) == 2048
    assert tokenizer.model_max_length == 2048


@pytest.mark.parametrize("loader", [AutoTokenizer, PreTrainedTokenizerFast])
def test_no_special_token_is_added_or_found_in_text(loader):
    tokenizer = loader.from_pretrained(TOKENIZER_DIR)
    text = "<s>print(1)</s>"
    assert tokenizer(text)["input_ids"] == encode(text)
    assert not SPECIAL_IDS.intersection(encode(text))
    assert tokenizer.decode([1, *encode("x = 1"), 2, 0], skip_special_tokens=True) == "x = 1"


def test_tokenizer_file_alone_needs_one_setting_for_special_tokens_in_text():
    tokenizer = Tokenizer.from_file(str(TOKENIZER_DIR / "tokenizer.json"))
    assert tokenizer.encode("</s>").ids == [2]
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("</s>").ids == encode("</s>")


def test_code_is_packed_well():
    texts = [problem["code"] for problem in problems("validation")]
    characters = sum(map(len, texts))
    tokens = sum(len(encode(text)) for text in texts)
    assert characters / tokens > 2.5


def test_training_again_gives_the_shipped_files(tmp_path):
    command = [sys.executable, str(SCRIPT), "--output-dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in TOKENIZER_DIR.iterdir()}
