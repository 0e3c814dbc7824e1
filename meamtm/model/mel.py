"""Waveforms -> normalised log-mel spectrograms, computed inside the model.

`conv` multiplies by Fourier kernels as nnAudio does (strided convolutions, what a GPU likes); `fft` takes the same
window and basis through an FFT, which costs a CPU far less. Both give the same numbers. Power is taken without the
square root in between, whose gradient is NaN on silence."""

from typing import overload

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from meamtm.config import MelConfig
from meamtm.model.kernels import PRE_EMPHASIS, make_kernels

LOG_FLOOR = 1e-6
"""Power added before the logarithm: a full-scale 16-bit step has 1e-9, audible sound far more."""
KALDI_FLOOR = torch.finfo(torch.float32).eps
"""Least power whose logarithm Kaldi takes."""

BANDS_AT_ONCE = 32
"""Bands that are summed by one matrix product: 128 so take 3 ms instead of 7, and not yet many products."""

SAMPLES_AT_ONCE = 2**20
"""Samples of all frames that a CPU transforms at once: what lies between them and the bands stays in its cache."""


class MelLayer(nn.Module):
    """Computes log-mel spectrograms in float32, whatever autocast says, and brings them to mean 0 and deviation 1.

    Window and kernels follow from the config, so they are not part of a checkpoint; mean and deviation of the training
    clips are, in nepers of power. So is a basis that trains, as its square root: squared it cannot become negative,
    and its zeros, where the square has no slope, stay. `kaldi` divides by two deviations, as AST does.
    """

    mean: Tensor
    std: Tensor
    window: Tensor
    kernels: Tensor
    initial_basis: Tensor
    basis_root: Tensor

    def __init__(self, config: MelConfig) -> None:
        super().__init__()
        self.config = config
        window, basis, kernels = make_kernels(config)
        self.runs = _runs(basis)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("kernels", kernels, persistent=False)
        self.register_buffer("initial_basis", None if config.trainable else basis, persistent=False)
        self.register_parameter("basis_root", nn.Parameter(basis.sqrt()) if config.trainable else None)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    @property
    def basis(self) -> Float[Tensor, "band bin"]:
        """What each band hears of each frequency bin's power."""
        return self.basis_root.square() if self.config.trainable else self.initial_basis

    def forward(
        self, waveform: Float[Tensor, "batch time"], num_samples: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch band frame"]:
        """Gives one frame per hop, of samples in -1..1. What is shorter than a window is padded with silence.

        `num_samples` are the clips' own lengths in a batch padded with zeros: each gets the frames that it would get
        alone, then zeros.
        """
        with torch.autocast(waveform.device.type, enabled=False):
            std = self.std * (2 if self.config.kind == "kaldi" else 1)
            normal = self.log_mel(waveform.float(), num_samples).sub_(self.mean).div_(std)
        if num_samples is None:
            return normal
        frame = torch.arange(normal.shape[-1], device=normal.device)
        beyond = frame >= self.num_frames(num_samples).unsqueeze(1)  # (batch, frame)
        return normal.masked_fill(beyond.unsqueeze(1), 0.0)

    @overload
    def num_frames(self, num_samples: int) -> int: ...

    @overload
    def num_frames(self, num_samples: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]: ...

    def num_frames(self, num_samples: int | Int[Tensor, " batch"]) -> int | Int[Tensor, " batch"]:
        """Counts the frames of clips of so many samples."""
        least = self.config.window_samples
        heard = max(num_samples, least) if isinstance(num_samples, int) else num_samples.clamp(min=least)
        return self.config.num_frames(heard)

    def log_mel(
        self, waveform: Float[Tensor, "batch time"], num_samples: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch band frame"]:
        """Gives the logarithm of the mel power, before normalisation."""
        waveform = self._extended(waveform, num_samples)
        use_fft = self.config.backend == "fft" or (self.config.backend == "auto" and waveform.device.type == "cpu")
        if use_fft:
            num_clips = self._clips_at_once(waveform)
            parts = (waveform,) if num_clips is None else waveform.split(num_clips)
            mel = torch.cat([self._mel(self._power_by_fft(part)) for part in parts])
        else:
            mel = self._mel(self._power_by_convolution(waveform))
        return torch.log(mel.clamp(min=KALDI_FLOOR) if self.config.kind == "kaldi" else mel + LOG_FLOOR)

    def _extended(
        self, waveform: Float[Tensor, "batch time"], num_samples: Int[Tensor, " batch"] | None
    ) -> Float[Tensor, "batch padded"]:
        """Adds what frames hear beyond a clip: silence up to one window, then, around centred frames, its mirror."""
        missing = self.config.window_samples - waveform.shape[-1]
        if missing > 0:
            waveform = F.pad(waveform, (0, missing))
        if not self.config.is_centred:
            return waveform
        half = self.config.num_fft // 2
        extended = F.pad(waveform.unsqueeze(1), (half, half), mode="reflect").squeeze(1)
        if num_samples is None:
            return extended
        end = half - 1 + num_samples.clamp(min=self.config.window_samples).long().unsqueeze(1)  # (batch, 1)
        distance = torch.arange(1, half + 1, device=waveform.device)
        return extended.scatter(1, end + distance, extended.gather(1, end - distance))

    def _clips_at_once(self, waveform: Float[Tensor, "batch padded"]) -> int | None:
        """Counts the clips whose transforms a core's cache holds; None, for all, on other devices and in a graph."""
        if waveform.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        return max(1, SAMPLES_AT_ONCE * self.config.hop_samples // (self.config.num_fft * waveform.shape[-1]))

    def _power_by_fft(self, waveform: Float[Tensor, "batch padded"]) -> Float[Tensor, "batch bin frame"]:
        frames = self._kaldi_frames(waveform) if self.config.kind == "kaldi" else self._frames(waveform)
        spectrum = torch.fft.rfft(frames)  # (batch, frame, bin)
        power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)  # a third of what |.| squared takes
        return power.transpose(1, 2)

    def _frames(self, waveform: Float[Tensor, "batch padded"]) -> Float[Tensor, "batch frame sample"]:
        return waveform.unfold(1, self.config.num_fft, self.config.hop_samples) * self.window

    def _kaldi_frames(self, waveform: Float[Tensor, "batch padded"]) -> Float[Tensor, "batch frame sample"]:
        """Gives frames less their mean, of which pre-emphasis has left little; a frame's first sample has no one
        before it, and meets a window of 0."""
        num_window, num_fft = self.config.window_samples, self.config.num_fft
        mean = waveform.unfold(1, num_window, self.config.hop_samples).mean(dim=2, keepdim=True)  # (batch, frame, 1)
        emphasised = torch.sub(waveform[:, 1:], waveform[:, :-1], alpha=PRE_EMPHASIS)
        frames = self._frames(F.pad(emphasised, (1, num_fft - num_window)))
        return frames.addcmul_(mean, self.window, value=PRE_EMPHASIS - 1)

    def _power_by_convolution(self, waveform: Float[Tensor, "batch padded"]) -> Float[Tensor, "batch bin frame"]:
        parts = F.conv1d(waveform.unsqueeze(1), self.kernels, stride=self.config.hop_samples)  # (batch, 2 x bin, frame)
        cosine, sine = parts.chunk(2, dim=1)
        return cosine.square() + sine.square()

    def _mel(self, power: Float[Tensor, "batch bin frame"]) -> Float[Tensor, "batch band frame"]:
        basis = self.basis
        return torch.cat([basis[bands, bins] @ power[:, bins] for bands, bins in self.runs], dim=1)

    @torch.no_grad()
    def fit(self, mean: float, std: float) -> None:
        """Sets the normalisation, measured on training clips alone."""
        self.mean.fill_(mean)
        self.std.fill_(max(std, 1e-3))  # a set of pure silence has no deviation


def _runs(basis: Float[Tensor, "band bin"]) -> list[tuple[slice, slice]]:
    """Pairs runs of neighbouring bands with the bins that they hear, which are few."""
    runs = []
    for low in range(0, len(basis), BANDS_AT_ONCE):
        bands = slice(low, low + BANDS_AT_ONCE)
        heard = basis[bands].any(dim=0).nonzero().flatten().tolist() or [0]  # Kaldi's may all be empty
        runs.append((bands, slice(heard[0], heard[-1] + 1)))
    return runs
