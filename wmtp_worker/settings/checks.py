"""Settings that are fine one by one but contradict each other."""

import ipaddress
import math
from collections.abc import Iterator
from itertools import pairwise
from urllib.parse import urlsplit

from wmtp_worker.settings.kinds import RUN_NAME
from wmtp_worker.settings.schema import FIELDS, MODEL_SHAPE, Settings
from wmtp_worker.settings.stages import value_name, value_run
from wmtp_worker.settings.values import Given, Problem, nearest

# bf16 has 8 significant bits: what should change by less than 1/256 is rounded to what it was
_SLOWEST_BF16 = 0.99
_SMALLEST_FP32 = 2.0**-149


def contradictions(settings: Settings, given: dict[str, Given], needs_bucket: bool = True) -> Iterator[Problem]:
    """Every contradiction, with the origin of each value that takes part in it."""
    yield from _model(settings, given)
    yield from _training(settings)
    yield from _weighting(settings)
    yield from _tracking(settings)
    if settings.trains_values or settings.weighting.learns_values:
        yield from _trunk_head(settings)
    if settings.trains_values:
        yield from _value(settings, given)
    yield from _cloud(settings, needs_bucket)
    for key in settings.run.accept_changes:
        if key not in FIELDS:
            near = nearest(key, tuple(FIELDS))
            fix = f"did you mean {near}?" if near else "name settings by dotted key, as training.lr"
            yield Problem(
                f"run.accept_changes names the unknown setting {key!r}",
                settings.sources["run.accept_changes"],
                fix,
            )


def _model(settings: Settings, given: dict[str, Given]) -> Iterator[Problem]:
    model, data = settings.model, settings.data
    if data.sequence_length <= model.heads:
        yield _clash(
            settings,
            "data.sequence_length",
            "must be greater than",
            "model.heads",
            "make the sequence longer",
        )
    if model.path is not None:
        # the folder brings its own shape; one given by hand would silently not count
        for key in MODEL_SHAPE:
            if given[key].explicit:
                what = f"{key} has no effect while model.path={model.path!r} ({settings.sources['model.path']})"
                yield Problem(what, given[key].source, f"drop {key}, or set model.path=null to build a new model")
        return
    if data.sequence_length > model.max_position_embeddings:
        longest = "model.max_position_embeddings"
        yield _clash(
            settings,
            "data.sequence_length",
            "must not be greater than",
            longest,
            "shorten the one or raise the other",
        )
    if model.hidden_size % model.attention_heads:
        yield _clash(
            settings,
            "model.hidden_size",
            "must be a multiple of",
            "model.attention_heads",
            "change one of them",
        )
    elif model.hidden_size // model.attention_heads % 2:
        fix = "rotary positions need an even width per head"
        yield _clash(settings, "model.hidden_size", "must be an even multiple of", "model.attention_heads", fix)
    if model.attention_heads % model.key_value_heads:
        yield _clash(
            settings,
            "model.attention_heads",
            "must be a multiple of",
            "model.key_value_heads",
            "change one of them",
        )


def _training(settings: Settings) -> Iterator[Problem]:
    training, run = settings.training, settings.run
    processes = settings.parallel.processes
    if isinstance(processes, int) and training.accumulation % processes:
        yield _clash(
            settings,
            "training.accumulation",
            "must be a multiple of",
            "parallel.processes",
            f"set training.accumulation={-(-training.accumulation // processes) * processes}",
        )
    for key, beta in (("training.beta1", training.beta1), ("training.beta2", training.beta2)):
        if training.moments == "bf16" and beta > _SLOWEST_BF16:
            what = f"{key}={beta:g} moves a moment by less than bf16 can tell apart, which training.moments=bf16 keeps"
            yield Problem(what, settings.sources[key], f"set {key}={_SLOWEST_BF16} or less, or training.moments=fp32")
    if training.warmup_steps > training.max_steps:
        yield _clash(
            settings,
            "training.warmup_steps",
            "must not be greater than",
            "training.max_steps",
            "shorten the warm-up",
        )
    if training.early_stopping.patience and not settings.evaluation.every:
        what = "training.early_stopping.patience counts validations, but evaluation.every=0 has only one"
        fix = "set evaluation.every, or patience to 0"
        yield Problem(what, settings.sources["training.early_stopping.patience"], fix)
    if run.stage != "value" and isinstance(run.resume, int) and run.resume > training.max_steps:
        yield _clash(settings, "run.resume", "must not be greater than", "training.max_steps", "take an earlier step")


def _weighting(settings: Settings) -> Iterator[Problem]:
    weighting = settings.weighting
    if weighting.min > weighting.max:
        yield _clash(settings, "weighting.min", "must not be greater than", "weighting.max", "change one of them")
    elif weighting.normalise == "mean1_clip" and not weighting.min <= 1 <= weighting.max:
        key = "weighting.min" if weighting.min > 1 else "weighting.max"
        what = f"with weighting.normalise=mean1_clip the mean 1 must lie between weighting.min={weighting.min} and "
        yield Problem(
            f"{what}weighting.max={weighting.max}", settings.sources[key], f"move {key} to the other side of 1"
        )
    chosen = f"weighting.family={weighting.family} ({settings.sources['weighting.family']})"
    if weighting.needs_reference and weighting.reference is None:
        with_kl = " with weighting.grpo.kl" if weighting.family == "grpo" else ""
        fix = "set weighting.reference to a model's folder, its name under models/, or org/name on the hub"
        yield Problem(f"{chosen}{with_kl} needs a reference model", None, fix)
    if weighting.needs_reward_model and weighting.critic.reward_model is None:
        what = "weighting.critic.rewards=reward_model needs a reward model"
        fix = "set weighting.critic.reward_model to its folder, its name under models/, or org/name on the hub"
        yield Problem(what, settings.sources["weighting.critic.rewards"], fix)
    if weighting.family == "grpo" and settings.data.solutions != "all":
        what = f"{chosen} compares right and wrong solutions, but data.solutions=correct leaves the wrong ones out"
        yield Problem(what, settings.sources["data.solutions"], "set data.solutions=all")
    yield from _weights_of_zero(settings)
    yield from _bins(settings)
    yield from _critic(settings)


def _weights_of_zero(settings: Settings) -> Iterator[Problem]:
    weighting, sources = settings.weighting, settings.sources
    share, low, high = weighting.rho1.share, weighting.min, weighting.max
    if weighting.family == "rho1_tokenskip" and weighting.normalise == "mean1_clip" and (low or share * high < 1):
        what = f"weighting.min={low:g} with mean1_clip lifts the tokens that rho1_tokenskip skips"
        if not low:
            what = f"weighting.rho1.share={share:g} of the tokens at weighting.max={high:g} cannot have the mean 1"
        yield Problem(what, sources["weighting.normalise"], "set weighting.normalise=mean1")
    grpo = weighting.grpo
    if weighting.family == "grpo" and not low and math.exp(-grpo.clip / grpo.beta) < _SMALLEST_FP32:
        power = f"exp(-weighting.grpo.clip / weighting.grpo.beta) = exp(-{grpo.clip:g} / {grpo.beta:g})"
        fix = "raise weighting.min above 0, or weighting.grpo.beta"
        yield Problem(f"{power} is 0, and so may be all weights of a step", sources["weighting.grpo.beta"], fix)


def _bins(settings: Settings) -> Iterator[Problem]:
    key = "data.pairs.difficulty_bins"
    bins = sorted(settings.data.pairs.difficulty_bins)
    for (low, high, _), (following, *_) in pairwise(bins):
        if following <= high:
            what = f"{key}: {low:g} to {high:g} and the bin from {following:g} overlap"
            yield Problem(what, settings.sources[key], "let each difficulty be in one bin")


def _critic(settings: Settings) -> Iterator[Problem]:
    critic, sources = settings.weighting.critic, settings.sources
    alone = settings.run.stage == "policy" and critic.value is None
    if settings.weighting.family == "critic" and alone and not critic.auxiliary:
        what = "run.stage=policy trains no value model, and weighting.critic.value names none"
        fix = "name one, set weighting.critic.auxiliary to train one beside the policy, or set run.stage=all"
        yield Problem(what, sources["run.stage"], fix)
    if settings.weighting.learns_values:
        chosen = f"weighting.critic.auxiliary={critic.auxiliary} ({sources['weighting.critic.auxiliary']})"
        if not settings.value.trunk_head:
            what = f"{chosen} trains on a head on the policy's trunk, but value.trunk_head=false makes another model"
            fix = "set value.trunk_head=true, or weighting.critic.auxiliary=0"
            yield Problem(what, sources["value.trunk_head"], fix)
        if settings.data.solutions != "all":
            what = f"{chosen} learns from wrong solutions, too, but data.solutions=correct leaves them out"
            yield Problem(what, sources["data.solutions"], "set data.solutions=all")


def _trunk_head(settings: Settings) -> Iterator[Problem]:
    value, sources = settings.value, settings.sources
    if value.trunk_head and value.backbone is not None:
        what = "value.trunk_head is a head on the policy, value.backbone another model"
        yield Problem(what, sources["value.trunk_head"], "set one of the two")
    if value.trunk_head and value.lora_rank:
        what = "value.trunk_head trains nothing of the trunk, value.lora_rank adapters on it"
        yield Problem(what, sources["value.trunk_head"], "set one of the two")


def _tracking(settings: Settings) -> Iterator[Problem]:
    tracking, sources = settings.tracking, settings.sources
    if tracking.uri is not None:
        where, scheme = sources["tracking.uri"], tracking.uri.partition(":")[0]
        try:
            parts = urlsplit(tracking.uri)
            host, secret = parts.hostname, parts.username or parts.password
        except ValueError:
            host, secret = None, None
        if scheme not in ("http", "https", "file", "sqlite") or (scheme in ("http", "https") and not host):
            fix = "write https://host, http://host:port, file:/a/folder or sqlite:////a/file.db"
            yield Problem(f"tracking.uri={tracking.uri!r} is no address of an MLflow server or store", where, fix)
        elif secret:
            fix = "drop them, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            yield Problem("tracking.uri has credentials in it", where, fix)
    for tag in tracking.tags:
        name, equals, value = tag.partition("=")
        if not (name.strip() and equals and value):
            fix = "write tracking.tags=name=value,other=value"
            yield Problem(f"{tag!r} in tracking.tags is no tag", sources["tracking.tags"], fix)


def _value(settings: Settings, given: dict[str, Given]) -> Iterator[Problem]:
    sources = settings.sources
    name = value_name(settings.run.name)
    if not RUN_NAME.fullmatch(name):
        what = f"the value model would be trained by the run {name!r}, which is no name for a run"
        yield Problem(what, sources["run.name"], "shorten --run-name, or set weighting.critic.value")
    own = value_run(settings)
    if isinstance(own.run.resume, int) and own.run.resume > own.training.max_steps:
        what = f"run.resume={own.run.resume} is beyond the value model's {own.training.max_steps} steps"
        yield Problem(what, sources["run.resume"], "take an earlier step")
    if own.training.early_stopping.patience and not own.evaluation.every and given["value.patience"].explicit:
        what = "value.patience counts validations, but there is only one, at the end"
        yield Problem(what, sources["value.patience"], "set value.evaluation_every, or value.patience to 0")


_SCHEMES = {"s3": "s3", "gs": "gcs", "az": "azure"}


def _cloud(settings: Settings, needs_bucket: bool) -> Iterator[Problem]:
    cloud, sources = settings.cloud, settings.sources
    chosen = f"cloud.provider={cloud.provider} ({sources['cloud.provider']})"
    if needs_bucket and cloud.bucket is None and cloud.provider != "local":
        yield Problem(f"{chosen} needs a bucket", None, "set CLOUD_BUCKET, or CLOUD_PROVIDER=local")
    if cloud.bucket is not None and "://" in cloud.bucket:
        scheme, _, rest = cloud.bucket.partition("://")
        name, _, prefix = rest.strip("/").partition("/")
        asked = f"CLOUD_PROVIDER={_SCHEMES.get(scheme, cloud.provider)} CLOUD_BUCKET={name}"
        fix = f"set {asked}" + (f" CLOUD_PREFIX={prefix}" if prefix else "")
        yield Problem(f"cloud.bucket={cloud.bucket!r} is a URL, not a name", sources["cloud.bucket"], fix)
    elif cloud.bucket is not None and "defaults.yaml:" in sources["cloud.provider"]:
        # a folder called like the bucket would be made, and the work would be believed to be safe
        what = f"cloud.bucket={cloud.bucket!r} is set, but not which provider has it"
        yield Problem(what, sources["cloud.bucket"], "set CLOUD_PROVIDER to s3, gcs or azure; local for a folder")
    if cloud.endpoint_url is not None:
        yield from _endpoint(settings, cloud.endpoint_url)
    if cloud.sse is not None and cloud.provider != "s3":
        yield Problem(f"cloud.sse has no effect with {chosen}", sources["cloud.sse"], "drop it, or set cloud.kms_key")
    if cloud.kms_key is not None and cloud.provider == "s3" and cloud.sse != "aws:kms":
        yield Problem("cloud.kms_key needs cloud.sse=aws:kms", sources["cloud.kms_key"], "set both, or neither")


def _endpoint(settings: Settings, url: str) -> Iterator[Problem]:
    where = settings.sources["cloud.endpoint_url"]
    try:
        parts = urlsplit(url)
        host, scheme = parts.hostname, parts.scheme
        parts.port  # noqa: B018  # raises where it is no number
    except ValueError:
        host, scheme = None, ""
    if scheme not in ("http", "https") or not host:
        yield Problem(f"cloud.endpoint_url={url!r} is no address", where, "write https://host, or https://host:port")
    elif parts.username or parts.password:
        fix = "drop them; credentials come from variables such as AWS_SECRET_ACCESS_KEY"
        yield Problem("cloud.endpoint_url has credentials in it", where, fix)
    elif scheme == "http" and not is_loopback(host) and not settings.cloud.allow_http:
        fix = "use https://, or set cloud.allow_http=true if the network between is yours"
        yield Problem(f"cloud.endpoint_url={url!r} is without TLS", where, fix)


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _clash(settings: Settings, one: str, relation: str, other: str, fix: str) -> Problem:
    flat, sources = settings.flat(), settings.sources
    what = f"{one}={flat[one]} {relation} {other}={flat[other]}"
    where = sources[one] if sources[one] == sources[other] else f"{sources[one]} and {sources[other]}"
    return Problem(what, where, fix)
