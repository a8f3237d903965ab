"""One data set of all subjects that a process trains: a batch has as many images of each."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from .dreambooth_dataset import Crop, DreamBoothDataset, Example, collate


class SubjectsDataset(Dataset[dict[str, list[Example]]]):
    """Draw n of each subject: subject -> what its own data set draws.

    Args:
        datasets: subject -> its data set, all of as many draws.
    """

    def __init__(self, datasets: dict[str, DreamBoothDataset]) -> None:
        self.datasets = datasets

    def __len__(self) -> int:
        return min(len(dataset) for dataset in self.datasets.values())

    def __getitem__(self, draw: int) -> dict[str, list[Example]]:
        return {name: dataset[draw] for name, dataset in self.datasets.items()}

    # What `encode_crops` asks of a data set.

    def crops(self) -> list[Crop]:
        return list(dict.fromkeys(crop for dataset in self.datasets.values() for crop in dataset.crops()))

    def pixels(self, crop: Crop) -> Tensor:
        return next(iter(self.datasets.values())).pixels(crop)

    @property
    def moments(self) -> dict[Crop, Tensor]:
        return next(iter(self.datasets.values())).moments

    @moments.setter
    def moments(self, moments: dict[Crop, Tensor]) -> None:
        for dataset in self.datasets.values():
            dataset.moments = moments


def collate_subjects(draws: list[dict[str, list[Example]]]) -> dict[str, Any]:
    """A batch, subject after subject, with the subject of each row."""
    names = list(draws[0])
    rows = [draw[name] for name in names for draw in draws]
    kinds = len(rows[0])  # those of the subjects come first, then as many of their classes
    return collate(rows) | {"subjects": [name for name in names for _ in draws] * kinds}
