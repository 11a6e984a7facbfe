"A torch data set, registered under a name, with an option of its own."

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
        self.count, self.thickness = count, thickness

    def __len__(self):
        return self.count

    def __getitem__(self, place):
        image = torch.full((1, 8, 8), -1.0)
        first = place // 2 % 8
        image[:, first : first + self.thickness] = 1
        return (image if place % 2 else image.mT.contiguous()), place % 2


@datasets.register("stripes", options=Options)
def stripes(config, split):
    return Stripes({"train": 96, "validation": 32, "test": 32}[split], config.thickness)
