"""The log-mel layer is nnAudio's or Kaldi's, and holds on silence, on scraps, under autocast, gain and training."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnAudio.features import MelSpectrogram
from tiny import Record, local, tiny
from torch import Tensor

from meamtm.config import MelConfig, from_flat, run_folder
from meamtm.data.audio import read_audio
from meamtm.errors import ConfigError
from meamtm.model.mel import KALDI_FLOOR, LOG_FLOOR, MelLayer
from meamtm.training.checkpoint import load_model, load_state, newest
from meamtm.training.context import Stopped
from meamtm.training.train import train

BACKENDS = ("conv", "fft")
KINDS = ("slaney", "htk", "kaldi")
AST = {"kind": "kaldi", "num_bands": 128, "window_ms": 25, "hop_ms": 10, "fmin_hz": 20}
AST_NORMAL = (-4.2677393, 4.5689974)
"""Mean and deviation that the Audio Spectrogram Transformer was trained with."""


def layer(**changes: object) -> MelLayer:
    return MelLayer(MelConfig.model_validate(changes))


def noise(num_clips: int = 2, num_samples: int = 8_000, rms: float = 0.1) -> Tensor:
    return rms * torch.randn(num_clips, num_samples, generator=torch.Generator().manual_seed(0))


def sine(frequency_hz: float, num_samples: int = 8_000, sample_rate_hz: int = 16_000) -> Tensor:
    return torch.sin(2 * torch.pi * frequency_hz * torch.arange(num_samples) / sample_rate_hz)[None]


@pytest.fixture(scope="module")
def recordings(esc10: Path) -> Tensor:
    """Ten real recordings of five seconds, one of each kind."""
    files = {path.stem.rpartition("-")[2]: path for path in sorted((esc10 / "audio").glob("*"))}
    waveforms = [read_audio(path, 16_000)[0][:80_000] for path in files.values()]
    return torch.from_numpy(np.stack(waveforms)).float() / 32_768


@pytest.mark.parametrize("kind", ["slaney", "htk"])
def test_it_gives_the_logarithm_of_nnaudios_own_layer(kind: str) -> None:
    config = MelConfig.model_validate({"kind": kind, "backend": "conv", "hop_ms": 20, "fmax_hz": 7_000})
    original = MelSpectrogram(
        sr=16_000,
        n_fft=512,
        win_length=512,
        hop_length=320,
        n_mels=64,
        fmin=40,
        fmax=7_000,
        htk=kind == "htk",
        power=2.0,
        verbose=False,
    )
    waveform = torch.cat((noise(), sine(440), sine(3_000) / 100))
    expected = torch.log(original(waveform) + LOG_FLOOR)
    torch.testing.assert_close(MelLayer(config).log_mel(waveform), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("window_ms", [25, 32, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_backends_agree_on_noise(kind: str, window_ms: float) -> None:
    conv, fft = (layer(kind=kind, window_ms=window_ms, num_bands=40, backend=backend) for backend in BACKENDS)
    torch.testing.assert_close(conv(noise()), fft(noise()), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["slaney", "htk"])
def test_backends_agree_on_real_recordings(recordings: Tensor, kind: str) -> None:
    conv, fft = (layer(kind=kind, backend=backend) for backend in BACKENDS)
    assert recordings.shape == (10, 80_000)
    torch.testing.assert_close(conv(recordings), fft(recordings), atol=1e-3, rtol=0)


def test_kaldi_backends_agree_on_real_recordings_up_to_float32(recordings: Tensor) -> None:
    """Kaldi's floor is so low that a band next to it can lie 98 dB below the loudest one of its frame. There float32
    errs by 4e-3 in an FFT and 1e-3 in a product (against float64, in 50 clips): in one cell of 100,000, and by less
    than 1e-3 in what the encoder is given."""
    conv, fft = (layer(**AST, backend=backend) for backend in BACKENDS)
    difference = (conv.log_mel(recordings) - fft.log_mel(recordings)).abs()
    assert difference.mean() < 1e-5
    assert (difference > 1e-3).float().mean() < 1e-4
    for mel in (conv, fft):
        mel.fit(*AST_NORMAL)
    torch.testing.assert_close(conv(recordings), fft(recordings), atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def ast() -> Any:
    """Hugging Face's front end of the Audio Spectrogram Transformer, on NumPy, for clips of five seconds."""
    from transformers import ASTFeatureExtractor

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "At least one mel filter has all zero values")  # AST's own has some
        extractor = ASTFeatureExtractor(max_length=498)
    assert (extractor.mean, extractor.std) == AST_NORMAL
    return extractor


def ast_difference(ast: Any, waveforms: Tensor, backend: str) -> Tensor:
    """How far our spectrograms are from AST's, cell by cell, in normalised units."""
    mel = layer(**AST, backend=backend)
    mel.fit(*AST_NORMAL)
    expected = ast(list(waveforms.numpy()), sampling_rate=16_000, return_tensors="pt")["input_values"].transpose(1, 2)
    assert expected.shape == (len(waveforms), 128, 498)
    return (mel(waveforms) - expected).abs()


@pytest.mark.parametrize("backend", BACKENDS)
def test_kaldi_is_what_ast_hears_of_noise(ast: Any, backend: str) -> None:
    waveforms = torch.cat((noise(num_samples=80_000), sine(440, 80_000), sine(3_000, 80_000) / 100 + 0.3))
    assert ast_difference(ast, waveforms, backend).max() <= 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_kaldi_is_what_ast_hears_of_real_recordings(recordings: Tensor, ast: Any, backend: str) -> None:
    difference = ast_difference(ast, recordings, backend)
    assert difference.mean() <= 1e-4, (difference.mean(), difference.max())
    assert difference.max() <= 1e-2, (difference.mean(), difference.max())


def test_kaldi_is_deaf_to_a_constant_and_asts_empty_bands_give_the_floor() -> None:
    mel = layer(**AST)
    torch.testing.assert_close(mel(noise()), mel(noise() + 0.25), atol=2e-3, rtol=0)
    empty = mel.basis.sum(1) == 0
    assert 0 < empty.sum() < 16
    assert (mel.log_mel(noise())[:, empty] == float(np.log(KALDI_FLOOR))).all()


def test_auto_is_fft_on_a_cpu() -> None:
    assert torch.equal(layer(backend="auto")(noise()), layer(backend="fft")(noise()))


@given(gain_db=st.floats(-20, 20), seed=st.integers(0, 1_000))
@settings(max_examples=30, deadline=None)
def test_gain_shifts_the_log_mel_by_a_constant(gain_db: float, seed: int) -> None:
    waveform = 0.1 * torch.randn(1, 4_000, generator=torch.Generator().manual_seed(seed))
    quiet, loud = MEL.log_mel(waveform), MEL.log_mel(waveform * 10 ** (gain_db / 20))
    heard = torch.minimum(quiet, loud) > np.log(1_000 * LOG_FLOOR)  # where the floor adds at most a thousandth
    assert heard.any()
    shift = (loud - quiet)[heard]
    torch.testing.assert_close(shift, torch.full_like(shift, gain_db / 10 * np.log(10)), atol=2e-3, rtol=0)


MEL = layer()


def test_a_tone_is_loudest_in_its_band() -> None:
    """Slaney's scale is linear below 1 kHz, at 200/3 Hz per mel, and logarithmic above."""
    mel = layer(num_bands=32, fmin_hz=0, fmax_hz=8_000)
    loudest = [int(mel(sine(frequency_hz)).mean(2).argmax()) for frequency_hz in (200, 500, 1_000, 2_000, 4_000, 7_000)]
    top_mel = 15 + 27 * np.log(8) / np.log(6.4)
    centre_hz = np.arange(1, 33) * top_mel / 33 * 200 / 3  # (band,): right below 1 kHz
    assert loudest[:2] == [np.abs(centre_hz - 200).argmin(), np.abs(centre_hz - 500).argmin()]
    assert loudest == sorted(set(loudest))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_silence_gives_finite_numbers_and_finite_gradients(backend: str, kind: str) -> None:
    waveform = torch.zeros(1, 4_000, requires_grad=True)
    log_mel = layer(backend=backend, kind=kind).log_mel(waveform)
    floor = KALDI_FLOOR if kind == "kaldi" else LOG_FLOOR
    torch.testing.assert_close(log_mel, torch.full_like(log_mel, float(np.log(floor))))
    log_mel.sum().backward()
    assert waveform.grad is not None
    assert waveform.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_noise_gives_gradients_that_are_not_zero(kind: str) -> None:
    waveform = noise().requires_grad_()
    layer(kind=kind)(waveform).sum().backward()
    assert waveform.grad is not None
    assert waveform.grad.abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_samples", [1, 100, 255, 256, 257, 511, 512, 513])
def test_what_is_shorter_than_a_window_is_padded_with_silence(backend: str, num_samples: int) -> None:
    mel = layer(backend=backend)
    scrap = noise(num_samples=num_samples)
    padded = torch.nn.functional.pad(scrap, (0, max(0, 512 - num_samples)))
    assert mel(scrap).shape == (2, 64, 1 + max(512, num_samples) // 400)
    assert torch.equal(mel(scrap), mel(padded))


@given(
    clip_s=st.floats(0.1, 1.0),
    window_ms=st.floats(10, 50),
    hop_ms=st.floats(5, 10),
    sample_rate_hz=st.sampled_from([8_000, 11_025, 16_000, 22_050]),
    kind=st.sampled_from(KINDS),
    backend=st.sampled_from(BACKENDS),
)
@settings(max_examples=40, deadline=None)
def test_frames_are_as_many_as_the_config_says(
    *, clip_s: float, window_ms: float, hop_ms: float, sample_rate_hz: int, kind: str, backend: str
) -> None:
    shape = {"window_ms": window_ms, "hop_ms": hop_ms, "sample_rate_hz": sample_rate_hz, "num_bands": 8}
    changes = {**shape, "kind": kind, "backend": backend}
    config = from_flat(
        {"data.clip_s": clip_s, "encoder.stem_channels": [8], **{f"mel.{key}": value for key, value in changes.items()}}
    )
    mel = MelLayer(config.mel)
    assert mel(noise(1, config.clip_samples)).shape == (1, 8, config.num_frames)
    assert mel.num_frames(config.clip_samples) == config.num_frames
    lengths = torch.tensor([config.clip_samples, 1])
    assert mel.num_frames(lengths).tolist() == [config.num_frames, mel(noise(1, 1)).shape[2]]


@given(
    lengths=st.lists(st.integers(1, 4_000), min_size=1, max_size=4),
    window_ms=st.sampled_from([20, 25, 32]),
    kind=st.sampled_from(KINDS),
    backend=st.sampled_from(BACKENDS),
)
@settings(max_examples=60, deadline=None)
def test_a_clip_in_a_padded_batch_is_what_it_is_alone(
    lengths: list[int], window_ms: float, kind: str, backend: str
) -> None:
    mel = layer(kind=kind, backend=backend, window_ms=window_ms, hop_ms=20, num_bands=32)
    mel.fit(-6.0, 2.0)
    clips = [noise(1, length)[0] for length in lengths]
    batch = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    together = mel(batch, torch.tensor(lengths))
    for clip, found, num_frames in zip(clips, together, mel.num_frames(torch.tensor(lengths)).tolist(), strict=True):
        torch.testing.assert_close(found[:, :num_frames], mel(clip[None])[0], atol=1e-5, rtol=0)
        assert (found[:, num_frames:] == 0).all()


def test_without_its_length_a_clips_end_is_heard_otherwise() -> None:
    """So the test above can fail: the last frames reach into the padding."""
    mel, clip = layer(hop_ms=20), noise(1, 3_200)
    padded = torch.nn.functional.pad(clip, (0, 800))
    assert (mel(padded)[:, :, :11] - mel(clip)).abs().max() > 0.1


def test_autocast_leaves_it_in_float32() -> None:
    mel = layer(backend="conv")
    expected = mel(noise())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mel(noise())
        assert torch.matmul(noise(), noise().T).dtype == torch.bfloat16  # so autocast is really on
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_only_mean_and_deviation_are_part_of_a_checkpoint_and_a_basis_that_trains(kind: str) -> None:
    assert set(layer(kind=kind).state_dict()) == {"mean", "std"}
    assert [name for name, _ in layer(kind=kind).named_parameters()] == []
    assert set(layer(kind=kind, trainable=True).state_dict()) == {"mean", "std", "basis_root"}
    assert [name for name, _ in layer(kind=kind, trainable=True).named_parameters()] == ["basis_root"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_untrained_basis_is_the_fixed_one(kind: str, backend: str) -> None:
    fixed, trainable = (layer(kind=kind, backend=backend, trainable=trains) for trains in (False, True))
    torch.testing.assert_close(trainable(noise()), fixed(noise()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_go_no_further_back_than_what_trains(kind: str, backend: str) -> None:
    assert layer(kind=kind, backend=backend)(noise()).grad_fn is None
    mel = layer(kind=kind, backend=backend, trainable=True)
    log_mel = mel(noise())
    assert graph(log_mel.grad_fn).isdisjoint({"ConvolutionBackward0", "FftR2CBackward0", "UnfoldBackward0"})
    heard = mel(noise().requires_grad_())
    assert graph(heard.grad_fn) & {"ConvolutionBackward0", "FftR2CBackward0"}  # so the names are right
    log_mel.sum().backward()
    assert mel.basis_root.grad is not None
    assert (mel.basis_root.grad[mel.basis == 0] == 0).all()
    assert mel.basis_root.grad.abs().max() > 0


def graph(node: Any) -> set[str]:
    """The kinds of operations that a backward pass runs through."""
    return {node.name()}.union(*(graph(parent) for parent, _ in node.next_functions if parent is not None))


@pytest.mark.parametrize("kind", KINDS)
def test_a_basis_that_trains_moves_and_stays_a_basis(packed: Path, cache_dir: Path, tmp_path: Path, kind: str) -> None:
    """200 steps; then it comes back from the checkpoint, averaged like every other weight."""
    changes = {"mel.trainable": True, "mel.kind": kind, "optim.lr": 1e-3, "train.epochs": 50, "train.checkpoint_s": 60}
    config = tiny(packed, cache_dir, tmp_path, changes)
    record = Record()
    train(config, local(config, record))
    losses = record.column("train/loss")
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    folder = newest(run_folder(config))
    state = load_state(folder)
    assert {float(moments["step"]) for moments in state["optimizer"]["state"].values()} == {200}
    trained, saved, initial = state["model"]["mel.basis_root"], load_model(folder).model.mel, MelLayer(config.mel)
    assert torch.equal(saved.basis_root, state["ema"]["mel.basis_root"])
    assert not torch.equal(saved.basis_root, trained)
    assert torch.equal(saved(noise()), load_model(folder).model.mel(noise()))
    for basis in (saved.basis, trained.square()):
        assert (basis >= 0).all()
        assert basis.isfinite().all()
        assert (basis[initial.basis == 0] == 0).all()
        assert (basis - initial.basis).abs().max() > 0.003 * initial.basis.max()


def test_a_basis_in_training_resumes_bit_for_bit(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    whole, parted = (tiny(packed, cache_dir, tmp_path / kind, {"mel.trainable": True}) for kind in ("whole", "parted"))
    train(whole, local(whole))
    steps = iter(range(1, 100))
    with pytest.raises(Stopped):
        train(parted, local(parted, should_stop=lambda: next(steps) >= 6))
    train(parted, local(parted))
    one, two = (load_state(newest(run_folder(config))) for config in (whole, parted))
    for weights in ("model", "ema"):
        assert torch.equal(one[weights]["mel.basis_root"], two[weights]["mel.basis_root"])


def test_a_fitted_layer_gives_mean_0_and_deviation_1() -> None:
    mel = layer()
    log_mel = mel.log_mel(noise())
    mel.fit(float(log_mel.mean()), float(log_mel.std()))
    normalised = mel(noise())
    assert abs(float(normalised.mean())) < 1e-4
    assert float(normalised.std()) == pytest.approx(1, abs=1e-4)
    mel.fit(0.0, 0.0)  # a set of pure silence
    assert mel(torch.zeros(1, 1_000)).isfinite().all()


def test_a_fitted_kaldi_layer_gives_deviation_one_half() -> None:
    mel = layer(kind="kaldi")
    log_mel = mel.log_mel(noise())
    mel.fit(float(log_mel.mean()), float(log_mel.std()))
    assert float(mel(noise()).std()) == pytest.approx(0.5, abs=1e-4)


def test_bands_that_would_stay_empty_are_refused() -> None:
    message = (
        r"^mel\.num_bands=256: \d+ bands lie between two of the 257 frequency bins and would stay empty; lower it, "
    )
    with pytest.raises(ConfigError, match=message):
        layer(num_bands=256)
    assert layer(num_bands=256, window_ms=250).basis.shape == (256, 2_049)


def test_making_a_layer_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    layer()
    assert capsys.readouterr() == ("", "")
