"""The typed tree of settings. The values, defaults too, come from `configs/` and the layers above."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr
from pydantic.fields import FieldInfo

from wmtp_worker.settings.kinds import (
    AboveZero,
    BelowOne,
    Count,
    Fraction,
    NotNegative,
    Positive,
    Text,
    check_difficulty_bin,
    check_every,
    check_number_or_auto,
    check_prefix,
    check_resume,
    check_run_name,
    check_workdir,
)


class Section(BaseModel):
    """Settings never change once loaded, and hold nothing that is not described here."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunSettings(Section):
    name: Annotated[str, BeforeValidator(check_run_name)] = Field(
        description="name of the run and of its folders; null means <recipe>-<preset>"
    )
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = Field(description="seed of every random choice")
    workdir: Annotated[Path, BeforeValidator(check_workdir)] = Field(
        description="local root of models, datasets, checkpoints and logs"
    )
    resume: Annotated[Literal["auto", "never"] | int, BeforeValidator(check_resume)] = Field(
        description="auto: from the newest checkpoint that verifies; never: start anew; a number: that step"
    )
    stage: Literal["all", "value", "policy"] = Field(
        description="all: first the value model, as the run <name>-value, where the weighting needs one and none is "
        "named, then the policy; value: only the value model; policy: only the policy"
    )
    accept_changes: list[str] = Field(
        description="settings, by dotted key, that may differ from those of the checkpoint"
    )


class HostSettings(Section):
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(description="where to compute; auto takes the best there is")
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(
        description="CPU threads; 0 means as many as the machine or container allows"
    )
    notices: Literal["auto", "ec2", "gcp", "azure", "none"] = Field(
        description="whose metadata service is asked whether this machine will be taken away; auto: found out"
    )
    hang_seconds: NotNegative = Field(
        description="a process that shows no progress for so long is ended with exit code 75; 0: never"
    )
    price_per_hour: NotNegative | None = Field(
        description="what this machine costs, to count lost work in money; null: only in GPU seconds"
    )


class ParallelSettings(Section):
    processes: Annotated[Literal["auto"] | int, BeforeValidator(check_number_or_auto)] = Field(
        description="processes that train on this machine; auto: one for each GPU, as far as they share "
        "training.accumulation evenly. Those of torchrun are never more"
    )
    shards: Annotated[Literal["auto"] | int, BeforeValidator(check_number_or_auto)] = Field(
        description="processes that hold one copy of the model together (FSDP); 1: each has all of it; auto: 1 where "
        "that fits, else all processes"
    )
    restarts: Count = Field(description="how often all processes are started again because one was killed")


class ModelSettings(Section):
    path: Text | None = Field(
        description="a model's folder (Hugging Face, Meta's consolidated.pth, ours), a *.gguf or final.pt, its name "
        "under models/ in the work directory or the bucket, or org/name on the Hugging Face hub; null builds a new "
        "model of the shape below"
    )
    tokenizer: Text | None = Field(
        description="folder or name of a tokenizer, as for model.path; null takes the model's own, or the packaged one "
        "for a new model"
    )
    heads: Positive = Field(description="tokens predicted at each position: the trunk's own and heads - 1 more")
    hidden_size: Positive = Field(description="width of the residual stream of a new model")
    intermediate_size: Positive = Field(description="width inside a new model's MLP")
    layers: Positive = Field(description="transformer layers of a new model, head 1 included")
    attention_heads: Positive = Field(description="attention heads of a new model")
    key_value_heads: Positive = Field(description="key and value heads of a new model (grouped-query attention)")
    max_position_embeddings: Positive = Field(description="longest sequence, in tokens, of a new model")
    rope_theta: AboveZero = Field(description="base of a new model's rotary positions")
    tie_embeddings: bool = Field(description="whether a new model's unembedding is its embedding")


class PairsSettings(Section):
    per_problem: Positive = Field(description="most pairs of a correct and an incorrect solution of one problem")
    length_share: Fraction = Field(
        description="largest difference between the lengths of a pair, as a part of the longer one"
    )
    difficulty_bins: list[Annotated[list[float], BeforeValidator(check_difficulty_bin)]] = Field(
        description="[low, high, weight] each: what share of the pairs has which difficulty; empty: as the data has it"
    )


class DataSettings(Section):
    dataset: Text = Field(
        description="the packaged sample; a name under datasets/ in the work directory or the bucket, or org/name on "
        "the hub; a folder with train.jsonl and validation.jsonl, or with folders train and validation, or MBPP's "
        "mbpp.jsonl, itself or its folder"
    )
    format: Literal["auto", "mbpp", "code_contests", "humaneval", "gsm8k", "labelled"] = Field(
        description="format of the files; auto looks at their first record"
    )
    solutions: Literal["correct", "all"] = Field(
        description="which solutions are trained on; all: incorrect ones too, for rewards to tell them apart"
    )
    sequence_length: Annotated[int, Field(ge=2)] = Field(description="tokens in one row of a batch")
    packing: bool = Field(description="whether several samples share one row")
    pairs: PairsSettings


class LoraSettings(Section):
    rank: Count = Field(description="rank of the LoRA adapters on trunk and heads; 0 trains every weight instead")
    alpha: AboveZero = Field(description="their scale is alpha / rank")
    dropout: BelowOne = Field(description="share of an adapter's inputs dropped while training")
    targets: Annotated[list[Text], Field(min_length=1)] = Field(
        description="which linear layers have an adapter, by the last part of their name"
    )


class EarlyStoppingSettings(Section):
    patience: Count = Field(description="validations without improvement before training stops; 0 never stops early")
    min_delta: NotNegative = Field(description="smallest fall of the validation loss that counts, in nats per token")


class TrainingSettings(Section):
    max_steps: Positive = Field(description="optimizer steps of the whole run")
    micro_batch_size: Positive = Field(description="rows in one forward and backward pass")
    accumulation: Positive = Field(description="passes whose gradients make one step")
    lr: AboveZero = Field(description="highest learning rate, reached after the warm-up")
    min_lr_ratio: Fraction = Field(description="learning rate at the end of the cosine, as a part of lr")
    warmup_steps: Count = Field(description="steps in which the learning rate rises from 0 to lr")
    weight_decay: NotNegative = Field(description="AdamW's decay of weight matrices")
    beta1: BelowOne = Field(description="AdamW's decay of the first moment")
    beta2: BelowOne = Field(description="AdamW's decay of the second moment")
    eps: AboveZero = Field(description="AdamW's addend to the denominator")
    grad_clip: NotNegative = Field(description="largest norm of the gradient; 0 does not clip")
    precision: Literal["fp32", "bf16"] = Field(description="fp32, or bf16 autocast over fp32 weights")
    moments: Literal["fp32", "bf16"] = Field(
        description="what AdamW keeps its two moments in; bf16: half of their memory, other numbers"
    )
    label_smoothing: BelowOne = Field(description="share of each label that is spread over the whole vocabulary")
    z_loss: NotNegative = Field(
        description="weight of log²Z, which keeps logits from drifting; PaLM's is 1e-4; 0: left out"
    )
    checkpoint_activations: Literal["none", "full"] = Field(
        description="full: each layer keeps its input alone and runs again in the backward pass; less memory, same bits"
    )
    compile: Literal["none", "layers"] = Field(
        description="layers: decoder layers run as compiled code, made once when the training begins; faster steps"
    )
    early_stopping: EarlyStoppingSettings


class CriticSettings(Section):
    form: Literal["exp", "heads"] = Field(
        description="exp(A / beta) of a token's advantage A, or their softmax over the heads of a position"
    )
    beta: AboveZero = Field(description="temperature: the smaller, the more the advantages tell tokens apart")
    gamma: Fraction = Field(description="discount of what comes one token later")
    lam: Fraction = Field(description="lambda of generalised advantage estimation; 0: the TD error alone")
    whiten: Literal["batch", "ema", "none"] = Field(
        description="by whose mean and deviation advantages are whitened: the step's own, their moving average"
    )
    rewards: Literal["value", "verifiable", "reward_model"] = Field(
        description="reward of a whole solution: the last value itself; 1 or 0 for correct or not; a model's score"
    )
    value: Text | None = Field(
        description="weights of the value model: the name of the run that trained it, its folder, or a *.pt file"
    )
    auxiliary: NotNegative = Field(
        description="coefficient of the value model's loss beside the policy's, with value.trunk_head: it is trained "
        "on, and its gradient flows into the trunk; 0: the value model is frozen"
    )
    reward_model: Text | None = Field(
        description="folder or name of a LlamaForSequenceClassification with one label, as for model.path"
    )


class Rho1Settings(Section):
    temperature: AboveZero = Field(description="of the softmax of rho1_weighted, in nats; large ones are uniform")
    minimum: float = Field(description="excess losses below it, in nats, count as this much in rho1_weighted")
    share: Annotated[float, Field(gt=0, le=1)] = Field(description="part of the tokens that rho1_tokenskip trains on")


class GradientSettings(Section):
    of: Literal["logits", "hidden"] = Field(
        description="by what the loss is differentiated: logits (cheap), or the hidden states before the unembedding"
    )
    outlier: AboveZero = Field(description="deviations above the mean beyond which importance is cut")


class GrpoSettings(Section):
    beta: AboveZero = Field(description="temperature, as for critic.beta")
    clip: AboveZero = Field(description="largest advantage either way, in deviations of the group")
    kl: NotNegative = Field(description="how much of the divergence from the reference an advantage loses; 0: none")


class WeightingSettings(Section):
    family: Literal["uniform", "critic", "rho1_weighted", "rho1_tokenskip", "gradient", "grpo"] = Field(
        description="by what the tokens of a sample are weighted in the loss"
    )
    control: Literal["none", "shuffled", "random_matched"] = Field(
        description="whether the family's weights are shuffled within each sequence, or drawn anew at random"
    )
    normalise: Literal["mean1", "mean1_clip", "none"] = Field(
        description="whether weights are scaled to mean 1; with clip to mean 1 within min and max"
    )
    min: NotNegative = Field(description="smallest weight of mean1_clip, and of exp(A / beta) before it is scaled")
    max: AboveZero = Field(description="largest weight of mean1_clip, and of exp(A / beta) before it is scaled")
    ema_decay: BelowOne = Field(description="decay of moving averages, per step")
    warmup: Count = Field(description="steps in which a step's own statistics stand in for the moving average")
    reference: Text | None = Field(
        description="frozen model that rho1_* and grpo.kl compare the policy with, as for model.path"
    )
    critic: CriticSettings
    rho1: Rho1Settings
    gradient: GradientSettings
    grpo: GrpoSettings

    @property
    def group(self) -> str:
        """The section that the family reads."""
        return "rho1" if self.family.startswith("rho1") else self.family

    @property
    def needs_reference(self) -> bool:
        return self.group == "rho1" or (self.family == "grpo" and self.grpo.kl > 0)

    @property
    def looks_at_losses(self) -> bool:
        """Whether weights follow from what the policy makes of the tokens, and not from what is known before."""
        return self.needs_reference or self.family == "gradient"

    @property
    def weighed_share(self) -> float:
        """The share of tokens that have a weight at all."""
        return self.rho1.share if self.family == "rho1_tokenskip" else 1.0

    @property
    def learns_values(self) -> bool:
        """Whether a value head is trained on beside the policy."""
        return self.family == "critic" and self.critic.auxiliary > 0

    @property
    def needs_reward_model(self) -> bool:
        return self.family == "critic" and self.critic.rewards == "reward_model"


class ValueSettings(Section):
    objective: Literal["pairwise", "lambda_return"] = Field(
        description="what the value model learns: to rank the ends of correct and incorrect solutions (Bradley-Terry), "
        "or the lambda-return of the reward 1 or 0, with weighting.critic.gamma and lam"
    )
    backbone: Text | None = Field(
        description="the Llama that the value model begins as, as for model.path; null: the policy's own"
    )
    hidden: Positive = Field(description="width of the MLP on top of it")
    trunk_head: bool = Field(
        description="whether only that MLP is trained, on the trunk that the policy begins with; the trunk is frozen"
    )
    lora_rank: Count = Field(
        description="rank of the value model's LoRA adapters, the rest of them as in lora; 0 trains every weight"
    )
    max_steps: Positive | None = Field(description="optimizer steps; null: training.max_steps")
    micro_batch_size: Positive | None = Field(
        description="rows in one pass, with pairwise twice: of correct and of incorrect solutions; "
        "null: training.micro_batch_size"
    )
    lr: AboveZero | None = Field(description="highest learning rate; null: training.lr")
    evaluation_every: Count | None = Field(description="steps between validations; null: evaluation.every")
    patience: Count | None = Field(
        description="validations without improvement before training stops; 0: never; null: training.early_stopping's"
    )


class EvaluationSettings(Section):
    every: Count = Field(description="steps between validations; 0 validates only at the end")
    max_batches: Count = Field(description="batches of one validation; 0 takes the whole validation split")


class CheckpointSettings(Section):
    every: Annotated[Literal["auto"] | int, BeforeValidator(check_every)] = Field(
        description="steps between checkpoints; auto: from what a save costs and how often machines are taken away"
    )
    keep_last: Positive = Field(description="checkpoints kept, apart from the best and the final model")
    keep_every: Count = Field(description="checkpoints of steps that are multiples of this are kept for good; 0: none")
    background: bool = Field(
        description="whether a save is written behind the training; false: the training waits until it is on the disk"
    )
    buffers: Annotated[int, Field(ge=1, le=2)] = Field(
        description="copies of a checkpoint held in memory: one that is being written and, with 2, one that waits"
    )
    lease: bool = Field(description="whether a run in the bucket is held by a lease, so that no two workers train it")
    lease_seconds: Annotated[float, Field(ge=3, le=3600)] = Field(
        description="how long a lease lasts that is not renewed: so long a worker that is gone keeps others away"
    )
    lease_wait: NotNegative = Field(
        description="seconds a second worker waits for a holder that is alive, before it ends with exit code 79"
    )
    interruptions_per_day: NotNegative | None = Field(
        description="how often such machines are taken away, for checkpoint.every=auto; null: as observed in this run"
    )


class LoggingSettings(Section):
    level: Literal["debug", "info", "warning", "error"] = Field(description="least important messages shown")
    every: Positive = Field(description="steps between lines of progress")
    format: Literal["text", "json"] = Field(description="lines of the log for people, or one JSON object each")


class TrackingSettings(Section):
    uri: Text | None = Field(
        description="MLflow server (https://…), or a store on this machine (file:… or sqlite:…); null: the record "
        "stays in the work directory and goes to the bucket, for wmtp tracking open"
    )
    experiment: Text | None = Field(description="name of the experiment; null means <experiment_prefix>/<recipe>")
    experiment_prefix: Text | None = Field(description="beginning of the experiment's name; null: none")
    tags: list[str] = Field(description="further tags of the run, each as name=value")
    environment: Text | None = Field(description="the tag env; null: found out, as ec2-container or local")
    model_version: Text | None = Field(description="the tag model_version; null: the model's name and digest")
    best_model: Literal["link", "upload", "move"] = Field(
        description="best_model.pt of a finished run: link says where it is, upload sends it to the server, move also "
        "removes it here"
    )
    system_seconds: NotNegative = Field(description="seconds between measures of the machine's use; 0: none")
    close_seconds: NotNegative = Field(description="seconds to wait at the end of a run for what the server lacks")


class CloudSettings(Section):
    provider: Literal["local", "s3", "gcs", "azure"] = Field(
        description="where runs, models and data sets are kept; local: in the folder cloud.bucket, or nowhere else"
    )
    bucket: Text | None = Field(
        description="bucket (Azure: container; local: a folder); null with local: only the work directory"
    )
    prefix: Annotated[str, BeforeValidator(check_prefix)] = Field(
        description="part of the bucket that is ours, as team/project; null: all of it"
    )
    endpoint_url: Text | None = Field(
        description="address of an S3-compatible or test server, or of the Azure account; null: the provider's own"
    )
    region: Text | None = Field(description="region of an S3 bucket; null: from AWS_REGION or the profile")
    allow_http: bool = Field(description="whether an endpoint that is not this machine may be used without TLS")
    checksum: Literal["auto", "sha256", "md5"] = Field(
        description="how an S3 server checks what arrives; auto tries sha256 and takes md5 from servers that refuse it"
    )
    sse: Literal["AES256", "aws:kms"] | None = Field(
        description="server-side encryption asked for with each S3 object; null: what the bucket does by itself"
    )
    kms_key: Text | None = Field(
        description="key of the server-side encryption: KMS key of S3 or GCS, encryption scope of Azure"
    )
    concurrency: Annotated[int, Field(ge=1, le=256)] = Field(
        description="most requests on their way at once; few are used where the server is near"
    )
    memory: Annotated[int, Field(ge=16, le=65536)] = Field(description="bytes on their way at once, in MB")
    bandwidth: NotNegative = Field(description="cap on what is sent and received, in MB/s; 0: none")
    patience: NotNegative = Field(description="seconds for which a call in transient trouble is tried again")
    logs: bool = Field(
        description="whether logs and report of a run go to the bucket too; false: only what a run needs to go on"
    )
    close_seconds: NotNegative = Field(description="seconds to wait at the end of a run for what is not uploaded yet")


class Settings(Section):
    """All settings of one run. `sources` says, per dotted key, where its value came from."""

    recipe: str = Field(description="short name of the recipe: what is trained")
    preset: str = Field(description="short name of the preset: how large, and on what machine")
    run: RunSettings
    host: HostSettings
    parallel: ParallelSettings
    model: ModelSettings
    lora: LoraSettings
    data: DataSettings
    training: TrainingSettings
    weighting: WeightingSettings
    value: ValueSettings
    evaluation: EvaluationSettings
    checkpoint: CheckpointSettings
    logging: LoggingSettings
    tracking: TrackingSettings
    cloud: CloudSettings

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def sources(self) -> Mapping[str, str]:
        """Dotted key to the file and line, the variable or the option that set it."""
        return self._sources

    def flat(self) -> dict[str, Any]:
        """Dotted key to JSON value, in the order of the tree."""
        return dict(_flatten(self.model_dump(mode="json"), ""))

    @property
    def trains_values(self) -> bool:
        """Whether a value model is to be trained: asked for, or needed and not named."""
        needed = self.weighting.family == "critic" and self.weighting.critic.value is None
        return self.run.stage == "value" or (needed and self.run.stage == "all")

    def identity(self) -> dict[str, Any]:
        """The part of `flat()` that determines the numbers of the training: with run.stage=value, of the value model.

        Where the run lives, what it runs on, how often it saves and what it prints are left out, and so is what has
        no effect. So are the names of models, tokenizer and data set: what they contain is compared by digest,
        wherever it lies.
        """
        counts = self._counts_for_values if self.run.stage == "value" else self._counts
        return {
            key: value
            for key, value in self.flat().items()
            if key == "run.seed"
            or (key.split(".")[0] not in _NOT_IDENTITY_SECTIONS and key not in _NOT_IDENTITY and counts(key))
        }

    def _counts(self, key: str) -> bool:
        """Whether the policy learns otherwise because of it: what other families and new models read has no effect."""
        section, _, rest = key.partition(".")
        if key == "weighting.critic.auxiliary":
            return self.weighting.learns_values
        if section == "weighting" and rest != "family":
            own = rest.split(".")[0] if "." in rest else self.weighting.group
            return self.weighting.family != "uniform" and own == self.weighting.group
        if section == "lora":
            return self.lora.rank > 0
        if section == "value" or key.startswith("data.pairs."):
            return self._counts_for_the_head(key)
        return self.model.path is None or key not in MODEL_SHAPE

    def _counts_for_the_head(self, key: str) -> bool:
        """The same of a value head that is trained beside the policy; the weights it begins with are compared."""
        keys = {"value.objective"}
        if self.weighting.critic.value is None:
            keys.add("value.hidden")
        if self.value.objective == "pairwise":
            keys.add("data.pairs.length_share")
        return self.weighting.learns_values and key in keys

    def _counts_for_values(self, key: str) -> bool:
        """The same of the value model. What `stages.value_run` puts into other sections counts there."""
        section, _, rest = key.partition(".")
        if section == "value":
            return rest in ("objective", "hidden", "trunk_head", "lora_rank")
        if section == "weighting":
            return rest in ("critic.gamma", "critic.lam") and self.value.objective == "lambda_return"
        if section == "lora":
            return self.value.lora_rank > 0 and rest != "rank"
        if section == "model":
            return self.model.path is None and self.value.backbone is None
        return key != "data.solutions"

    def digest(self) -> str:
        """SHA-256, in hex, of `identity()` as canonical JSON."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


_NOT_IDENTITY_SECTIONS = frozenset(
    {"recipe", "preset", "run", "host", "parallel", "checkpoint", "logging", "tracking", "cloud"}
)
_NOT_IDENTITY = frozenset(
    {
        "model.path",
        "model.tokenizer",
        "data.dataset",
        "data.format",
        "training.checkpoint_activations",
        "weighting.reference",
        "weighting.critic.value",
        "weighting.critic.reward_model",
    }
)
# what runs did before these were settings: a checkpoint that does not name them was made so
UNNAMED = {"training.moments": "fp32", "training.compile": "none"}
# what a model built from settings looks like; a model from a folder brings its own
MODEL_SHAPE = tuple(
    f"model.{name}" for name in ModelSettings.model_fields if name not in ("path", "tokenizer", "heads")
)


def _flatten(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _fields(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


# every setting by dotted key, in the order of the tree
FIELDS: Mapping[str, FieldInfo] = dict(_fields(Settings, ""))
# chosen by name before the layers are read, never set by one
CHOSEN = ("recipe", "preset")
SETTABLE: tuple[str, ...] = tuple(key for key in FIELDS if key not in CHOSEN)
SECTIONS = frozenset(key.rsplit(".", depth)[0] for key in SETTABLE for depth in range(1, key.count(".") + 1))
