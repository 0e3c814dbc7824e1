"""Waveforms -> logits: log-mel, stem, timm's transformer encoder, head; or a convolutional network."""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from meamtm.config import RunConfig
from meamtm.model.cnn import ConvNet
from meamtm.model.distilled import DistilledEncoder
from meamtm.model.encoder import Encoder
from meamtm.model.mel import MelLayer


class AudioTransformer(nn.Module):
    """Names sounds straight from waveforms (Gong 2021), with a stem and size that suit little data.

    Clips may be of any length. Those of a batch may differ in length too: they are then padded with zeros, and
    `num_samples` tells how long each is; a clip gets the same logits as alone.
    """

    def __init__(self, config: RunConfig, num_labels: int) -> None:
        super().__init__()
        self.mel = MelLayer(config.mel)
        self.encoder = make_encoder(config, num_labels)
        self.encoder.set_grad_checkpointing(config.train.grad_checkpointing)

    def forward(
        self,
        waveform: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch band frame"] | None = None,
        num_samples: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch *head label"]:
        """Gives logits for samples in -1..1; masked cells of the spectrogram are set to the training clips' mean.

        In training with `encoder.pool=deit` there are those of two heads."""
        return self.encoder(self.image(waveform, mask, num_samples), self._num_frames(num_samples))

    def features(
        self, waveform: Float[Tensor, "batch time"], num_samples: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch width"]:
        """Gives one embedding per clip: the pooled tokens, before the head."""
        return self.encoder.embed(self.image(waveform, None, num_samples), self._num_frames(num_samples))

    def image(
        self,
        waveform: Float[Tensor, "batch time"],
        mask: Bool[Tensor, "batch band frame"] | None = None,
        num_samples: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch 1 band frame"]:
        """Gives the spectrogram as an image of one channel."""
        log_mel = self.mel(waveform, num_samples)
        if mask is not None:
            log_mel = log_mel.masked_fill(mask, 0.0)
        return log_mel.unsqueeze(1)

    def _num_frames(self, num_samples: Int[Tensor, " batch"] | None) -> Int[Tensor, " batch"] | None:
        return None if num_samples is None else self.mel.num_frames(num_samples)


def make_encoder(config: RunConfig, num_labels: int) -> Encoder | ConvNet:
    """Builds what lies behind the spectrogram; raises ConfigError where timm has no such network."""
    kind = Encoder
    if config.encoder.cnn != "none":
        kind = ConvNet
    elif config.encoder.pool == "deit":
        kind = DistilledEncoder
    return kind(config.encoder, (config.mel.num_bands, config.num_frames), num_labels)
