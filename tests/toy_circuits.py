"""Networks with hand-set integer weights, whose circuits are known on paper.

Every image is one colour, so that each feature map is constant but at borders, which kernels of one pixel have not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minexp.circuit.circuit import Circuit, Edge, Layer, Node
from minexp.classifier import Classifier

COLOUR = (0.75, 0.5, 0.25)
SIZE = 4


def image(colour: tuple[float, ...] = COLOUR, size: int = SIZE) -> Tensor:
    """[3, size, size] of one colour."""
    return torch.tensor(colour).view(3, 1, 1).expand(3, size, size).clone()


def conv(weight: list[list[float]], groups: int = 1) -> nn.Conv2d:
    """A 1×1 convolution with this matrix [O][I/groups] and no bias."""
    matrix = torch.tensor(weight)
    layer = nn.Conv2d(matrix.shape[1] * groups, matrix.shape[0], 1, bias=False, groups=groups)
    layer.weight.data = matrix[:, :, None, None].float()
    return layer


def linear(weight: list[list[float]]) -> nn.Linear:
    matrix = torch.tensor(weight).float()
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    layer.weight.data = matrix
    return layer


class Chain(nn.Module):
    """h = relu(conv1 x) = (R, G, B, R-G); k = relu(conv2 h) = (2h0+h3, 3h1-h0, h2); scores (2k0-k1, k2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, -1, 0]])
        self.conv2 = conv([[2, 0, 0, 1], [-1, 3, 0, 0], [0, 0, 1, 0]])
        self.fc = linear([[2, -1, 0], [0, 0, 1]])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class Skip(nn.Module):
    """A residual block: s = relu(stem x) = (R, G); a = relu(conv1 s) = (s0-s1, s1); y = relu(bn(conv2 a) + s).

    conv2 = [[4, 0], [0, 0]]; the batch normalisation halves: y = (2 a0 + s0, s1); scores (y0, y1).
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1 = conv([[1, 0, 0], [0, 1, 0]]), conv([[1, -1], [0, 1]])
        self.conv2, self.bn = conv([[4, 0], [0, 0]]), nn.BatchNorm2d(2, eps=0.0)
        self.bn.running_var.fill_(4.0)  # type: ignore[union-attr, operator]
        self.fc = linear([[1, 0], [0, 1]])

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.stem(x))
        out = self.bn(self.conv2(F.relu(self.conv1(skip))))
        out += skip
        return self.fc(F.relu(out).mean((2, 3)))


class Concat(nn.Module):
    """a = relu(A x) = (R, G); b = relu(B a) = (a0-a1); y = relu(C [a, b]) = (a0 + 2b0, a1); scores (y0, y1)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv([[1, 0, 0], [0, 1, 0]]), conv([[1, -1]])
        self.third, self.fc = conv([[1, 0, 2], [0, 1, 0]]), linear([[1, 0], [0, 1]])

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.first(x))
        b = F.relu(self.second(a))
        return self.fc(F.relu(self.third(torch.cat([a, b], 1))).mean((2, 3)))


class Grouped(nn.Module):
    """d = relu(depthwise h) = (2h0, 3h1, h2, -h3 -> 0), then two groups: y = (d0+d1, d2-d3); scores (y0, y1)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
        self.depthwise, self.grouped = (
            conv([[2], [3], [1], [-1]], groups=4),
            conv([[1, 1], [1, -1]], groups=2),
        )
        self.fc = linear([[1, 0], [0, 1]])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.depthwise(F.relu(self.stem(x))))))
        return self.fc(x.mean((2, 3)))


class Gated(nn.Module):
    """Squeeze and excitation: u = relu(stem x) = (R, G); q = relu(2 mean u0); gate = clamp(q / 2, 0, 1) and 0.

    y = relu(out (u * gate)) = (u0 gate0, 0); scores (2 y0, y1).
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze, self.excite = (
            conv([[1, 0, 0], [0, 1, 0]]),
            conv([[2, 0]]),
            conv([[0.5], [0]]),
        )
        self.out, self.fc = conv([[1, 0], [0, 1]]), linear([[2, 0], [0, 1]])

    def forward(self, x: Tensor) -> Tensor:
        u = F.relu(self.stem(x))
        gate = torch.clamp(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(u, 1)))), 0, 1)
        return self.fc(F.relu(self.out(u * gate)).mean((2, 3)))


class Attention(nn.Module):
    """Two heads of one dimension over 2×2 patches; all queries are 0, so each head averages its values.

    Tokens t = (R, G, B) of each patch; values v = (t0, t1): head 0 reads red, head 1 green; the projection writes head
    0 into stream 0, three times; scores (stream 0, stream 1) of the mean token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 3, 2, 2, bias=False)
        self.patch.weight.data.zero_()
        for channel in range(3):
            self.patch.weight.data[channel, channel] = 0.25
        self.query, self.value = linear([[0, 0, 0], [0, 0, 0]]), linear([[1, 0, 0], [0, 1, 0]])
        self.proj, self.fc = linear([[3, 0], [0, 0], [0, 0]]), linear([[1, 0, 0], [0, 1, 0]])

    def forward(self, x: Tensor) -> Tensor:
        t = self.patch(x).flatten(2).transpose(1, 2)
        q, v = (layer(t).unflatten(2, (2, 1)).transpose(1, 2) for layer in (self.query, self.value))
        out = F.scaled_dot_product_attention(q, q, v).transpose(1, 2).flatten(2)
        return self.fc((t + self.proj(out)).mean(1))


class Either(nn.Module):
    """h = relu(conv x) = (R, B, R, G); score 0 is min(3, 4 h0 + 4 h2): 3 with either of the two, and at its limit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv([[1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]])
        self.fc = linear([[4, 0, 4, 0], [0, 0, 0, 1]])

    def forward(self, x: Tensor) -> Tensor:
        return self.limited(self.fc(F.relu(self.conv(x)).mean((2, 3))))

    def limited(self, scores: Tensor) -> Tensor:
        return scores.clamp(max=3)


class Both(Either):
    """The same with score 0 = relu(4 h0 + 4 h2 - 3): 3 with both, none with one of them."""

    def limited(self, scores: Tensor) -> Tensor:
        return (scores - 3).clamp(min=0)


class Untraceable(Chain):
    """A chain that decides by a value whether to go on, which no trace can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.detach().sum()) > -1 else x.mean((2, 3))[:, :2]


def classifier(model: nn.Module, size: int = SIZE, **options: object) -> Classifier:
    return Classifier(model, size=size, **options)  # type: ignore[arg-type]


def every_kind() -> Circuit:
    """A made-up circuit: one unit of a layer of each kind, and of the stream also one without edges, unit 2."""
    kinds = ("channel", "gate", "head", "stream", "neuron")
    nodes = [
        Node("channel", 1, 0, 2.0),
        Node("gate", 0, 1, 0.5),
        Node("head", 0, 2, 1.0),
        Node("neuron", 3, 3, -1.0),
        Node("stream", 0, -1, 9.0),
        Node("stream", 2, -1, 3.0),
    ]
    edges = [
        Edge("channel", 1, "gate", 0, 1.0),
        Edge("gate", 0, "head", 0, 1.0),
        Edge("head", 0, "stream", 0, 0.5),
        Edge("stream", 0, "neuron", 3, -4.0),
        Edge("neuron", 3, "score", 0, 1.0),
    ]
    layers = tuple(Layer(kind, kind, 4) for kind in kinds)
    return Circuit(
        "exact", "layer", 0, "warm", "Net", "", layers, tuple(nodes), tuple(edges), universe=16, size=0.25
    )
