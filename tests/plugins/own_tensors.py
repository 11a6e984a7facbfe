"Training on two tensors: images in [-1, 1] and their labels."

import torch

from selfflow import Config, train
from selfflow.training.config import TrainConfig

labels = torch.arange(200) % 4
images = (
    torch.linspace(-1, 1, 4)[labels][:, None, None, None]
    .expand(-1, 1, 8, 8)
    .contiguous()
)
train(
    Config("tensors", training=TrainConfig(steps=2, batch=8)),
    data=(images, labels),
    bar=False,
)
