"""Train the small tokenizer that ships with the package.

A BPE model with byte fallback, trained on the train split of the sample problems. The result depends on
nothing but that file and the version of the tokenizers library, so running this twice gives equal files.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
TRAIN_FILE = ROOT / "wmtp_worker" / "data" / "sample" / "train.jsonl"
OUTPUT_DIR = ROOT / "wmtp_worker" / "data" / "tokenizer"

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
BYTE_TOKENS = tuple(f"<0x{value:02X}>" for value in range(256))
# everything outside ASCII goes through the byte tokens, which keeps the alphabet the same for any data
ALPHABET = ("\t", "\n", *(chr(code) for code in range(0x20, 0x7F)))
VOCAB_SIZE = 2048
MODEL_MAX_LENGTH = 2048

# line ends keep the indentation that follows them; words and signs keep one space before them; digits
# stand alone. Whatever the pattern misses stays a piece of its own, so no character is lost.
PIECES = r"\n+[ \t]*| ?[\p{L}_]+| ?\p{N}| ?[^\s\p{L}\p{N}_]+|\s+"

ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{text}\n\n### Input:\n{tests}\n\n### Response:\n{code}"
)


def training_texts(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            problem = json.loads(line)
            tests = "\n".join(problem["test_list"])
            yield ALPACA.format(text=problem["text"], tests=tests, code=problem["code"])


def train_merges(texts: Iterator[str]) -> dict:
    """Train plain BPE and return the tokenizer's description without specials or byte tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS) - len(BYTE_TOKENS),
        initial_alphabet=list(ALPHABET),
        limit_alphabet=len(ALPHABET),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())


def with_byte_fallback(trained: dict) -> dict:
    """Put specials and byte tokens before the trained pieces and turn byte fallback on.

    The byte tokens are plain vocabulary, not added tokens: as added tokens they would match the literal
    text "<0x0A>" and decode it to a newline.
    """
    pieces = sorted(trained["model"]["vocab"], key=trained["model"]["vocab"].get)
    reserved = (*SPECIAL_TOKENS, *BYTE_TOKENS)
    clashes = set(pieces).intersection(reserved)
    if clashes:
        raise ValueError(f"trained pieces look like reserved tokens: {sorted(clashes)}")
    model = trained["model"] | {
        "byte_fallback": True,
        "vocab": {token: index for index, token in enumerate((*reserved, *pieces))},
    }
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return trained | {
        "added_tokens": [{"id": index, "content": token, **special} for index, token in enumerate(SPECIAL_TOKENS)],
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": model,
    }


def tokenizer_config() -> dict:
    pad, bos, eos = SPECIAL_TOKENS
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "model_max_length": MODEL_MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        # "</s>" written in a problem is text, not the end of a sequence
        "split_special_tokens": True,
    }


def write_tokenizer(train_file: Path, output_dir: Path) -> None:
    description = with_byte_fallback(train_merges(training_texts(train_file)))
    # reading it once proves that the library accepts the description
    Tokenizer.from_str(json.dumps(description))
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, content in (("tokenizer.json", description), ("tokenizer_config.json", tokenizer_config())):
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        (output_dir / name).write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--train-file", type=Path, default=TRAIN_FILE)
    parser.add_argument("--output-dir", type=Path, default=OUTPUT_DIR)
    arguments = parser.parse_args()
    write_tokenizer(arguments.train_file, arguments.output_dir)


if __name__ == "__main__":
    main()
