"""MelConfig -> the three constants of a mel layer: window, mel basis, Fourier kernels.

`slaney` and `htk` take nnAudio's. `kaldi` are those of Kaldi's filter bank (compute-fbank-feats), which the Audio
Spectrogram Transformer hears through. Its removal of each frame's mean, its pre-emphasis and its window are linear in
a frame, so the Fourier kernels contain all three."""

import math
import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from meamtm.config import MelConfig
from meamtm.errors import ConfigError

PRE_EMPHASIS = 0.97
"""How much of a sample Kaldi subtracts from the next one."""


def make_kernels(
    config: MelConfig,
) -> tuple[Float[Tensor, " num_fft"], Float[Tensor, "band bin"], Float[Tensor, "parts 1 sample"]]:
    """Makes window, basis and kernels (cosines of all bins, then sines), in float32; Kaldi's kernels are as short as a
    window."""
    match config.kind:
        case "slaney" | "htk":
            return _nnaudio(config)
        case "kaldi":
            return _kaldi(config)


def _nnaudio(config: MelConfig) -> tuple[Tensor, Tensor, Tensor]:
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
            f"mel.num_bands={config.num_bands}: {empty} bands lie between two of the {config.num_bins} "
            f"frequency bins and would stay empty; lower it, raise mel.fmin_hz or lengthen mel.window_ms"
        )
    cosine, sine = layer.get_buffer("stft.wcos"), layer.get_buffer("stft.wsin")  # (bin, 1, num_fft)
    return cosine[0, 0].clone(), basis, torch.cat((cosine, sine))  # the cosine of frequency 0 is the bare window


def _kaldi(config: MelConfig) -> tuple[Tensor, Tensor, Tensor]:
    num_samples, num_bins = config.window_samples, config.num_bins
    window = torch.hann_window(num_samples, periodic=False, dtype=torch.float64)
    turns = torch.outer(torch.arange(num_bins), torch.arange(num_samples)) % config.num_fft
    angle = 2 * math.pi / config.num_fft * turns.double()  # (bin, sample)
    kernels = torch.cat((angle.cos(), angle.sin())) * window  # (2 x bin, sample); the window begins at 0, so
    kernels[:, :-1] -= PRE_EMPHASIS * kernels[:, 1:]  # what comes before the first sample does not matter
    kernels -= kernels.mean(dim=1, keepdim=True)  # deaf to a constant, which is a frame's mean
    window = F.pad(window, (0, config.num_fft - num_samples))
    return window.float(), _kaldi_basis(config, num_bins).float(), kernels.float().unsqueeze(1)


def _kaldi_basis(config: MelConfig, num_bins: int) -> Float[Tensor, "band bin"]:
    """Makes triangles of height 1 that are straight on the mel scale.

    With AST's 128 bands at 16 kHz some low ones lie between two bins. They stay empty and give the logarithm's floor,
    as they do in the weights that AST publishes; so here this is no error.
    """
    edges = torch.linspace(_mel(config.fmin_hz), _mel(config.top_hz), config.num_bands + 2, dtype=torch.float64)
    bins = [_mel(number * config.sample_rate_hz / config.num_fft) for number in range(num_bins)]
    low, centre, high = (edges[start : start + config.num_bands, None] for start in range(3))  # (band, 1)
    frequency = torch.tensor(bins, dtype=torch.float64)  # (bin,)
    return torch.minimum((frequency - low) / (centre - low), (high - frequency) / (high - centre)).clamp(min=0)


def _mel(frequency_hz: float) -> float:
    return 1127 * math.log1p(frequency_hz / 700)
