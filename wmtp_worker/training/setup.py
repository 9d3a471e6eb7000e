"""Stage 0: from settings to a session that is ready to train."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from wmtp_worker.assets.resolve import dataset_digest, dataset_folder, model_folder, tokenizer_folder
from wmtp_worker.checkpoint.restore import find
from wmtp_worker.data.dataset import Dataset
from wmtp_worker.data.formats import Format, read_split
from wmtp_worker.data.problems import Split
from wmtp_worker.data.sampler import PackedSampler
from wmtp_worker.data.tokenizer import Sample, encode_all, load_tokenizer
from wmtp_worker.data.tokenizer import digest as tokenizer_digest
from wmtp_worker.errors import DiskFullError, InputError
from wmtp_worker.host.device import make_deterministic, resolve_device, set_threads
from wmtp_worker.host.limits import disk_free
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.model.compat import Named, check_vocabulary
from wmtp_worker.model.loading import base_digest, build, load
from wmtp_worker.model.lora import add_lora
from wmtp_worker.model.mtp import MTPForCausalLM
from wmtp_worker.settings import Settings
from wmtp_worker.storage.atomic import set_aside
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.heartbeat import Heartbeat
from wmtp_worker.training.bucket import RunBucket
from wmtp_worker.training.columns import Policy, add_columns
from wmtp_worker.training.scores import Scorer
from wmtp_worker.training.session import Session
from wmtp_worker.training.weights import Weighter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

# all fp32: weights, and AdamW's two moments of those that are trained
_BYTES_OF_WEIGHT, _BYTES_OF_MOMENTS = 4, 8


def build_session(
    settings: Settings, paths: RunPaths, stop: StopRequest, heartbeat: Heartbeat, bucket: RunBucket, console: Console
) -> Session:
    """Load data and models. Polls `stop` and `bucket` between the parts, and while it tokenizes and scores."""
    threads = set_threads(settings.host.threads)
    device = resolve_device(settings.host.device)
    make_deterministic(device)

    def poll(phase: str) -> None:
        stop.check()
        bucket.check()
        heartbeat.beat(phase)

    def poll_data() -> None:
        poll("data")

    poll_data()
    folder, tokens = dataset_folder(settings), tokenizer_folder(settings)
    tokenizer = load_tokenizer(tokens)
    train_data = load_split(settings, folder, "train", tokenizer, poll_data)
    validation_data = load_split(settings, folder, "validation", tokenizer, poll_data)
    poll("model")
    with heartbeat.during("model"):
        base = model_folder(settings)
        model = load(base, settings.model.heads) if base else build(settings, tokenizer)
        check_fit(settings, model, tokenizer)
        if settings.lora.rank:
            add_lora(model, **settings.lora.model_dump(), seed=settings.run.seed)
        base_model_digest = base_digest(base, stop.check) if base else None
    policy = Policy(Named(f"the policy ({tokens})", tokenizer), tokenizer_digest(tokens))
    train_data, frozen = add_columns(settings, train_data, policy, Scorer(settings, device, poll, heartbeat, console))
    # what these hold counts, not where it lies
    digests = {
        "data.dataset": dataset_digest(folder, data_format(settings)),
        "model.tokenizer": policy.digest,
        "model.path": base_model_digest,
        **frozen,
    }
    if settings.training.checkpoint_activations == "full":
        model.activation_checkpointing_enable()
    model.to(device).train()  # type: ignore[arg-type]  # transformers hides nn.Module.to's signature
    return Session(
        settings=settings,
        paths=paths,
        device=device,
        model=model,
        optimizer=_optimizer(settings, model),
        weighter=Weighter(settings.weighting, settings.run.seed),
        train_data=train_data,
        validation_data=validation_data,
        identity={**settings.identity(), **{key: digest and f"sha256 {digest}" for key, digest in digests.items()}},
        base_model_digest=base_model_digest,
        threads=threads,
        stop=stop,
        heartbeat=heartbeat,
        bucket=bucket,
    )


def load_split(
    settings: Settings, folder: Path, split: Split, tokenizer: "PreTrainedTokenizerFast", poll: Callable[[], None]
) -> Dataset:
    """Read and tokenize one split; `poll` is called before each sample and may raise to stop. Raises `InputError`."""
    limit = settings.data.sequence_length
    # what the policy is to be good at is the right ones, whatever it learns from
    solutions = settings.data.solutions if split == "train" else "correct"
    samples: list[Sample] = []
    for number, problem in enumerate(read_split(folder, split, data_format(settings))):
        poll()
        samples += encode_all(tokenizer, problem, number, solutions)
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
    return Dataset(fitting, sampler, limit, pad_id)


def data_format(settings: Settings) -> Format | None:
    """`data.format`; None: to be found out."""
    return None if settings.data.format == "auto" else settings.data.format


def check_fit(settings: Settings, model: MTPForCausalLM, tokenizer: "PreTrainedTokenizerFast") -> None:
    longest = model.config.max_position_embeddings
    if settings.data.sequence_length > longest:
        raise InputError(
            f"data.sequence_length={settings.data.sequence_length} is longer than the model's {longest} positions",
            where=settings.sources.get("data.sequence_length", "settings"),
            fix=f"set data.sequence_length to {longest} or less",
        )
    check_vocabulary(Named("model.tokenizer", tokenizer), "the policy", model.config.vocab_size)


def _optimizer(settings: Settings, model: MTPForCausalLM) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms do not."""
    training = settings.training

    def having(matrix: bool) -> Iterable[torch.nn.Parameter]:
        trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
        return [parameter for parameter in trained if (parameter.ndim >= 2) == matrix]

    groups: list[dict[str, Any]] = [
        {"params": having(True), "weight_decay": training.weight_decay},
        {"params": having(False), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # adapters have no norms
    return torch.optim.AdamW(
        groups, lr=training.lr, betas=(training.beta1, training.beta2), eps=training.eps, fused=True
    )


def restore(session: Session) -> None:
    """Go on from the checkpoint that `run.resume` asks for; whatever that makes obsolete is set aside, not deleted."""
    session.check()
    _go_on(session)
    _check_disk(session)
    _log_facts(session)


def _go_on(session: Session) -> None:
    paths, resume = session.paths, session.settings.run.resume

    def heed(size: int) -> None:
        session.check()
        session.heartbeat.beat("restore")

    checkpoint = find(paths, resume, heed=heed)
    if checkpoint is None and resume == "auto":
        session.bucket.check_fresh_start()
    if checkpoint is not None:
        with session.heartbeat.during("restore"):
            session.restore(checkpoint)
        log.info("resuming from %s", checkpoint.folder)
    later = [paths.step(step) for step in paths.steps() if step > session.progress.step]
    if checkpoint is None and resume == "auto":
        _warn_of_fresh_start(session, damaged=bool(later))
    anew = checkpoint is None and (resume == "never" or bool(later) or paths.final.exists())
    # with auto, later ones did not verify, and stay for inspection
    rewound = checkpoint is not None and resume != "auto" and bool(later)
    obsolete = []
    if anew or rewound or not session.finished:
        obsolete.append(paths.final)
    if anew or rewound:
        # the checkpoints go last: killed before that, the same command finds the same to do
        record = [paths.metrics, paths.report] if anew else []
        obsolete += [paths.best, *record, *later]
    if obsolete := [path for path in obsolete if path.exists()]:
        log.info("set aside %d items of the earlier run in %s", len(obsolete), set_aside(paths.checkpoints, obsolete))
    session.bucket.restored(session.progress.step)
    if not paths.best.exists():
        session.progress.best_loss, session.progress.without_improvement = None, 0


def _warn_of_fresh_start(session: Session, damaged: bool) -> None:
    paths = session.paths
    if damaged:
        log.warning("no checkpoint of run %r verifies: starting from step 0", paths.run)
    elif session.settings.sources["run.resume"].startswith("--resume"):
        # somebody expects to go on: the name may be another run's, or the volume another one
        runs = sorted({path.parent.name for path in paths.checkpoints.parent.glob("*/step_*")})
        others = f"; there are {', '.join(runs)}" if runs else ""
        log.warning("run %r has no checkpoint to resume%s: starting from step 0", paths.run, others)


def _check_disk(session: Session) -> None:
    parameters = list(session.model.parameters())
    needed = sum(parameter.numel() for parameter in parameters) * _BYTES_OF_WEIGHT
    needed += sum(parameter.numel() for parameter in parameters if parameter.requires_grad) * _BYTES_OF_MOMENTS
    free = disk_free(session.paths.checkpoints)
    # the first save takes the place of older ones, where the process before this one trained on with a full disk
    older = [session.paths.step(step) for step in session.paths.steps() if step < session.progress.step]
    free += sum(file.stat().st_size for folder in older for file in folder.iterdir())
    if free < needed and not session.finished:
        raise DiskFullError(
            f"a checkpoint needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free",
            where=str(session.paths.checkpoints),
            fix="free some space, or set WMTP_WORKDIR to a larger disk",
        )


def _log_facts(session: Session) -> None:
    parameters = sum(parameter.numel() for parameter in session.model.parameters())
    log.info(
        "run %s: %.1f M parameters, %d heads, %d training and %d validation samples, %s, %d threads",
        session.paths.run,
        parameters / 1e6,
        session.model.heads,
        len(session.train_data.samples),
        len(session.validation_data.samples),
        session.device,
        session.threads,
    )
