"""
The network and the form in which it is served; architecture only.

Axes: N images, C channels, H height, W width, D embedding, K classes.

``conv1`` feeds two branches, each one convolution and one pooling deep; both branches' last convolutions are
joined along channels, at 7x7, before the first fully connected layer.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

IMAGE_SIZE = 28
EMBEDDING_SIZE = 500


class Network(nn.Module):
    """
    Two-branch convolutional classifier of 28x28 grey images; 25,927,246 parameters for ten classes.

    Every convolution is 3x3 with padding 1, every activation ReLU, every down-sampling 2x2 max pooling.
    Two aids to training may be in it, which :func:`fold` takes out again: a norm behind each convolution, and dropout
    in front of the last two layers. Fully connected layers have no norm, as a batch of one sample has no variance.

    Args:
        num_classes: Classes to tell apart, at least 2.
        dropout: Share of activations dropped in training, 0..1.
        batch_norm: Normalise the output of each convolution over the batch.
    """

    def __init__(self, num_classes: int = 10, *, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2_1 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv2_2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3_1 = nn.Conv2d(64, 256, 3, padding=1)
        self.conv3_2 = nn.Conv2d(64, 256, 3, padding=1)
        self.fc1 = nn.Linear(2 * 256 * 7 * 7, 1000)
        self.fc2 = nn.Linear(1000, EMBEDDING_SIZE)
        self.output = nn.Linear(EMBEDDING_SIZE, num_classes)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.norm1 = _norm(batch_norm, 32)
        self.norm2_1 = _norm(batch_norm, 64)
        self.norm2_2 = _norm(batch_norm, 64)
        self.norm3_1 = _norm(batch_norm, 256)
        self.norm3_2 = _norm(batch_norm, 256)

    def features(self, image_NCHW: Tensor) -> Tensor:
        """
        Return the activations of ``fc2``, float [N, 500], not negative.

        Args:
            image_NCHW: float [N, 1, 28, 28] in 0..1, ink bright on dark.
        """
        conv1_NCHW = F.relu(self.norm1(self.conv1(image_NCHW)))
        pooled1_NCHW = F.max_pool2d(conv1_NCHW, 2)  # 32 x 14 x 14
        left_NCHW = F.max_pool2d(F.relu(self.norm2_1(self.conv2_1(pooled1_NCHW))), 2)  # 64 x 7 x 7
        right_NCHW = F.max_pool2d(F.relu(self.norm2_2(self.conv2_2(pooled1_NCHW))), 2)
        left_NCHW = F.relu(self.norm3_1(self.conv3_1(left_NCHW)))  # 256 x 7 x 7
        right_NCHW = F.relu(self.norm3_2(self.conv3_2(right_NCHW)))
        conv3_NCHW = torch.cat((left_NCHW, right_NCHW), dim=1)
        hidden = F.relu(self.fc1(conv3_NCHW.flatten(1)))
        return F.relu(self.fc2(self.dropout(hidden)))

    def forward(self, image_NCHW: Tensor) -> Tensor:
        """
        Return the classes' logits, float [N, K].

        Args:
            image_NCHW: float [N, 1, 28, 28] in 0..1, ink bright on dark.
        """
        logits_NK: Tensor = self.output(self.dropout(self.features(image_NCHW)))
        return logits_NK


def fold(network: Network) -> Network:
    """
    Return a copy, in evaluation mode, that answers alike without norms and dropout: the network as it is given.

    A norm's statistics and factors go into the convolution in front of it; answers differ by rounding alone.
    """
    folded = Network(network.output.out_features).to(next(network.parameters()).device)
    weights = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("norm")}
    for place in ("1", "2_1", "2_2", "3_1", "3_2"):
        convolution, norm = getattr(network, f"conv{place}"), getattr(network, f"norm{place}")
        if not isinstance(norm, nn.Identity):
            plain = fuse_conv_bn_eval(copy.deepcopy(convolution).eval(), copy.deepcopy(norm).eval())
            weights |= {f"conv{place}.{name}": tensor for name, tensor in plain.state_dict().items()}
    folded.load_state_dict(weights)
    return folded.eval()


def _norm(batch_norm: bool, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if batch_norm else nn.Identity()


class ServedNetwork(nn.Module):
    """
    A trained network as Triton runs it; make it TorchScript with :func:`torch.jit.script`.

    Scaling lives in here so that a client and the trainer cannot disagree about it. The name of ``forward``'s
    argument and the order of its results are the tensor names in ``config.pbtxt`` (libtorch's naming rule).

    Args:
        network: Copied; its device is kept, and what only training needs is folded away.
        temperature: What logits are divided by so that probabilities are as often right as they say, above 0. It is
            part of the last layer's weights, and the graph that of the given network.
        dtype: Of all layers but the last, which stays float32: it is small, and a probability's digits come from it.
    """

    def __init__(self, network: Network, *, temperature: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        served = fold(network).float()
        output = copy.deepcopy(served.output)
        with torch.no_grad():
            output.weight.div_(temperature)
            output.bias.div_(temperature)
        self.network = served.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        self.network.output = output

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """
        Return probabilities [N, K] that sum to 1 and embeddings [N, 500] of unit length, both float32.

        Args:
            image: uint8 [N, 1, 28, 28], ink bright on dark.
        """
        scaled_NCHW = image.to(self.network.conv1.weight.dtype) / 255.0
        features_ND = self.network.features(scaled_NCHW.contiguous(memory_format=torch.channels_last)).float()
        probabilities_NK = F.softmax(self.network.output(features_ND), dim=1)
        # The epsilon keeps an image without any activation finite; its embedding is then the zero vector.
        embedding_ND = F.normalize(features_ND, dim=1, eps=1e-12)
        return probabilities_NK, embedding_ND
