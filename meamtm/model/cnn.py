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

Image = Float[Tensor, "batch 1 band frame"]


class ConvNet(nn.Module):
    """The network that `encoder.cnn` names, with random weights, for spectrograms of any length."""

    num_tokens = 0

    def __init__(self, config: EncoderConfig, image_size: tuple[int, int], num_labels: int) -> None:
        super().__init__()
        _check(config, image_size)
        self.network = share_batch_norms(_build(config, num_labels))

    def forward(self, x: Image, num_frames: Int[Tensor, " batch"] | None = None) -> Float[Tensor, "batch label"]:
        """Gives logits; clips of one batch are equally long."""
        _check_lengths(num_frames)
        return self.network(x)

    def embed(self, image: Image, num_frames: Int[Tensor, " batch"] | None = None) -> Float[Tensor, "batch width"]:
        """Gives one vector per clip: what the network's last layer sees, which may have a norm of its own."""
        _check_lengths(num_frames)
        return _embed(self.network, image)

    def no_weight_decay(self) -> set[str]:
        """Names what keeps its size, beside biases and norms."""
        names = getattr(self.network, "no_weight_decay", set)()
        return {f"network.{name}" for name in names}

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Does nothing: a config refuses it, since batch norm would count clips twice."""
        assert not enable


def _check_lengths(num_frames: Tensor | None) -> None:
    if num_frames is not None:
        raise ValueError("a network of encoder.cnn hears what is beyond a clip's end; leave `num_samples` out")


def _embed(network: nn.Module, image: Image) -> Tensor:
    features = network.forward_features(image)  # type: ignore[reportCallIssue]
    return network.forward_head(features, pre_logits=True)  # type: ignore[reportCallIssue]


def _build(config: EncoderConfig, num_labels: int) -> nn.Module:
    drops = {"drop_rate": config.dropout, "drop_path_rate": config.drop_path}
    wanted = {name: rate for name, rate in drops.items() if rate > 0}
    return timm.create_model(config.cnn, in_chans=1, num_classes=num_labels, **wanted)  # type: ignore[reportArgumentType]


def _check(config: EncoderConfig, image_size: tuple[int, int]) -> None:
    """Passes a spectrogram through a network without weights; raises ConfigError where there is none, or it cannot."""
    if "." in config.cnn:
        raise ConfigError(
            f"encoder.cnn={config.cnn}: names published weights, and these begin at random; write "
            f"{config.cnn.partition('.')[0]}"
        )
    if not timm.is_model(config.cnn):
        meant = nearest(config.cnn, timm.list_models())
        raise ConfigError(
            f"encoder.cnn={config.cnn}: timm has no such network"
            + (f"; did you mean {meant}?" if meant else "; timm.list_models('*net*') lists some")
        )
    with torch.device("meta"):
        network, image = _new(config), torch.empty(2, 1, *image_size)
        _check_norms(config, network)
        try:
            num_axes = network.forward_features(image).ndim  # type: ignore[reportCallIssue]
            embedding, logits = _embed(network, image), network(image)
        except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            bands, frames = image_size
            why = error if str(error) else type(error).__name__
            raise ConfigError(
                f"encoder.cnn={config.cnn}: takes no spectrogram of {bands} x {frames} ({why}); take a convolutional "
                f"network that any image fits, such as resnet10t, or raise mel.num_bands or data.clip_s"
            ) from error
    if (num_axes, embedding.ndim, logits.shape) != (4, 2, (2, 2)):
        raise ConfigError(
            f"encoder.cnn={config.cnn}: gives no map (batch, channel, row, column), one vector and logits of it; take "
            f"a convolutional network, such as resnet10t"
        )


def _new(config: EncoderConfig) -> nn.Module:
    try:
        return _build(config, num_labels=2)
    except TypeError as error:
        key = "drop_path" if "drop_path_rate" in str(error) else "dropout"
        raise ConfigError(
            f"encoder.cnn={config.cnn}: cannot be built so ({error}); set encoder.{key}=0, or take another network"
        ) from error


def _check_norms(config: EncoderConfig, network: nn.Module) -> None:
    """Refuses batch norms that ranks could not share: of vectors, where others are of maps."""
    norms = [each for each in network.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    if other := next((each for each in norms if not isinstance(each, nn.BatchNorm2d)), None):
        raise ConfigError(
            f"encoder.cnn={config.cnn}: has a {type(other).__name__}, whose statistics several workers would not "
            f"share; take another network, such as resnet10t"
        )
