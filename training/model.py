"""
The network and the form in which it is served; architecture only.

Axes: N images, C channels, H height, W width, D embedding, K classes.

``conv1`` feeds two branches, each one convolution and one pooling deep; both branches' last convolutions are
joined along channels, at 7x7, before the first fully connected layer.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SIZE = 28
EMBEDDING_SIZE = 500


class Network(nn.Module):
    """
    Two-branch convolutional classifier of 28x28 grey images; 25,927,246 parameters for ten classes.

    Every convolution is 3x3 with padding 1, every activation ReLU, every down-sampling 2x2 max pooling.
    Dropout sits in front of the last two layers while training and is nothing in evaluation mode.

    Args:
        num_classes: Classes to tell apart, at least 2.
        dropout: Share of activations dropped in training, 0..1.
    """

    def __init__(self, num_classes: int = 10, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2_1 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv2_2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3_1 = nn.Conv2d(64, 256, 3, padding=1)
        self.conv3_2 = nn.Conv2d(64, 256, 3, padding=1)
        self.fc1 = nn.Linear(2 * 256 * 7 * 7, 1000)
        self.fc2 = nn.Linear(1000, EMBEDDING_SIZE)
        self.output = nn.Linear(EMBEDDING_SIZE, num_classes)
        self.dropout = nn.Dropout(dropout)

    def features(self, image_NCHW: Tensor) -> Tensor:
        """
        Return the activations of ``fc2``, float [N, 500], not negative.

        Args:
            image_NCHW: float [N, 1, 28, 28] in 0..1, ink bright on dark.
        """
        pooled1_NCHW = F.max_pool2d(F.relu(self.conv1(image_NCHW)), 2)  # 32 x 14 x 14
        left_NCHW = F.max_pool2d(F.relu(self.conv2_1(pooled1_NCHW)), 2)  # 64 x 7 x 7
        right_NCHW = F.max_pool2d(F.relu(self.conv2_2(pooled1_NCHW)), 2)
        conv3_NCHW = torch.cat((F.relu(self.conv3_1(left_NCHW)), F.relu(self.conv3_2(right_NCHW))), dim=1)
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


class ServedNetwork(nn.Module):
    """
    A trained network as Triton runs it; make it TorchScript with :func:`torch.jit.script`.

    Scaling lives in here so that a client and the trainer cannot disagree about it. The name of ``forward``'s
    argument and the order of its results are the tensor names in ``config.pbtxt`` (libtorch's naming rule).

    Args:
        network: Put into evaluation mode, in which dropout is nothing.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """
        Return probabilities [N, K] that sum to 1 and embeddings [N, 500] of unit length, both float32.

        Args:
            image: uint8 [N, 1, 28, 28], ink bright on dark.
        """
        scaled_NCHW = image.to(self.network.conv1.weight.dtype) / 255.0
        features_ND = self.network.features(scaled_NCHW)
        probabilities_NK = F.softmax(self.network.output(features_ND).float(), dim=1)
        # The epsilon keeps an image without any activation finite; its embedding is then the zero vector.
        embedding_ND = F.normalize(features_ND.float(), dim=1, eps=1e-12)
        return probabilities_NK, embedding_ND
