"""The network that compares images: a classifier of all 136 glyphs, held-out subjects included, trained on composed
scenes and on no image of a model.

    python examples/emojibooth/judge.py        trains it again, out of the npm package emoji-datasource-google

A subject's features are the 128 numbers before its last layer, less their mean over composed scenes.
"""

from __future__ import annotations

import random
import sys
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "emoji"))
from evaluate import augmented, new_classifier, trained_classifier  # noqa: E402
from pretrain import fetch_package, to_tensor  # noqa: E402
from scenes import GLYPHS, SUBJECTS, load_glyphs  # noqa: E402

WORDS = [*GLYPHS, *SUBJECTS]
FILE = HERE / "judge.safetensors"
STEPS = 1500


class Judge:
    """Names glyphs, and measures how like they are.

    Args:
        network: of `evaluate.new_classifier`, for `WORDS`.
        mean: (128,), of features over composed scenes.
    """

    def __init__(self, network: nn.Module, mean: Tensor) -> None:
        self._trunk, self._last, self._mean = network[:-1], network[-1], mean

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 128) of length 1, for images (N, 3, 64, 64) in [-1, 1]."""
        raw = torch.cat([self._trunk(part) for part in images.split(64)])
        return torch.nn.functional.normalize(raw - self._mean, dim=1)

    @torch.no_grad()
    def names(self, images: Tensor) -> list[str]:
        """The most probable of all glyphs, trained and held out, for each image."""
        return [WORDS[i] for part in images.split(64) for i in self._last(self._trunk(part)).argmax(1)]


@cache
def load_judge(file: Path = FILE) -> Judge:
    network = new_classifier(len(WORDS))
    values = {name: value.float() for name, value in load_file(file).items()}
    mean = values.pop("mean")
    network.load_state_dict(values, strict=False)  # but for the counts of BatchNorm, which nothing reads
    return Judge(network.eval(), mean)


def main() -> None:
    torch.manual_seed(0)
    work = HERE.parent / "emoji" / "work"
    work.mkdir(exist_ok=True)
    glyphs = load_glyphs(fetch_package(work), GLYPHS | SUBJECTS)
    network = trained_classifier(glyphs, STEPS, work)
    rng = random.Random(2)
    labels = [words for words in WORDS for _ in range(8)]
    scenes = to_tensor([augmented(glyphs[words], rng) for words in labels])
    with torch.no_grad():
        mean = torch.cat([network[:-1](part) for part in scenes.split(64)]).mean(0)
    values = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file({name: value.half().contiguous() for name, value in {**values, "mean": mean}.items()}, FILE)
    named = load_judge().names(scenes)
    right = sum(name == words for name, words in zip(named, labels)) / len(labels)
    print(f"wrote {FILE} ({FILE.stat().st_size / 1e6:.1f} MB): names {right:.1%} of {len(labels)} fresh scenes")


if __name__ == "__main__":
    main()
