"""Waveforms -> normalised log-mel spectrograms, computed inside the model.

The kernels are nnAudio's: its windowed Fourier kernels and its mel basis. `conv` applies them as nnAudio does (strided
convolutions, what a GPU likes); `fft` takes the same window and basis through an FFT, which costs a CPU far less. Both
give the same numbers. Power is taken without the square root in between, whose gradient is NaN on silence."""

import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from meamtm.config import MelConfig
from meamtm.errors import ConfigError

LOG_FLOOR = 1e-6
"""Power added before the logarithm: a full-scale 16-bit step has 1e-9, audible sound far more."""


class MelLayer(nn.Module):
    """Computes log-mel spectrograms in float32, whatever autocast says, and brings them to mean 0 and deviation 1.

    The kernels follow from the config, so they are not part of a checkpoint; mean and deviation of the training clips
    are, in nepers of power.
    """

    mean: Tensor
    std: Tensor
    window: Tensor
    basis: Tensor
    kernels: Tensor

    def __init__(self, config: MelConfig) -> None:
        super().__init__()
        self.config = config
        window, basis, kernels = _nnaudio_kernels(config)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("kernels", kernels, persistent=False)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch band frame"]:
        """Gives one frame per hop, centred on it; samples are in -1..1. What is shorter than a window is padded."""
        with torch.autocast(waveform.device.type, enabled=False):
            return (self.log_mel(waveform.float()) - self.mean) / self.std

    def log_mel(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch band frame"]:
        """Gives the logarithm of the mel power, before normalisation."""
        missing = self.config.window_samples - waveform.shape[-1]
        if missing > 0:  # reflection needs more samples than the half transform that it mirrors
            waveform = F.pad(waveform, (0, missing))
        use_fft = self.config.backend == "fft" or (self.config.backend == "auto" and waveform.device.type == "cpu")
        power = self._power_by_fft(waveform) if use_fft else self._power_by_convolution(waveform)
        return torch.log(self.basis @ power + LOG_FLOOR)

    def _power_by_fft(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch bin frame"]:
        config = self.config
        spectrum = torch.stft(
            waveform, config.num_fft, config.hop_samples, window=self.window, center=True, return_complex=True
        )
        return torch.view_as_real(spectrum).square().sum(-1)

    def _power_by_convolution(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch bin frame"]:
        half = self.config.num_fft // 2
        padded = F.pad(waveform.unsqueeze(1), (half, half), mode="reflect")
        parts = F.conv1d(padded, self.kernels, stride=self.config.hop_samples)  # (batch, 2 x bin, frame)
        cosine, sine = parts.chunk(2, dim=1)
        return cosine.square() + sine.square()

    @torch.no_grad()
    def fit(self, mean: float, std: float) -> None:
        """Sets the normalisation, measured on training clips alone."""
        self.mean.fill_(mean)
        self.std.fill_(max(std, 1e-3))  # a set of pure silence has no deviation


def _nnaudio_kernels(config: MelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Makes window (num_fft,), mel basis (band, bin) and Fourier kernels (2 x bin, 1, num_fft) with nnAudio."""
    from nnAudio.features import MelSpectrogram

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Empty filters")  # an error below
        layer = MelSpectrogram(
            sr=config.sample_rate_hz,
            n_fft=config.num_fft,
            win_length=config.window_samples,
            hop_length=config.hop_samples,
            n_mels=config.num_bands,
            fmin=config.fmin_hz,
            fmax=config.top_hz,
            htk=config.kind == "htk",
            verbose=False,
        )
    basis = layer.get_buffer("mel_basis").clone()
    empty = int((basis.amax(dim=1) <= 0).sum())
    if empty:
        raise ConfigError(
            f"mel.num_bands={config.num_bands}: {empty} bands lie between two of the {config.num_fft // 2 + 1} "
            f"frequency bins and would stay empty; lower it, raise mel.fmin_hz or lengthen mel.window_ms"
        )
    cosine, sine = layer.get_buffer("stft.wcos"), layer.get_buffer("stft.wsin")  # (bin, 1, num_fft)
    return cosine[0, 0].clone(), basis, torch.cat((cosine, sine))  # the cosine of frequency 0 is the bare window
