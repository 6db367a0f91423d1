"""Small networks for masked diffusion: a perceptron over all positions, a transformer, windows, and discriminators.

Each takes z [b, L] with symbols 0..V-1 and the mask V, or weights [b, L, V + 1] over the symbols, whose embeddings are
then mixed; t [b] is not looked at. `features` is what the last layer, `head`, reads.

Shapes: b sequences, L positions, V symbols, h width.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from kullback.core.errors import ConfigError, ShapeError

__all__ = ["FlatDenoiser", "SpectralLinear", "TokenDiscriminator", "TransformerDenoiser", "WindowDenoiser"]


def _linear(inputs: int, outputs: int, generator: torch.Generator, scale: float = 1.0) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    with torch.no_grad():
        layer.weight.normal_(0.0, scale * inputs**-0.5, generator=generator)
        layer.bias.zero_()
    return layer


def _table(rows: int, width: int, generator: torch.Generator, scale: float = 1.0) -> nn.Parameter:
    return nn.Parameter(scale * torch.randn(rows, width, generator=generator))


def _embedded(table: Tensor, z: Tensor) -> Tensor:
    """The embeddings [b, L, e] of symbols [b, L], or of weights over them [b, L, V + 1]."""
    if not z.is_floating_point():
        return functional.embedding(z, table)
    if z.shape[-1] != len(table):
        raise ShapeError(f"weights over symbols have {z.shape[-1]} columns, and with the mask there are {len(table)}")
    return z.to(table.dtype) @ table


class FlatDenoiser(nn.Module):
    """Embeddings of all positions in a row, two hidden layers with SiLU, and all logits [b, L, V] at once.

    For short sequences of one length: it costs a fraction of a transformer there. Raises ConfigError for sizes below 1.
    """

    def __init__(
        self, symbols: int, length: int, *, embedding: int = 16, hidden: int = 384, generator: torch.Generator
    ) -> None:
        super().__init__()
        if min(symbols, length, embedding, hidden) < 1:
            raise ConfigError(f"sizes are 1 or more, got {symbols}, {length}, {embedding}, {hidden}")
        self.symbols, self.length, self.width, self.outputs = symbols, length, hidden, length
        self.embedding = _table(symbols + 1, embedding, generator)
        self.blocks = nn.ModuleList(
            [_linear(length * embedding, hidden, generator, 1.4), _linear(hidden, hidden, generator, 1.4)]
        )
        self.head: nn.Module = _linear(hidden, length * symbols, generator)

    def features(self, z: Tensor) -> Tensor:
        """[b, h], one vector for the whole sequence."""
        if z.shape[1] != self.length:
            raise ShapeError(f"sequences have {self.length} positions here, got {z.shape[1]}")
        hidden = _embedded(self.embedding, z).flatten(1)
        for block in self.blocks:
            hidden = functional.silu(block(hidden))
        return hidden

    def forward(self, z: Tensor, t: Tensor | None = None) -> Tensor:
        """Logits [b, L, V]."""
        return self.head(self.features(z)).view(len(z), self.length, -1)


def _angles(length: int, width: int) -> Tensor:
    """Rotary angles [L, d / 2] of a head of width d: a position turns the first pair by 1, the last by 1 / 1000."""
    rates = 1000.0 ** -torch.linspace(0.0, 1.0, width // 2)
    return torch.arange(length).unsqueeze(-1) * rates


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixing = _linear(width, 3 * width, generator)
        self.mixed = _linear(width, width, generator, (2 * layers) ** -0.5)
        self.inner = _linear(width, 4 * width, generator)
        self.outer = _linear(4 * width, width, generator, (2 * layers) ** -0.5)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        b, length, width = x.shape
        mixing = self.mixing(self.before(x)).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = _turned(mixing[:2], cosine.to(mixing), sine.to(mixing))
        attended = functional.scaled_dot_product_attention(q, k, mixing[2])
        x = x + self.mixed(attended.transpose(1, 2).reshape(b, length, width))
        return x + self.outer(functional.gelu(self.inner(self.between(x))))


class TransformerDenoiser(nn.Module):
    """A transformer whose positions all see each other, up to `length` of them; logits [b, L, V].

    Attention is rotary, with learned positions besides. Raises ConfigError for sizes that do not fit.
    """

    def __init__(
        self, symbols: int, length: int, *, width: int = 64, layers: int = 2, heads: int = 4, generator: torch.Generator
    ) -> None:
        super().__init__()
        if min(symbols, length, width, layers, heads) < 1 or width % (2 * heads):
            raise ConfigError(f"width is a multiple of 2 x heads, and sizes are 1 or more, got {width}, {heads} heads")
        self.symbols, self.length, self.width, self.outputs = symbols, length, width, 1
        self.embedding = _table(symbols + 1, width, generator)
        self.positions = _table(length, width, generator, 0.3)
        # From learned positions alone attention takes thousands of steps to find a symbol's neighbours in text: with
        # distances in sight from the start it takes a hundred.
        angles = _angles(length, width // heads)
        self.cosine: Tensor
        self.sine: Tensor
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)
        self.blocks = nn.ModuleList([_Block(width, heads, layers, generator) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head: nn.Module = _linear(width, symbols, generator, 0.5)

    def features(self, z: Tensor) -> Tensor:
        """[b, L, h]."""
        if z.shape[1] > self.length:
            raise ShapeError(f"sequences have up to {self.length} positions here, got {z.shape[1]}")
        hidden = _embedded(self.embedding, z) + self.positions[: z.shape[1]]
        cosine, sine = self.cosine[: z.shape[1]], self.sine[: z.shape[1]]
        for block in self.blocks:
            hidden = block(hidden, cosine, sine)
        return self.norm(hidden)

    def forward(self, z: Tensor, t: Tensor | None = None) -> Tensor:
        """Logits [b, L, V]."""
        return self.head(self.features(z))

    def at(self, z: Tensor, t: Tensor | None, places: Tensor) -> Tensor:
        """Logits [m, V] of the positions `places` [b, L] alone: the head, the dearest layer of many symbols, is not
        called for the others.
        """
        return self.head(self.features(z)[places])


class WindowDenoiser(nn.Module):
    """Layers with SiLU over a position and its two neighbours, all positions alike; logits [b, L, V].

    A position sees `layers` places to both sides, and the mean of what all positions saw: enough to judge whether near
    symbols fit each other, which it learns from a tenth of the sequences that a `FlatDenoiser` takes, for any length.
    Raises ConfigError for sizes below 1.
    """

    def __init__(self, symbols: int, *, width: int = 32, layers: int = 3, generator: torch.Generator) -> None:
        super().__init__()
        if min(symbols, width, layers) < 1:
            raise ConfigError(f"sizes are 1 or more, got {symbols}, {width}, {layers}")
        self.symbols, self.width, self.outputs = symbols, 2 * width, 1
        self.embedding = _table(symbols + 1, width, generator)
        self.blocks = nn.ModuleList([_linear(3 * width, width, generator, 1.4) for _ in range(layers)])
        self.head: nn.Module = _linear(2 * width, symbols, generator)

    def features(self, z: Tensor) -> Tensor:
        """[b, L, h], twice the width: of the windows, and of their mean over the sequence."""
        hidden = _embedded(self.embedding, z)
        for block in self.blocks:
            around = functional.pad(hidden, (0, 0, 1, 1))
            hidden = functional.silu(block(torch.cat([around[:, :-2], hidden, around[:, 2:]], dim=-1)))
        return torch.cat([hidden, hidden.mean(1, keepdim=True).expand_as(hidden)], dim=-1)

    def forward(self, z: Tensor, t: Tensor | None = None) -> Tensor:
        """Logits [b, L, V]."""
        return self.head(self.features(z))


class SpectralLinear(nn.Module):
    """A linear layer whose weight is divided by its largest singular value, so that it stretches nothing.

    The value comes from power iteration, a step at each call in training mode. Source: Miyato et al. 2018
    (arXiv 1802.05957).
    """

    def __init__(self, inputs: int, outputs: int, *, generator: torch.Generator) -> None:
        super().__init__()
        layer = _linear(inputs, outputs, generator)
        self.weight, self.bias = layer.weight, layer.bias
        left = torch.randn(outputs, generator=generator)
        self.left: Tensor
        self.right: Tensor
        self.register_buffer("left", functional.normalize(left, dim=0))
        self.register_buffer("right", torch.zeros(inputs))
        self._iterate(15)

    @torch.no_grad()
    def _iterate(self, times: int) -> None:
        left, right = self.left, self.right
        for _ in range(times):
            right = functional.normalize(self.weight.T @ left, dim=0, eps=1e-12)
            left = functional.normalize(self.weight @ right, dim=0, eps=1e-12)
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        if self.training:
            self._iterate(1)
        value = torch.dot(self.left, self.weight @ self.right)
        return functional.linear(x, self.weight / value, self.bias)


class TokenDiscriminator(nn.Module):
    """A logit for each position [b, L], whether z comes from the reference (high) or from the student (low).

    A copy of a denoiser with a head of its own, spectrally normalised: linear, SiLU, linear. `trained` says how many of
    the last blocks learn, with what follows them; the rest is frozen. None: all of it learns, which a backbone needs
    that was no denoiser before. spectral=False: a plain linear head, for a `FlatDenoiser`, whose one normalised matrix
    for all positions would hold every logit close to 0.
    """

    def __init__(
        self,
        backbone: FlatDenoiser | TransformerDenoiser | WindowDenoiser,
        *,
        trained: int | None = 4,
        spectral: bool = True,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if trained is not None and trained < 0:
            raise ConfigError(f"trained is a number of blocks from 0 on, and is {trained}")
        self.backbone = copy.deepcopy(backbone).requires_grad_(trained is None)
        for block in self.backbone.blocks[max(0, len(self.backbone.blocks) - (trained or 0)) :]:
            block.requires_grad_()
        if isinstance(self.backbone, TransformerDenoiser):
            self.backbone.norm.requires_grad_()
        if not spectral:
            self.backbone.head = _linear(backbone.width, backbone.outputs, generator, 0.1)
            return
        self.backbone.head = nn.Sequential(
            SpectralLinear(backbone.width, backbone.width, generator=generator),
            nn.SiLU(),
            SpectralLinear(backbone.width, backbone.outputs, generator=generator),
        )

    def forward(self, z: Tensor, t: Tensor | None = None) -> Tensor:
        """Logits [b, L] of symbols [b, L], or of weights over them [b, L, V + 1]."""
        return self.backbone(z, t).view(len(z), z.shape[1])
