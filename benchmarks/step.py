"""Training steps and inference at the geometry of the Audio Spectrogram Transformer (AST, Gong 2021), against peers.

Waveforms of 1,024 frames x 128 bands, already in memory, go in; patches of 16 x 16 every 10 cells make 1,212 tokens and
two. A training step is feature extraction, forward, backward and optimizer. Ours is the step that `meamtm train` takes,
gradient clipping and averaged weights included; each row adds one thing to the row above. Theirs is torch's fused AdamW
on their own feature extractor and model. `notebook` is the project's first sketch, built anew from its description.

One step is taken before memory is measured, so that its peak is what a step needs beyond weights, moments and averages:
the features, activations and gradients; two more before the clock runs. `% of peak` is the model's arithmetic (3 x
forward for training; what is computed again does not count, nor does what ours leaves out of the last block) over the
fastest bf16 matrix product found in the same process. Run it from the repository root:

    python benchmarks/step.py [--batch 8] [--processes 1] [--only NAME ...]
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

from contest import Contender, Work, contest

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in meamtm.screen; torch reads it when it is loaded
RATE_HZ = 16_000
NUM_FRAMES, NUM_BANDS, NUM_LABELS = 1_024, 128, 10
CLIP_SAMPLES = 400 + (NUM_FRAMES - 1) * 160
FRONT_END = {"kind": "kaldi", "num_bands": NUM_BANDS, "window_ms": 25, "hop_ms": 10, "fmin_hz": 20}
AST = {"preset": "ast_base"}
STRIDE_16 = {"stem": "patch", "stride": [16, 16], "heads": 12, "depth": 12, "mlp_ratio": 4.0, "pool": "cls_dist"}
SMALL = {"stem_channels": [24, 48, 96, 192]}


def ours(encoder: dict[str, Any], backend: str = "fft", precision: str = "bf16", **train: Any) -> Contender:
    """Builds our model and the step that `meamtm train` takes."""

    def contender(case: dict[str, Any]) -> Work:
        import torch

        from meamtm.config import RunConfig
        from meamtm.model.precision import autocast
        from meamtm.model.transformer import AudioTransformer
        from meamtm.training.heap import set_up_heap
        from meamtm.training.prepare import TrainingBatch
        from meamtm.training.step import make_learner, train_step

        waveform, labels = sounds(case["batch"])
        config = RunConfig.model_validate(
            {
                "data": {"clip_s": CLIP_SAMPLES / RATE_HZ},
                "mel": FRONT_END | {"backend": backend},
                "encoder": encoder,
                "optim": {"name": "adamw", "lr": 1e-5},  # theirs
                "train": {"precision": precision, "batch_size": case["batch"], "epochs": 1_000, **train},
            }
        )
        set_up_heap(sparing=config.train.grad_checkpointing)
        torch.manual_seed(0)
        learner = make_learner(
            config, AudioTransformer(config, NUM_LABELS), waveform.device, steps_per_epoch=100, multi_label=False
        )
        batch = TrainingBatch(waveform, torch.eye(NUM_LABELS)[labels].to(waveform.device), None, case["batch"], 0)
        if case["task"] == "training":
            return rated(lambda: train_step(learner, batch), case, config)
        model = learner.model.eval()

        def infer() -> None:
            with torch.inference_mode(), autocast(config, waveform.device):
                model(waveform)

        return rated(infer, case, config)

    return contender


def hugging_face(attention: str, precision: str) -> Contender:
    """Builds Hugging Face's AST with its own feature extractor."""

    def contender(case: dict[str, Any]) -> Work:
        from transformers import (  # type: ignore[reportMissingImports]
            ASTConfig,
            ASTFeatureExtractor,
            ASTForAudioClassification,
        )

        shape = {"num_mel_bins": NUM_BANDS, "max_length": NUM_FRAMES}
        model = ASTForAudioClassification._from_config(
            ASTConfig(**shape, num_labels=NUM_LABELS), attn_implementation=attention
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchaudio may be absent; it then computes with numpy
            extractor = ASTFeatureExtractor(**shape)

        def logits(waveform: Any) -> Any:
            features = extractor(list(waveform.cpu().numpy()), sampling_rate=RATE_HZ, return_tensors="pt")
            return model(features["input_values"].to(waveform.device)).logits

        return plain(model, logits, case, precision)

    return contender


def notebook(case: dict[str, Any]) -> Work:
    """Builds the first sketch: trainable mel kernels without a logarithm, eager attention, dropout of a half."""
    import torch
    from nnAudio.features import MelSpectrogram
    from torch import nn

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(768, 3 * 768, bias=False), nn.Linear(768, 768)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, num_tokens, _ = x.shape
            query, key, value = self.qkv(x).reshape(batch, num_tokens, 3, 12, 64).permute(2, 0, 3, 1, 4)
            weights = (query @ key.transpose(2, 3) * 64**-0.5).softmax(-1)
            return self.proj((weights @ value).transpose(1, 2).reshape(batch, num_tokens, 768))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2, self.attn = nn.LayerNorm(768), nn.LayerNorm(768), Attention()
            self.mlp = nn.Sequential(nn.Linear(768, 3_072), nn.GELU(), nn.Linear(3_072, 768))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    class Sketch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mel = MelSpectrogram(
                RATE_HZ, 2_048, 400, NUM_BANDS, 160, pad_mode="constant", trainable_mel=True, verbose=False
            )
            self.patch = nn.Conv2d(1, 768, 16, 10)
            self.first = nn.Parameter(torch.randn(1, 2, 768))
            self.positions = nn.Parameter(torch.zeros(1, 1_214, 768))
            self.body = nn.Sequential(nn.Dropout(0.5), *(Block() for _ in range(12)), nn.LayerNorm(768))
            self.head = nn.Sequential(nn.LayerNorm(768), nn.Linear(768, NUM_LABELS))

        def forward(self, waveform: torch.Tensor) -> torch.Tensor:
            image = self.mel(waveform)[..., :NUM_FRAMES].transpose(1, 2).unsqueeze(1)  # (batch, 1, frame, band)
            tokens = self.patch(image).flatten(2).transpose(1, 2)  # (batch, patch, width)
            tokens = torch.cat([self.first.expand(len(tokens), -1, -1), tokens], 1) + self.positions
            return self.head(self.body(tokens).mean(1))

    model = Sketch()
    return plain(model, model, case, "float32")


def plain(model: Any, logits: Callable[[Any], Any], case: dict[str, Any], precision: str) -> Work:
    """Makes the step that anyone would write first."""
    import torch

    waveform, labels = sounds(case["batch"])
    labels = labels.to(waveform.device)
    model.to(waveform.device).train(case["task"] == "training")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    cast = {"dtype": torch.bfloat16, "enabled": precision == "bf16"}

    def train() -> None:
        with torch.autocast(waveform.device.type, **cast):
            found = logits(waveform)
        torch.nn.functional.cross_entropy(found.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def infer() -> None:
        with torch.inference_mode(), torch.autocast(waveform.device.type, **cast):
            logits(waveform)

    return rated(train if case["task"] == "training" else infer, case, None)


def rated(work: Callable[[], None], case: dict[str, Any], config: Any) -> Work:
    """Adds clips and arithmetic per second to a step, and takes the first one, which sets the optimizer up."""
    import torch

    clip_gflop = forward_gflop(config, train=case["task"] == "training") * (3 if case["task"] == "training" else 1)
    peak = peak_gflops()
    work()

    def timed() -> dict[str, float]:
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        clips_per_s = case["batch"] / (time.perf_counter() - began)
        gflops = clip_gflop * clips_per_s
        return {"clips/s": clips_per_s, "GFLOP/s": gflops, "% of peak": 100 * gflops / peak, "peak GFLOP/s": peak}

    return timed


def forward_gflop(config: Any, *, train: bool) -> float:
    """Counts one clip's way through the encoder; None is AST, whoever builds it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from meamtm.config import RunConfig
    from meamtm.model.encoder import Encoder

    chosen = config or RunConfig.model_validate({"encoder": AST, "mel": {"num_bands": NUM_BANDS}})
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        size = (NUM_BANDS, NUM_FRAMES)
        encoder = Encoder(chosen.encoder, size, NUM_LABELS).train(train).requires_grad_(False)
        compute = encoder.tokens if config is None else encoder  # others compute all tokens of the last block
        compute(torch.empty(1, 1, *size))
    return counter.get_total_flops() / 1e9


def peak_gflops() -> float:
    """Measures the fastest bf16 product of square matrices here."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    best = 0.0
    for size in (1_024, 2_048, 4_096):
        left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        for _ in range(5):
            began = time.perf_counter()
            left @ right
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - began) / 1e9)
    return best


def sounds(num_clips: int) -> tuple[Any, Any]:
    """Makes noise and labels, always the same, where torch computes best."""
    import torch

    generator = torch.Generator().manual_seed(0)
    waveform = 0.1 * torch.randn(num_clips, CLIP_SAMPLES, generator=generator)
    labels = torch.randint(NUM_LABELS, (num_clips,), generator=generator)
    return waveform.to("cuda" if torch.cuda.is_available() else "cpu"), labels


HALF = {"patchout_time": 0.5}
CONTENDERS = {
    "Hugging Face float32 eager": hugging_face("eager", "float32"),
    "Hugging Face float32 SDPA": hugging_face("sdpa", "float32"),
    "Hugging Face bf16 SDPA": hugging_face("sdpa", "bf16"),
    "notebook": notebook,
    "meamtm float32": ours(AST, "conv", "float32"),
    "+ bf16": ours(AST, "conv"),
    "+ fft mel": ours(AST),
    "+ patchout of half": ours(AST | HALF),
    "+ checkpointing": ours(AST | HALF, grad_checkpointing=True),
    "+ stride 16": ours(STRIDE_16 | HALF, grad_checkpointing=True),
    "small, conv stem": ours(SMALL),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(threads=len(os.sched_getaffinity(0)), processes=1, measure_s=0.0)
    parser.add_argument("--batch", type=int, default=8, help="clips")


if __name__ == "__main__":
    few = {"num_warmup": 2, "num_timed": 2}  # the first steps still gather memory
    contest(
        __file__,
        CONTENDERS,
        {task: {"task": task, **few} for task in ("training", "inference")},
        reference="+ fft mel",
        add_arguments=add_arguments,
        columns=("clips/s", "GFLOP/s", "% of peak"),
    )
