"""A user's own backbone: an MLP-mixer that shifts each token by its noise level."""

from dataclasses import dataclass

from torch import nn

from selfflow import Output, register_backbone


@dataclass(frozen=True)
class Options:
    width: int = 32  # of the hidden states
    depth: int = 4  # layers


def mlp(size):
    return nn.Sequential(
        nn.LayerNorm(size),
        nn.Linear(size, 2 * size),
        nn.GELU(),
        nn.Linear(2 * size, size),
    )


@register_backbone("mixer", options=Options)
class Mixer(nn.Module):
    def __init__(self, inputs, width, depth):
        super().__init__()
        self.width = width
        self.depth = depth
        self.inward = nn.Linear(inputs.channels, width)
        self.outward = nn.Linear(width, inputs.channels)
        self.level = nn.Linear(1, width)
        # the last label stands for no condition
        self.label = nn.Embedding(inputs.classes + 1, width)
        self.over_tokens = nn.ModuleList(mlp(inputs.tokens) for _ in range(depth))
        self.over_channels = nn.ModuleList(mlp(width) for _ in range(depth))

    def forward(self, x, levels, condition=None, taps=(), stop=False, parts=()):
        # (b, k, d): computed for each level, then gathered for each token
        shift = self.level(levels.levels[..., None])
        assign = levels.assign[..., None].expand(-1, -1, self.width)
        h = self.inward(x) + shift.gather(1, assign)
        if condition is not None:
            h = h + self.label(condition.values)[:, None]
        features = {}
        for layer, (tokens, channels) in enumerate(
            zip(self.over_tokens, self.over_channels, strict=True), start=1
        ):
            h = h + tokens(h.mT).mT
            h = h + channels(h)
            if layer in taps:
                features[layer] = h
        return Output(None if stop else self.outward(h), features)
