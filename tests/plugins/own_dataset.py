"""A user's own torch data set, registered under a name with an option."""

from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from selfflow.registries import datasets


@dataclass(frozen=True)
class Options:
    thickness: int = 1  # of a stripe, pixels


class Stripes(Dataset):
    classes = ("across", "down")

    def __init__(self, count, thickness):
        self.count = count
        self.thickness = thickness

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = torch.full((1, 8, 8), -1.0)
        first = index // 2 % 8
        image[:, first : first + self.thickness] = 1
        return (image if index % 2 else image.mT.contiguous()), index % 2


@datasets.register("stripes", options=Options)
def stripes(config, split):
    return Stripes({"train": 96, "validation": 32, "test": 32}[split], config.thickness)
