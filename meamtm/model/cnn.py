"""Spectrogram as an image -> one vector -> logits: a convolutional network of timm's, in the transformer's place.

It is there to be compared with, and to teach: on little data a small one may know what a transformer has yet to learn
(Touvron 2021, section 4)."""

import timm
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from meamtm.config import EncoderConfig
from meamtm.config.flat import nearest
from meamtm.errors import ConfigError
from meamtm.model.batch_norm import share_batch_norms
from meamtm.model.stem import channels_last

Image = Float[Tensor, "batch 1 band frame"]


class ConvNet(nn.Module):
    """The network that `encoder.cnn` names, with random weights, for spectrograms of any length."""

    num_tokens = 0

    def __init__(self, config: EncoderConfig, image_size: tuple[int, int], num_labels: int) -> None:
        super().__init__()
        _check(config, image_size)
        network = _build(config, num_labels).to(memory_format=torch.channels_last)  # type: ignore[reportCallIssue]
        self.network = share_batch_norms(network)

    @property
    def head(self) -> nn.Module:
        """What makes logits of an embedding."""
        return self.network.get_classifier()  # type: ignore[reportCallIssue]

    def forward(self, x: Image, num_frames: Int[Tensor, " batch"] | None = None) -> Float[Tensor, "batch label"]:
        """Gives logits; clips of one batch are equally long."""
        return self.head(self.embed(x, num_frames))

    def embed(self, image: Image, num_frames: Int[Tensor, " batch"] | None = None) -> Float[Tensor, "batch width"]:
        """Gives one vector per clip: what the head sees."""
        if num_frames is not None:
            raise ValueError("a network of encoder.cnn hears what is beyond a clip's end; leave `num_samples` out")
        features = self.network.forward_features(channels_last(image))  # type: ignore[reportCallIssue]
        return self.network.forward_head(features, pre_logits=True)  # type: ignore[reportCallIssue]

    def no_weight_decay(self) -> set[str]:
        """Names what keeps its size, beside biases and norms."""
        names = getattr(self.network, "no_weight_decay", set)()
        return {f"network.{name}" for name in names}

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Does nothing: a config refuses it, since batch norm would count clips twice."""
        assert not enable


def _build(config: EncoderConfig, num_labels: int) -> nn.Module:
    drops = {"drop_rate": config.dropout, "drop_path_rate": config.drop_path}
    wanted = {name: rate for name, rate in drops.items() if rate > 0}
    return timm.create_model(config.cnn, in_chans=1, num_classes=num_labels, **wanted)  # type: ignore[reportArgumentType]


def _check(config: EncoderConfig, image_size: tuple[int, int]) -> None:
    """Passes a spectrogram through a network without weights; raises ConfigError where there is none, or it cannot."""
    if not timm.is_model(config.cnn):
        meant = nearest(config.cnn, timm.list_models())
        raise ConfigError(
            f"encoder.cnn={config.cnn}: timm has no such network"
            + (f"; did you mean {meant}?" if meant else "; timm.list_models('*net*') lists some")
        )
    meta = torch.device("meta")
    try:
        with meta:
            network = _build(config, num_labels=2)
    except TypeError as error:
        raise ConfigError(
            f"encoder.cnn={config.cnn}: cannot be built so ({error}); set encoder.drop_path=0 and encoder.dropout=0"
        ) from error
    try:
        image = torch.empty(2, 1, *image_size, device=meta)
        num_axes = network.forward_features(image).ndim  # type: ignore[reportCallIssue]
    except (AssertionError, AttributeError, RuntimeError) as error:
        bands, frames = image_size
        raise ConfigError(
            f"encoder.cnn={config.cnn}: takes no spectrogram of {bands} x {frames} ({error}); take a convolutional "
            f"network that any image fits, such as resnet10t"
        ) from error
    if num_axes != 4:
        raise ConfigError(
            f"encoder.cnn={config.cnn}: gives no map (batch, channel, row, column); take a convolutional network, such "
            f"as resnet10t"
        )
