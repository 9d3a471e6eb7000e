"""The splits of a run's data set, as tokens."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wmtp_worker.assets.resolve import dataset_digest, tokenizer_folder
from wmtp_worker.data.dataset import Dataset
from wmtp_worker.data.formats import Format, read_split
from wmtp_worker.data.packing import METHOD
from wmtp_worker.data.problems import Split
from wmtp_worker.data.sampler import PackedSampler
from wmtp_worker.data.tokenizer import Sample, encode_all
from wmtp_worker.data.tokenizer import digest as tokenizer_digest
from wmtp_worker.errors import InputError
from wmtp_worker.settings import Settings
from wmtp_worker.training.tokens import Cache, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)


def load_split(
    settings: Settings,
    folder: Path,
    split: Split,
    tokenizer: "PreTrainedTokenizerFast",
    poll: Callable[[], None],
    solutions: Literal["correct", "all"] | None = None,
) -> Dataset:
    """One split as tokens, read and tokenized where no earlier run has done that (`tokens`).

    `poll` is called before each sample and may raise to stop. Raises `InputError`. `solutions` None:
    those that the policy is trained on, or validated on.
    """
    limit = settings.data.sequence_length
    # what the policy is to be good at is the right ones, whatever it learns from
    solutions = solutions or (settings.data.solutions if split == "train" else "correct")

    def make() -> Tokens:
        made, difficulties = list[Sample](), list[int | None]()
        for number, problem in enumerate(read_split(folder, split, data_format(settings))):
            poll()
            difficulties.append(problem.difficulty)
            made += encode_all(tokenizer, problem, number, solutions)
        return Tokens(made, difficulties)

    files = dataset_digest(folder, data_format(settings), (split,))
    facts = (files, tokenizer_digest(tokenizer_folder(settings)), settings.data.format, split, solutions)
    tokens = Cache(settings.run.workdir, facts).tokens(make, poll)
    samples = tokens.samples
    if not samples:
        raise InputError(
            f"no {split} problem has a correct Python solution",
            where=str(folder),
            fix="label them by running them: wmtp data label DATA FOLDER",
        )
    fitting = [sample for sample in samples if len(sample.ids) <= limit]
    if not fitting:
        raise InputError(
            f"every {split} sample is longer than data.sequence_length={limit} tokens",
            where=str(folder),
            fix=f"set data.sequence_length to {min(len(sample.ids) for sample in samples)} or more",
        )
    if left_out := len(samples) - len(fitting):
        log.warning("%d of %d %s samples are longer than %d tokens: left out", left_out, len(samples), split, limit)
    lengths = [len(sample.ids) for sample in fitting]
    sampler = PackedSampler(lengths, limit, settings.run.seed, settings.data.packing)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return Dataset(fitting, sampler, limit, pad_id, difficulties=tokens.difficulties)


def order(settings: Settings) -> dict[str, str]:
    """How samples are laid out in rows, for the identity of a run: an older way is another order of the data."""
    return {"data.packing": METHOD} if settings.data.packing else {}


def data_format(settings: Settings) -> Format | None:
    """`data.format`; None: to be found out."""
    return None if settings.data.format == "auto" else settings.data.format
