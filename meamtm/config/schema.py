"""What can be set: one frozen section per room. Every default lives once, with its meaning, unit and range; the larger
sections are in `mel`, `encoder` and `scale`."""

from typing import Literal

from pydantic import Field, model_validator

from meamtm.config.encoder import EncoderConfig
from meamtm.config.mel import MelConfig
from meamtm.config.scale import ScaleConfig
from meamtm.config.section import Folder, Name, Section, Word


class DataConfig(Section):
    """Which clips are used, and how they reach a process."""

    path: Word = Field(
        default="data/synth-packed", description="packed data set: a folder made by `meamtm pack`, or a pyarrow URI"
    )
    clip_s: float = Field(
        default=5.0,
        gt=0,
        le=600,
        description="heard at once, s; of longer clips a random piece trains each time, and windows that cover them "
        "are named; shorter ones are padded",
    )
    test_fold: int | None = Field(
        default=1,
        description="held out for `evaluate` alone; null: every clip may train, but what a split of the "
        "data set's own holds out",
    )
    valid_fold: int | None = Field(
        default=None, description="inner fold for choices (tuning, early stopping); null: its clips train too"
    )
    cache: Literal["arrow", "none"] = Field(
        default="arrow", description="arrow: decode once per node; none: stream, for sets larger than the disk"
    )
    cache_dir: Folder = Field(default="~/.cache/meamtm", description="where a node keeps decoded waveforms")


class AugmentConfig(Section):
    """Changes to training clips only; each is drawn anew for every clip and epoch."""

    roll: float = Field(default=1.0, ge=0, le=1, description="probability of a random circular shift in time")
    gain_db: float = Field(default=6.0, ge=0, le=40, description="gain drawn from +-this, dB")
    speed: float = Field(
        default=0.15, ge=0, le=0.5, description="playing speed drawn from 1 +- this, in steps of 1/32; less: none"
    )
    noise_db: float | None = Field(
        default=None, ge=0, le=80, description="signal over added white noise, dB: from this to 30 dB more; null: none"
    )
    time_mask: float = Field(default=0.1, ge=0, le=0.9, description="widest time mask, fraction of the frames")
    freq_mask: float = Field(default=0.1, ge=0, le=0.9, description="widest frequency mask, fraction of the bands")


class MixConfig(Section):
    """Two clips into one, with both labels."""

    kind: Literal["none", "mixup", "between_class", "timemix", "freqmix"] = Field(
        default="between_class",
        description="between_class adds clips, weighed by loudness (Tokozume 2018), mixup as they are; timemix plays "
        "one in a part of the other's time, freqmix in a band of its frequencies",
    )
    prob: float = Field(default=1.0, ge=0, le=1, description="probability that a batch is mixed")
    until: float = Field(
        default=0.85,
        ge=0,
        le=1,
        description="fraction of train.epochs that mix; the others hear clips alone, as a test does",
    )
    alpha: float = Field(
        default=1.0, ge=0.01, le=20, description="the first clip's share is drawn from Beta(alpha, alpha)"
    )


class LossConfig(Section):
    """Logits and targets -> one number."""

    label_smoothing: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="probability spread over all labels; where clips have several, each is moved so far towards 1/2",
    )


class DistillConfig(Section):
    """What other models teach, beside the labels."""

    teacher: Word = Field(
        default="none",
        description="run folder of a trained model, or a pattern such as runs/esc10-* of which the run with the same "
        "folds is taken: its answers are learnt too (Hinton 2015); none: labels alone",
    )
    ensemble: bool = Field(
        default=False,
        description="learn from all runs that the pattern finds for the same folds, whatever their seed or kind: the "
        "mean of their probabilities",
    )
    weight: float = Field(default=0.5, gt=0, le=1, description="part of the loss that is the teacher's")
    temperature: float = Field(
        default=1.0, gt=0, le=100, description="by which logits are divided first: more shows more of unlikely labels"
    )


class PretrainConfig(Section):
    """What the encoder learns of the training clips before it hears of labels: to guess hidden patches (Xie 2022)."""

    epochs: int = Field(
        default=0,
        ge=0,
        le=100_000,
        description="passes over the training clips, augmented and mixed, before those of train.epochs, with warm-up "
        "and schedule of their own; 0: none",
    )
    hidden: float = Field(default=0.6, gt=0, lt=1, description="fraction of the patches that are hidden and guessed")


class OptimConfig(Section):
    """Gradients -> new weights."""

    name: str = Field(
        default="muon", description="any optimizer that timm knows; published weights want adamw at a small rate"
    )
    lr: float = Field(default=2e-3, gt=0, le=10, description="peak learning rate")
    weight_decay: float = Field(default=0.05, ge=0, le=10, description="not of biases, norms and position embeddings")
    schedule: Literal["cosine", "onecycle", "step", "constant"] = Field(
        default="cosine", description="learning rate after the warm-up"
    )
    warmup: float = Field(
        default=0.05, ge=0, lt=1, description="part of all steps in which the rate climbs; onecycle: at least 0.3"
    )
    final_ratio: float = Field(default=0.01, ge=0, le=1, description="last rate over the peak (cosine, onecycle)")
    step_epochs: int = Field(default=10, ge=1, description="epochs between drops (step)")
    step_gamma: float = Field(default=0.5, gt=0, le=1, description="factor at each drop (step)")
    clip_grad: float = Field(default=1.0, ge=0, description="largest gradient norm; 0: no limit")
    sam_rho: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="radius of sharpness-aware minimisation (Foret 2021), which doubles a step's time; 0: none",
    )
    mel_lr_scale: float = Field(
        default=0.1, gt=0, le=10, description="rate of a trained mel basis over lr: its roots are about 0.1, not 1"
    )


class TrainConfig(Section):
    """How long, how large, how exact."""

    epochs: int = Field(default=60, ge=1, le=100_000, description="passes over the training clips")
    batch_size: int = Field(default=32, ge=1, le=65_536, description="clips per step, over all workers together")
    epoch_batches: int = Field(
        default=8,
        ge=1,
        le=65_536,
        description="batches that an epoch has at least: few clips are passed through several times in one",
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="initial weights, order, augmentation")
    ema_decay: float = Field(
        default=0.99,
        ge=0,
        lt=1,
        description="of the averaged weights that are evaluated and kept, reached slowly: 0.95 after 90 steps, 0.99 "
        "after 1,000, 0.999 after 31,600; 0: no averaging",
    )
    recalibrate: bool = Field(
        default=True,
        description="batch norm's statistics anew, from clips as they are, for weights that are kept: training hears "
        "mixed ones",
    )
    keep: Literal["last", "best"] = Field(
        default="last",
        description="which epoch's weights are kept and tested: the last one's, or those best on data.valid_fold",
    )
    accumulation_steps: int = Field(
        default=1,
        ge=1,
        le=65_536,
        description="parts of a batch, one after the other in memory; gradients add up, batch norm sees a part, which "
        "for encoder.cnn has two clips at least",
    )
    precision: Literal["auto", "float32", "bf16"] = Field(
        default="auto", description="bf16: autocast; auto: where the device computes it natively"
    )
    grad_checkpointing: bool = Field(
        default=False, description="keep only each block's input and compute it again: less memory, a third more time"
    )
    deterministic: bool = Field(
        default=False, description="on a GPU too, the same seed gives the same numbers: slower, as far as torch can"
    )
    checkpoint_s: float = Field(
        default=60.0,
        ge=0,
        description="least seconds between checkpoints, which come at the end of an epoch; 0: after every one",
    )

    @property
    def clips_at_once(self) -> int:
        """Clips of the largest part of a batch, over all workers together."""
        return -(-self.batch_size // self.accumulation_steps)


class TrackingConfig(Section):
    """Who is told."""

    mlflow: bool = Field(default=True, description="log to MLflow besides the run's own metrics.jsonl")
    uri: str | None = Field(default=None, description="MLflow; null: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db here")
    experiment: str = Field(default="meamtm", min_length=1, description="MLflow experiment")


class RunConfig(Section):
    """Everything that a run is. Equal signatures are the same run."""

    name: Name = Field(default="run", description="first part of the run folder's name")
    runs_dir: Folder = Field(default="runs", description="folder of all run folders")
    data: DataConfig = DataConfig()
    mel: MelConfig = MelConfig()
    encoder: EncoderConfig = EncoderConfig()
    augment: AugmentConfig = AugmentConfig()
    mix: MixConfig = MixConfig()
    loss: LossConfig = LossConfig()
    distill: DistillConfig = DistillConfig()
    pretrain: PretrainConfig = PretrainConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    scale: ScaleConfig = ScaleConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def clip_samples(self) -> int:
        """Samples that the model hears at once."""
        return round(self.data.clip_s * self.mel.sample_rate_hz)

    @property
    def num_epochs(self) -> int:
        """Epochs as they are counted, those of pre-training first."""
        return self.pretrain.epochs + self.train.epochs

    @property
    def num_frames(self) -> int:
        """Spectrogram frames of one clip."""
        return self.mel.num_frames(self.clip_samples)

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.clip_samples < self.mel.window_samples:
            raise ValueError(
                f"data.clip_s={self.data.clip_s:g} is shorter than one window (mel.window_ms={self.mel.window_ms:g}); "
                f"lengthen the clip"
            )
        if self.data.test_fold is not None and self.data.test_fold == self.data.valid_fold:
            raise ValueError(
                f"data.valid_fold={self.data.valid_fold} is data.test_fold too, so choices would be made on the test; "
                f"take another fold"
            )
        if self.encoder.pool == "deit" and self.distill.teacher == "none":
            raise ValueError(
                f"encoder.pool={self.encoder.pool} has a head that learns from a teacher alone, and there is none; set "
                f"distill.teacher, or encoder.pool=cls_dist"
            )
        if self.encoder.cnn == "none":
            self._check_patches()
        else:
            self._check_cnn()
        return self

    def _check_cnn(self) -> None:
        cnn, train = self.encoder.cnn, self.train
        if self.pretrain.epochs > 0:
            raise ValueError(
                f"pretrain.epochs={self.pretrain.epochs} is for a transformer, which has patches to guess, and "
                f"encoder.cnn={cnn} takes its place; set pretrain.epochs=0"
            )
        if train.batch_size < 2:
            raise ValueError(
                f"train.batch_size={train.batch_size} is a single clip, and encoder.cnn={cnn} normalises over several; "
                f"raise it"
            )
        if train.grad_checkpointing:
            raise ValueError(
                f"train.grad_checkpointing=true computes layers twice, and batch norms of encoder.cnn={cnn} would "
                f"count clips twice; set it to false and raise train.accumulation_steps"
            )

    def _check_patches(self) -> None:
        size = (self.mel.num_bands, self.num_frames)
        least, key = (2 ** len(self.encoder.stem_channels),) * 2, "encoder.stem_channels"
        if self.encoder.stem != "conv":
            least, key = self.encoder.patch, "encoder.patch"
        if size[0] < least[0] or size[1] < least[1]:
            raise ValueError(
                f"{key} needs at least {least[0]} bands x {least[1]} frames, and a clip gives {size[0]} x {size[1]}; "
                f"raise mel.num_bands or data.clip_s, or shrink {key}"
            )
