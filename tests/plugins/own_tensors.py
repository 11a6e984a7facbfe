"""Training on two tensors: images in [-1, 1] and their labels."""

import torch

from selfflow import Config, train
from selfflow.training.config import TrainConfig

labels = torch.arange(200) % 4
greys = torch.linspace(-1, 1, 4)[labels]
images = greys[:, None, None, None].repeat(1, 1, 8, 8)
train(
    Config("tensors", training=TrainConfig(steps=2, batch=8)),
    data=(images, labels),
    bar=False,
)
