"""Section `mel`: the spectrogram."""

from typing import Any, Literal

from pydantic import Field, model_validator

from meamtm.config.section import Section


class MelConfig(Section):
    """Waveform -> log-mel spectrogram."""

    sample_rate_hz: int = Field(default=16_000, ge=1_000, le=384_000, description="what clips are resampled to, Hz")
    num_bands: int = Field(default=64, ge=8, le=512, description="mel bands")
    window_ms: float = Field(default=32.0, gt=0, le=1_000, description="analysis window, ms")
    hop_ms: float = Field(default=25.0, gt=0, le=1_000, description="from one frame to the next, ms")
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
    def num_bins(self) -> int:
        """Frequencies of the transform, from 0 to half of the sample rate."""
        return self.num_fft // 2 + 1

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
