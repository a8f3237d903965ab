"""One module for all that takes part in a training step, so that accelerate wraps it once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..families import Family


class DenoisingStep(nn.Module):
    """From latents and prompts to the error of each image.

    What wraps models for several processes synchronises gradients in the forward pass of what it wraps. So the
    denoiser and the text encoders that are trained lie in there, and the trainable parameters by themselves, for
    coefficients are no parameters of the models that they are on.
    """

    def __init__(self, family: Family, text_encoders: list[nn.Module], trained: list[nn.Parameter]) -> None:
        super().__init__()
        self.family = family
        self.denoiser = family.denoiser
        self.text_encoders = nn.ModuleList(text_encoders)
        self.trained = nn.ParameterList(trained)
        # of no concern to what averages gradients, and not on the device if they are shared out or offloaded
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, frozen)

    def forward(
        self, moments: Tensor, prompts: list[str], sizes: Tensor, seeds: Tensor, boxes: Tensor | None = None
    ) -> Tensor:
        """Weighted squared errors (B,) of moments (B, 2, ...), prompts, sizes (B, 6) and the seeds (B,) of noise.

        In `boxes` (B, 4) alone, if there are any: top, left, bottom and right, as parts of the sides.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
        latents = self.family.sample_latents(moments, generators)
        conditions = self.family.conditions(prompts)
        return self.family.errors(self.denoiser, latents, conditions, sizes, generators, boxes)
