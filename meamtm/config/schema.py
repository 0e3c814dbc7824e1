"""What can be set: one frozen section per room. Every default lives here, once, with its meaning, unit and range."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """Frozen settings that refuse unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(Section):
    """Which clips are used, and how they reach a process."""

    path: str = Field(
        default="data/synth-packed", description="packed data set: a folder made by `meamtm pack`, or a pyarrow URI"
    )
    clip_s: float = Field(
        default=5.0, gt=0, le=600, description="heard at once, s; longer clips are cropped, shorter padded"
    )
    test_fold: int | None = Field(default=1, description="held out for `evaluate` alone; null: every clip may train")
    valid_fold: int | None = Field(
        default=None, description="inner fold for choices (tuning, early stopping); null: its clips train too"
    )
    cache: Literal["arrow", "none"] = Field(
        default="arrow", description="arrow: decode once per node; none: stream, for sets larger than the disk"
    )
    cache_dir: str = Field(default="~/.cache/meamtm", description="where a node keeps decoded waveforms")


class MelConfig(Section):
    """Waveform -> log-mel spectrogram."""

    sample_rate_hz: int = Field(default=16_000, ge=1_000, le=384_000, description="what clips are resampled to, Hz")
    num_bands: int = Field(default=64, ge=8, le=512, description="mel bands")
    window_ms: float = Field(default=32.0, gt=0, le=1_000, description="analysis window, ms")
    hop_ms: float = Field(default=20.0, gt=0, le=1_000, description="from one frame to the next, ms")
    fmin_hz: float = Field(default=40.0, ge=0, description="lower edge of the lowest band, Hz")
    fmax_hz: float | None = Field(default=None, gt=0, description="upper edge of the highest band, Hz; null: Nyquist")
    kind: Literal["slaney", "htk", "kaldi"] = Field(
        default="slaney",
        description="mel scale; kaldi: as AST, which has 128 bands, 25 ms, 10 ms and fmin_hz 20 at 16 kHz",
    )
    trainable: bool = Field(default=False, description="train the mel basis too, from this one on")
    backend: Literal["auto", "conv", "fft"] = Field(
        default="auto", description="conv: nnAudio's kernels; fft: the same result by FFT; auto: fft on a CPU"
    )

    @property
    def window_samples(self) -> int:
        """Analysis window, samples."""
        return round(self.window_ms * self.sample_rate_hz / 1_000)

    @property
    def hop_samples(self) -> int:
        """From one frame to the next, samples."""
        return round(self.hop_ms * self.sample_rate_hz / 1_000)

    @property
    def num_fft(self) -> int:
        """Transform length: the next power of two that holds a window, samples."""
        return 1 << (self.window_samples - 1).bit_length()

    @property
    def top_hz(self) -> float:
        """Upper edge of the highest band, Hz."""
        return self.fmax_hz if self.fmax_hz is not None else self.sample_rate_hz / 2

    @property
    def is_centred(self) -> bool:
        """Whether frame n is centred on sample n x hop; if not, it begins there and no frame passes a clip's end."""
        return self.kind != "kaldi"

    def num_frames(self, num_samples: Any) -> Any:
        """Counts the frames of one window or more, given as an int or a tensor of ints."""
        return 1 + (num_samples - (0 if self.is_centred else self.window_samples)) // self.hop_samples

    @model_validator(mode="after")
    def _check(self) -> "MelConfig":
        nyquist_hz = self.sample_rate_hz / 2
        if self.top_hz > nyquist_hz:
            raise ValueError(
                f"mel.fmax_hz={self.top_hz:g} exceeds Nyquist ({nyquist_hz:g} Hz); lower it or raise mel.sample_rate_hz"
            )
        if self.fmin_hz >= self.top_hz:
            raise ValueError(
                f"mel.fmin_hz={self.fmin_hz:g} is not below the highest band's edge ({self.top_hz:g} Hz); lower it"
            )
        if self.window_samples < 64:
            raise ValueError(
                f"mel.window_ms={self.window_ms:g} is {self.window_samples} samples at {self.sample_rate_hz} Hz, "
                f"fewer than 64; lengthen it"
            )
        if self.hop_samples < 1:
            raise ValueError(
                f"mel.hop_ms={self.hop_ms:g} is less than one sample at {self.sample_rate_hz} Hz; lengthen it"
            )
        if self.hop_ms > self.window_ms:
            raise ValueError(
                f"mel.hop_ms={self.hop_ms:g} exceeds mel.window_ms={self.window_ms:g}, so samples would go unheard; "
                f"shorten the hop"
            )
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "ast_base": {
        "stem": "patch",
        "patch": (16, 16),
        "stride": (10, 10),
        "heads": 12,
        "head_dim": 64,
        "depth": 12,
        "mlp_ratio": 4.0,
        "pool": "cls_dist",
        "positions": "joint",
    }
}
"""Architectures that have a name, and what it fixes."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
"""Of files that hold weights."""
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""What such a file is called in a folder that Hugging Face's libraries wrote."""


class EncoderConfig(Section):
    """Log-mel spectrogram -> logits."""

    preset: Literal["none", "ast_base"] = Field(
        default="none", description="ast_base: stem, size and pool of the Audio Spectrogram Transformer (Gong 2021)"
    )
    pretrained: str = Field(
        default="none",
        min_length=1,
        description="weights to begin with: timm's name of a ViT or DeiT, or a file or folder of one, or of an AST",
    )
    stem: Literal["conv", "patch"] = Field(
        default="conv", description="conv: stages of two 3x3 convolutions and a pooling; patch: a linear map"
    )
    stem_channels: tuple[int, ...] = Field(
        default=(32, 64, 128, 256), min_length=1, max_length=6, description="channels of each convolutional stage"
    )
    stem_activation: Literal["relu", "gelu", "silu"] = Field(
        default="relu", description="of the convolutional stem; the smooth ones cost more on a CPU"
    )
    patch: tuple[int, int] = Field(default=(16, 16), description="patch size of the patch stem: bands, frames")
    stride: tuple[int, int] = Field(
        default=(16, 16), description="from one patch to the next: bands, frames; less than the patch overlaps"
    )
    heads: int = Field(default=4, ge=1, le=64, description="attention heads")
    head_dim: int = Field(default=64, ge=4, le=256, description="width of one head; a token has heads x head_dim")
    depth: int = Field(default=2, ge=1, le=48, description="transformer blocks")
    mlp_ratio: float = Field(default=2.0, gt=0, le=8, description="hidden width of a block's MLP over a token's")
    pool: Literal["mean", "cls", "cls_dist", "attention"] = Field(
        default="mean", description="how tokens become one vector; cls_dist: mean of two tokens of their own, as AST"
    )
    positions: Literal["joint", "separate"] = Field(
        default="joint", description="a learned vector for each patch, or one for its row plus one for its column"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout before the head")
    drop_path: float = Field(
        default=0.1, ge=0, lt=1, description="stochastic depth, growing up to this in the last block"
    )
    patchout: float = Field(default=0.0, ge=0, lt=1, description="fraction of patches left out of each training step")
    patchout_time: float = Field(default=0.0, ge=0, lt=1, description="fraction of columns left out, before patchout")
    patchout_freq: float = Field(default=0.0, ge=0, lt=1, description="fraction of rows left out, before patchout")

    @property
    def width(self) -> int:
        """Width of a token: heads x head_dim."""
        return self.heads * self.head_dim

    @property
    def pretrained_path(self) -> Path | None:
        """File or folder of the weights to begin with; None where there are none, or timm's."""
        is_path = "/" in self.pretrained or self.pretrained.endswith(WEIGHT_SUFFIXES)
        return Path(self.pretrained) if is_path else None

    @model_validator(mode="before")
    @classmethod
    def _width_is_heads_times_head_dim(cls, given: Any) -> Any:
        """Accepts `width` as a claim to be checked; it is never stored, since two other keys make it."""
        if not isinstance(given, Mapping) or "width" not in given:
            return given
        heads, head_dim = (given.get(key, cls.model_fields[key].default) for key in ("heads", "head_dim"))
        if given["width"] != heads * head_dim:
            raise ValueError(
                f"encoder.width={given['width']} is not encoder.heads x encoder.head_dim "
                f"({heads} x {head_dim} = {heads * head_dim}); leave encoder.width out and set those two"
            )
        return {key: value for key, value in given.items() if key != "width"}

    @model_validator(mode="before")
    @classmethod
    def _preset_fixes_its_keys(cls, given: Any) -> Any:
        """Fills in what a preset fixes; a key that says otherwise, and is not the default, contradicts it.

        pydantic runs what is defined last first, so a claimed `width` is checked against the preset's.
        """
        preset = given.get("preset", "none") if isinstance(given, Mapping) else "none"
        if not isinstance(preset, str) or preset not in PRESETS:
            return given
        for key, value in PRESETS[preset].items():
            default = cls.model_fields[key].default
            found = tuple(given[key]) if isinstance(given.get(key), list) else given.get(key, value)
            if found not in (value, default):
                shown = list(value) if isinstance(value, tuple) else value
                raise ValueError(
                    f"encoder.{key}={given[key]} contradicts encoder.preset={preset}, which has {shown}; "
                    f"leave one of them out"
                )
        return {**given, **PRESETS[preset]}

    @model_validator(mode="after")
    def _check(self) -> "EncoderConfig":
        for axis, patch, stride in zip(("bands", "frames"), self.patch, self.stride, strict=True):
            if patch < 1 or not 1 <= stride <= patch:
                raise ValueError(
                    f"encoder.stride={list(self.stride)} must lie in 1..patch ({list(self.patch)}) along {axis}; "
                    f"a larger stride skips {axis}"
                )
        if min(self.stem_channels) < 8 or max(self.stem_channels) > 4096:
            raise ValueError(
                f"encoder.stem_channels={list(self.stem_channels)} must each lie in 8..4096; correct those outside"
            )
        return self


class AugmentConfig(Section):
    """Changes to training clips only; each is drawn anew for every clip and epoch."""

    roll: float = Field(default=1.0, ge=0, le=1, description="probability of a random circular shift in time")
    gain_db: float = Field(default=6.0, ge=0, le=40, description="gain drawn from +-this, dB")
    speed: float = Field(default=0.15, ge=0, le=0.5, description="playing speed drawn from 1 +- this, in steps of 1/32")
    noise_db: float | None = Field(
        default=None, ge=0, le=80, description="signal over added white noise, dB: from this to 30 dB more; null: none"
    )
    time_mask: float = Field(default=0.1, ge=0, le=0.9, description="widest time mask, fraction of the frames")
    freq_mask: float = Field(default=0.1, ge=0, le=0.9, description="widest frequency mask, fraction of the bands")


class MixConfig(Section):
    """Two clips into one, with both labels."""

    kind: Literal["none", "mixup", "between_class"] = Field(
        default="between_class", description="between_class weighs by loudness (Tokozume 2018); mixup does not"
    )
    prob: float = Field(default=1.0, ge=0, le=1, description="probability that a batch is mixed")
    alpha: float = Field(
        default=1.0, gt=0, le=20, description="the first clip's share is drawn from Beta(alpha, alpha)"
    )


class LossConfig(Section):
    """Logits and targets -> one number."""

    label_smoothing: float = Field(default=0.1, ge=0, lt=1, description="probability spread over all labels")


class OptimConfig(Section):
    """Gradients -> new weights."""

    name: str = Field(default="adamw", description="any optimizer that timm knows")
    lr: float = Field(default=1e-3, gt=0, le=10, description="peak learning rate")
    weight_decay: float = Field(default=0.05, ge=0, le=10, description="not of biases, norms and position embeddings")
    schedule: Literal["cosine", "onecycle", "step", "constant"] = Field(
        default="cosine", description="learning rate after the warm-up"
    )
    warmup: float = Field(default=0.05, ge=0, lt=1, description="fraction of all steps in which the rate climbs")
    final_ratio: float = Field(default=0.01, ge=0, le=1, description="last rate over the peak (cosine, onecycle)")
    step_epochs: int = Field(default=10, ge=1, description="epochs between drops (step)")
    step_gamma: float = Field(default=0.5, gt=0, le=1, description="factor at each drop (step)")
    clip_grad: float = Field(default=1.0, ge=0, description="largest gradient norm; 0: no limit")
    mel_lr_scale: float = Field(
        default=0.1, gt=0, le=10, description="rate of a trained mel basis over lr: its roots are about 0.1, not 1"
    )


class TrainConfig(Section):
    """How long, how large, how exact."""

    epochs: int = Field(default=100, ge=1, le=100_000, description="passes over the training clips")
    batch_size: int = Field(default=32, ge=1, le=65_536, description="clips per step, over all workers together")
    seed: int = Field(default=0, ge=0, lt=2**31, description="initial weights, order, augmentation")
    ema_decay: float = Field(
        default=0.99, ge=0, lt=1, description="of the averaged weights that are evaluated and kept; 0: no averaging"
    )
    precision: Literal["auto", "float32", "bf16"] = Field(
        default="auto", description="bf16: autocast; auto: where the device computes it natively"
    )
    grad_checkpointing: bool = Field(
        default=False, description="keep only each block's input and compute it again: less memory, a third more time"
    )
    checkpoint_s: float = Field(default=60.0, ge=0, description="seconds between checkpoints; 0: after every epoch")


class ScaleConfig(Section):
    """Where a run happens. Nothing here changes its result's identity."""

    workers: int = Field(default=0, ge=0, le=4096, description="Ray Train workers; 0: this process")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: CUDA where there is a device")
    cpus_per_worker: float = Field(default=1.0, gt=0, description="CPUs that Ray reserves for a worker or a trial")
    gpus_per_worker: float = Field(default=1.0, gt=0, description="GPUs that Ray reserves for one, on CUDA")
    max_failures: int = Field(default=1, ge=-1, description="restarts of a failed Ray Train run; -1: no limit")
    threads: int | None = Field(default=None, ge=1, description="threads of a process; null: one per core it may use")
    address: str | None = Field(default=None, description="Ray cluster; null: RAY_ADDRESS, or one started here")


class TrackingConfig(Section):
    """Who is told."""

    mlflow: bool = Field(default=True, description="log to MLflow besides the run's own metrics.jsonl")
    uri: str | None = Field(default=None, description="MLflow; null: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db here")
    experiment: str = Field(default="meamtm", min_length=1, description="MLflow experiment")


class RunConfig(Section):
    """Everything that a run is. Equal signatures are the same run."""

    name: str = Field(
        default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="first part of the run folder's name"
    )
    runs_dir: str = Field(default="runs", description="folder of all run folders")
    data: DataConfig = DataConfig()
    mel: MelConfig = MelConfig()
    encoder: EncoderConfig = EncoderConfig()
    augment: AugmentConfig = AugmentConfig()
    mix: MixConfig = MixConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    scale: ScaleConfig = ScaleConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("name", "runs_dir", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @property
    def clip_samples(self) -> int:
        """Samples that the model hears at once."""
        return round(self.data.clip_s * self.mel.sample_rate_hz)

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
        size = (self.mel.num_bands, self.num_frames)
        least = self.encoder.patch if self.encoder.stem == "patch" else (2 ** len(self.encoder.stem_channels),) * 2
        key = "encoder.patch" if self.encoder.stem == "patch" else "encoder.stem_channels"
        if size[0] < least[0] or size[1] < least[1]:
            raise ValueError(
                f"{key} needs at least {least[0]} bands x {least[1]} frames, and a clip gives {size[0]} x {size[1]}; "
                f"raise mel.num_bands or data.clip_s, or shrink {key}"
            )
        return self
