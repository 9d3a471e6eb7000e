"""Problems as token ids: what is trained on, and what never is."""

import json
import math
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_worker.data.packing import IGNORE, collate
from wmtp_worker.data.problems import Problem, Solution
from wmtp_worker.data.template import prompt
from wmtp_worker.data.tokenizer import PACKAGED, Sample, digest, encode, encode_all, load_tokenizer
from wmtp_worker.errors import InputError

TOKENIZER = load_tokenizer(PACKAGED)
BOS, EOS = 1, 2
SPECIAL = {0, BOS, EOS}
texts = st.lists(
    st.sampled_from(
        ["</s>", "<s>", "<pad>", "</", "s>", " ", "\n", "    ", "def f():", "한", "e", "\u2028", "return 1"]
    ),
    min_size=1,
    max_size=12,
).map("".join)


def problem(code: str = "def f():\n    return 1\n", text: str = "Write f.", test: str = "assert f() == 1") -> Problem:
    return Problem(id="1", statement=text, context=test, solutions=[Solution(code=code, correct=True)])


def decode(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=False)


def labels_of(sample: Sample, length: int = 400) -> list[int]:
    return collate([[sample]], length, pad_id=0).labels[0].tolist()


@given(code=texts, text=texts, test=texts)
@settings(deadline=None, max_examples=60)
def test_sample_is_bos_prompt_response_eos(code, text, test):
    asked = problem(code, text, test)
    sample = encode(TOKENIZER, asked)
    ids = sample.ids.tolist()
    assert sample.ids.dtype == np.int32
    assert (ids[0], ids[-1]) == (BOS, EOS)
    # whatever the texts contain, nothing between is a special token
    assert not SPECIAL.intersection(ids[1:-1])
    assert decode(ids[1 : sample.prompt_length]) == prompt(asked)
    assert decode(ids[sample.prompt_length : -1]) == code


@given(code=texts, text=texts)
@settings(deadline=None, max_examples=60)
def test_loss_covers_response_and_eos_and_nothing_else(code, text):
    sample = encode(TOKENIZER, problem(code, text))
    length = len(sample.ids) + 5
    labels = labels_of(sample, length)
    assert labels[: sample.prompt_length] == [IGNORE] * sample.prompt_length
    assert labels[sample.prompt_length : len(sample.ids)] == sample.ids[sample.prompt_length :].tolist()
    assert labels[len(sample.ids) :] == [IGNORE] * 5
    trained_on = [label for label in labels if label != IGNORE]
    assert decode(trained_on[:-1]) == code
    assert trained_on[-1] == EOS


def test_end_of_text_in_code_stays_text():
    sample = encode(TOKENIZER, problem('END = "</s>"  # <s>\n'))
    response = sample.ids[sample.prompt_length :].tolist()
    assert response.count(EOS) == 1
    assert response[-1] == EOS
    assert decode(response[:-1]) == 'END = "</s>"  # <s>\n'


def test_prompt_is_the_same_tokens_whatever_the_response():
    """No token spans the border, so generation starts from exactly what training saw."""
    one, other = encode(TOKENIZER, problem("\n\nx")), encode(TOKENIZER, problem("def f(): pass"))
    assert one.prompt_length == other.prompt_length
    assert one.ids[: one.prompt_length].tolist() == other.ids[: other.prompt_length].tolist()


def solved(*solutions: Solution) -> Problem:
    return Problem(id="1", statement="Write f.", solutions=list(solutions))


SOLUTIONS = (
    Solution(code="a = 1", correct=False),
    Solution(code="a = 2", correct=True),
    Solution(code="a = 3"),
    Solution(code="int a = 4;", correct=True, language="cpp"),
    Solution(code="a = 5", correct=True),
)


@pytest.mark.parametrize(
    ("solutions", "expected"),
    [("correct", {"a = 2": 1.0, "a = 5": 1.0}), ("all", {"a = 1": 0.0, "a = 2": 1.0, "a = 5": 1.0})],
)
def test_known_solutions_in_python_become_samples_of_their_problem(solutions, expected):
    samples = list(encode_all(TOKENIZER, solved(*SOLUTIONS), 7, solutions))
    assert {decode(sample.ids[sample.prompt_length : -1].tolist()): sample.reward for sample in samples} == expected
    assert {sample.problem for sample in samples} == {7}


def test_a_solution_nobody_has_judged_has_no_reward():
    assert math.isnan(encode(TOKENIZER, solved(), Solution(code="x")).reward)
    assert list(encode_all(TOKENIZER, solved(Solution(code="x")), 0, "all")) == []


@pytest.fixture
def folder(tmp_path):
    """A copy of the packaged tokenizer that may be changed."""
    return shutil.copytree(PACKAGED, tmp_path / "tokenizer")


def configure(folder, **changes):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_tokenizer_without_bos_gets_none(folder):
    configure(folder, bos_token=None)
    with_bos, without = encode(TOKENIZER, problem()), encode(load_tokenizer(folder), problem())
    assert without.ids.tolist() == with_bos.ids.tolist()[1:]
    assert without.prompt_length == with_bos.prompt_length - 1


def test_tokenizer_without_eos_is_refused(folder):
    configure(folder, eos_token=None)
    with pytest.raises(InputError, match="eos_token") as caught:
        load_tokenizer(folder)
    assert str(folder) in caught.value.where


def test_a_tokenizer_may_lie_in_a_folder_of_its_own(folder):
    """Beside the weights goes before it."""
    model = folder.parent
    assert load_tokenizer(model).get_vocab() == TOKENIZER.get_vocab()
    assert digest(model) == digest(folder) == digest(PACKAGED)
    configure(folder, eos_token=None)
    with pytest.raises(InputError, match="eos_token") as caught:
        load_tokenizer(model)
    assert caught.value.where == str(folder / "tokenizer_config.json")
    for path in PACKAGED.iterdir():
        shutil.copy(path, model)
    assert load_tokenizer(model).eos_token_id == TOKENIZER.eos_token_id
    assert digest(model) == digest(PACKAGED)


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"{}", b"\xff"], ids=["none", "empty", "cut", "no model", "bytes"]
)
def test_tokenizer_that_does_not_load_names_its_folder(folder, content):
    path = folder / "tokenizer.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer") as caught:
        load_tokenizer(folder)
    assert str(folder) in caught.value.where


def test_digest_is_of_the_content_not_of_the_place(folder):
    assert digest(folder) == digest(PACKAGED)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_digest_changes_with_every_file_that_changes_tokens(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes() + b" ")
    assert digest(folder) != digest(PACKAGED)


def test_dropping_bos_changes_the_digest_as_it_changes_the_tokens(folder):
    configure(folder, bos_token=None)
    assert digest(folder) != digest(PACKAGED)
