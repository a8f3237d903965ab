"""What turns images and prompts into the vectors that `coeff-diffusers score` compares, and LPIPS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, CLIPModel

from ..training.images.dreambooth_dataset import upright_rgb
from .requests import PromptsError, value_of

Encoder = Callable[[list[Path]], Tensor]  # images to unit vectors, (B, width)
Distance = Callable[[Path, list[Path]], float]  # mean of an image's distances to others


class Clip:
    """A CLIP model's image and text encoder."""

    def __init__(self, name_or_path: str, device: Any) -> None:
        with value_of("--clip_model"):
            answer: Any = CLIPModel.from_pretrained(name_or_path, output_loading_info=True)
            self.model, found = answer
            if missing := sorted(found["missing_keys"]):  # transformers would go on with random weights
                raise PromptsError(
                    f"{name_or_path} is no CLIP: it lacks {len(missing)} weights, such as {missing[0]}; "
                    "openai/clip-vit-base-patch32 is one"
                )
            self.processor = AutoProcessor.from_pretrained(name_or_path)
        self.model.eval().to(device)

    @torch.no_grad()
    def images(self, files: list[Path]) -> Tensor:
        inputs = self.processor(images=open_all(files), return_tensors="pt").to(self.model.device)
        return F.normalize(vectors(self.model.get_image_features(**inputs)), dim=-1)

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        inputs = self.processor(text=prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return F.normalize(vectors(self.model.get_text_features(**inputs.to(self.model.device))), dim=-1)


def vectors(features: Any) -> Tensor:
    """(B, width) of what `get_image_features` answers: a tensor, or since transformers 5 an output that holds one."""
    return features if isinstance(features, Tensor) else features.pooler_output


def first_token(flag: str, name_or_path: str, device: Any) -> Encoder:
    """The first token of a vision transformer, after its last norm: DINO's and DINOv2's vector of an image."""
    with value_of(flag):
        model = AutoModel.from_pretrained(name_or_path).eval()
        if hasattr(model.config, "text_config"):
            raise PromptsError(
                f"{name_or_path} is a {model.config.model_type}, of images and texts; take facebook/dinov2-base"
            )
        processor = AutoImageProcessor.from_pretrained(name_or_path)
    model.to(device)

    @torch.no_grad()
    def encode(files: list[Path]) -> Tensor:
        inputs = processor(images=open_all(files), return_tensors="pt").to(device)
        return F.normalize(model(**inputs).last_hidden_state[:, 0], dim=-1)

    return encode


def lpips(net: str, device: Any) -> Distance:
    """LPIPS (arXiv 1801.03924) of torchmetrics, with the network `alex`, `vgg` or `squeeze`."""
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity(net_type=net, normalize=True).to(device)  # of [0, 1]
    except ImportError as error:  # torchmetrics, or the torchvision that it needs
        raise PromptsError(f"--lpips: {error}; pip install 'coeff_diffusers[score]'") from error

    @torch.no_grad()
    def distance(file: Path, others: list[Path]) -> float:
        image, *rest = pixels([file, *others]).to(device)
        mean = float(metric(image.expand(len(rest), -1, -1, -1), torch.stack(rest)))
        metric.reset()  # it would keep every distance
        return mean

    return distance


def pixels(files: Sequence[Path]) -> Tensor:
    """(B, 3, height, width) in [0, 1]. Raises PromptsError if images of one prompt differ in size."""
    images = open_all(files)
    if len({image.size for image in images}) > 1:
        sizes = ", ".join(f"{file.name} {image.width} x {image.height}" for file, image in zip(files, images))
        raise PromptsError(f"--lpips compares images of one size, got {sizes}")
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).movedim(-1, 1) / 255


def open_all(files: Sequence[Path]) -> list[Image.Image]:
    """Raises PromptsError naming those that cannot be read as images."""
    images, problems = [], []
    for file in files:
        try:
            with Image.open(file) as image:
                images.append(upright_rgb(image, "white"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            problems.append(f"{file}: {type(error).__name__}: {error}")
    if problems:
        raise PromptsError("these cannot be read as images:\n  " + "\n  ".join(problems))
    return images
