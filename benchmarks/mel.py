"""How long a log-mel spectrogram takes, and what memory, against what else there is.

Eight clips of ten seconds at 16 kHz, already in memory (on the GPU where there is one); 128 bands, a hop of 10 ms. All
contenders end at the logarithm. Hugging Face's extractor computes AST's own spectrogram, as `meamtm kaldi` does:
windows of 25 ms in a transform of 512, normalised and cut to the clip's length. Run it from the repository root:

    python benchmarks/mel.py [--processes 5] [--threads 1]
"""

import warnings
from typing import Any

from contest import AbsentError, Contender, Work, contest

RATE_HZ = 16_000
NUM_CLIPS, CLIP_SAMPLES = 8, 10 * RATE_HZ
HOP = RATE_HZ // 100
NUM_BANDS, FMIN_HZ = 128, 40.0
FLOOR = 1e-6


def clips() -> Any:
    """Makes noise of falling loudness, always the same, where torch computes best."""
    import torch

    noise = torch.randn(NUM_CLIPS, CLIP_SAMPLES, generator=torch.Generator().manual_seed(0))
    loudness = torch.logspace(-1, -3, CLIP_SAMPLES)
    return (noise * loudness).to("cuda" if torch.cuda.is_available() else "cpu")


def mel_config(case: dict[str, Any], backend: str = "fft", kind: str = "slaney") -> Any:
    from meamtm.config import MelConfig

    if kind == "kaldi" and case["num_fft"] != 512:
        raise AbsentError("its 25 ms go into a transform of 512")
    window_ms = 25 if kind == "kaldi" else 1_000 * case["num_fft"] / RATE_HZ
    shape = {"num_bands": NUM_BANDS, "window_ms": window_ms, "hop_ms": 10, "fmin_hz": FMIN_HZ}
    return MelConfig.model_validate({"backend": backend, "kind": kind, **shape})


def ours(backend: str, kind: str = "slaney") -> Contender:
    def contender(case: dict[str, Any]) -> Work:
        from meamtm.model.mel import MelLayer

        mel = MelLayer(mel_config(case, backend, kind))
        waveform = clips()
        return timed(mel.to(waveform.device), waveform)

    return contender


def nnaudio(case: dict[str, Any]) -> Work:
    import torch
    from nnAudio.features import MelSpectrogram

    mel = MelSpectrogram(
        sr=RATE_HZ, n_fft=case["num_fft"], n_mels=NUM_BANDS, hop_length=HOP, fmin=FMIN_HZ, verbose=False
    )
    waveform = clips()
    mel = mel.to(waveform.device)
    return timed(lambda waveform: torch.log(mel(waveform) + FLOOR), waveform)


def torch_stft(case: dict[str, Any]) -> Work:
    """What one writes first."""
    import torch

    from meamtm.model.kernels import make_kernels

    waveform = clips()
    window, basis, _ = (part.to(waveform.device) for part in make_kernels(mel_config(case)))

    def log_mel(waveform: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(waveform, case["num_fft"], HOP, window=window, return_complex=True)
        return torch.log(basis @ spectrum.abs().square() + FLOOR)

    return timed(log_mel, waveform)


def torchaudio(case: dict[str, Any]) -> Work:
    import torch
    from torchaudio.transforms import MelSpectrogram  # type: ignore[reportMissingImports]

    settings = {"f_min": FMIN_HZ, "n_mels": NUM_BANDS, "norm": "slaney", "mel_scale": "slaney"}
    mel = MelSpectrogram(RATE_HZ, case["num_fft"], hop_length=HOP, **settings)
    waveform = clips()
    mel = mel.to(waveform.device)
    return timed(lambda waveform: torch.log(mel(waveform) + FLOOR), waveform)


def librosa(case: dict[str, Any]) -> Work:
    import numpy as np
    from librosa.feature import melspectrogram  # type: ignore[reportMissingImports]

    shape = {"sr": RATE_HZ, "n_fft": case["num_fft"], "n_mels": NUM_BANDS, "hop_length": HOP, "fmin": FMIN_HZ}
    return timed(lambda waveform: np.log(melspectrogram(y=waveform, **shape) + FLOOR), clips().cpu().numpy())


def hugging_face(case: dict[str, Any]) -> Work:
    from transformers import ASTFeatureExtractor  # type: ignore[reportMissingImports]

    if case["num_fft"] != 512:
        raise AbsentError("its 25 ms go into a transform of 512")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extractor = ASTFeatureExtractor(num_mel_bins=NUM_BANDS, max_length=1 + (CLIP_SAMPLES - 400) // HOP)
    waveforms = list(clips().cpu().numpy())
    return timed(lambda waveforms: extractor(waveforms, sampling_rate=RATE_HZ, return_tensors="pt"), waveforms)


def timed(function: Any, waveform: Any) -> Work:
    """Makes a spectrogram without gradients, and drops it."""
    import torch

    def work() -> None:
        with torch.no_grad():
            function(waveform)

    return work


CONTENDERS = {
    "meamtm fft": ours("fft"),
    "meamtm conv": ours("conv"),
    "meamtm kaldi fft": ours("fft", "kaldi"),
    "meamtm kaldi conv": ours("conv", "kaldi"),
    "nnAudio": nnaudio,
    "torch.stft": torch_stft,
    "torchaudio": torchaudio,
    "librosa": librosa,
    "Hugging Face AST": hugging_face,
}
CASES = {f"num_fft {num_fft}": {"num_fft": num_fft} for num_fft in (512, 1_024)}

if __name__ == "__main__":
    contest(__file__, CONTENDERS, CASES, reference="meamtm fft")
