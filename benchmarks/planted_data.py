"""A task whose right answers are known token by token: a polynomial modulo a prime, iterated among noise.

A problem gives c and a first value s; its solution writes s ← s² + c modulo `MODULUS` again and again: the planted
tokens, each followed by words that mean nothing. A wrong solution makes mistakes in some steps and goes on from what it
wrote. Planted tokens follow from what stands before them (their loss can become 0), the words are uniform among `WORDS`
(theirs is ln(WORDS) at best).

    problem    +1 : 2          solution    5 w07 w31 w12 4 w20 w02 w55 6 w41 …

One word is one token, so for each token it is known what it is: `kinds`.
"""

import json
import random
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wmtp_worker.data.problems import Problem, Solution, dump
from wmtp_worker.data.template import prompt
from wmtp_worker.data.tokenizer import Sample

MODULUS = 7
TERMS = 6
NOISE = 3  # words behind each planted token
WORDS = 64
CLEAN = 0.2  # chance of a word where clean data has "." else: its reader must have met words before
MISTAKE = 0.5  # chance of each step of a wrong solution
RIGHT, WRONG = 2, 2  # solutions a problem
END, PLANTED, MISTAKEN, FILLER = range(4)

_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
_VALUES = [str(value) for value in range(MODULUS)]
_VOCABULARY = [
    *_SPECIAL,
    *("Q", "A", ":", "."),
    *_VALUES,
    *(f"+{value}" for value in _VALUES),
    *(f"w{number:02}" for number in range(WORDS)),
]
_DIGIT, _CONSTANT = _VOCABULARY.index("0"), _VOCABULARY.index("+0")


def write(folder: Path, train: int, validation: int, seed: int, noisy: bool = True) -> None:
    """A data set in the labelled format: `train.jsonl` and `validation.jsonl` with so many problems.

    Not noisy, it is what a reference model learns from: most words are ".", and every solution is right.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(f"planted {seed} {noisy}")
    for split, count in (("train", train), ("validation", validation)):
        lines = [dump(_problem(f"{split} {number}", chance, noisy)) + "\n" for number in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(lines))


def _problem(name: str, chance: random.Random, noisy: bool) -> Problem:
    c, first = chance.randrange(MODULUS), chance.randrange(MODULUS)
    solutions = [_solution(c, first, chance, correct=number < RIGHT, noisy=noisy) for number in range(RIGHT + WRONG)]
    # seen apart, a right and a wrong one do not differ in their place
    chance.shuffle(solutions)
    return Problem(
        id=name,
        statement=f"+{c} : {first}",
        solutions=solutions if noisy else [solution for solution in solutions if solution.correct][:1],
    )


def _solution(c: int, value: int, chance: random.Random, correct: bool, noisy: bool) -> Solution:
    wrong = [not correct and chance.random() < MISTAKE for _ in range(TERMS)]
    if not correct and not any(wrong):
        wrong[chance.randrange(TERMS)] = True
    words = []
    for mistaken in wrong:
        value = (value * value + c + (chance.randrange(1, MODULUS) if mistaken else 0)) % MODULUS
        fillers = [f"w{chance.randrange(WORDS):02}" if noisy or chance.random() < CLEAN else "." for _ in range(NOISE)]
        words += [str(value), *fillers]
    return Solution(code=" ".join(words), correct=correct)


def write_tokenizer(folder: Path) -> None:
    """A token for each word; the prompt's fixed sentences are shortened to Q and A, which costs no meaning."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    before, after = prompt(Problem(id="-", statement="|")).split("|")
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(_VOCABULARY)}, "<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(before, "Q "), normalizers.Replace(after, " A ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in _SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))


def kinds(sample: Sample) -> npt.NDArray[np.int64]:
    """What each token of a solution is, END for `</s>` and for the prompt: int64 [length]."""
    digits = [int(token) - _DIGIT for token in sample.ids]
    found = np.full(len(digits), END)
    c, value = sample.ids[2] - _CONSTANT, digits[4]  # <s> Q +c : s A
    found[sample.prompt_length : -1] = FILLER
    for place in range(sample.prompt_length, len(digits) - 1, 1 + NOISE):
        found[place] = PLANTED if digits[place] == (value * value + c) % MODULUS else MISTAKEN
        value = digits[place]
    return found
