"""What is compared: each method is flags of the training script, or parameters that the script does not have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from peft import FourierFTConfig, IA3Config, OFTConfig, TinyLoraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn

from coeff_diffusers import add_coeff_adapter, coeff_parameters

Parameters = dict[str, list[nn.Parameter]]  # "coefficients" and "lora", which have a learning rate each

SOAP, ADAMW = ({"optimizer": name, "adam_weight_decay": 0.0} for name in ("soap", "adamw"))  # a LoRA has AdamW
DECAY = {"adam_weight_decay": 0.3}  # as the training script has it
AUGMENT = {"augment": 0.25, "augment_words": ("small=small", "large=large")}
VALUES = ("to_v", "to_out.0")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@dataclass(frozen=True, eq=False)  # equal to itself alone, so that it can be a key
class Method:
    """A way to personalise the frozen model.

    Args:
        name: in the table.
        rates: that are tried on the tuning subjects; empty if nothing is trained.
        flags: of the training script.
        put_on: denoiser -> the parameters to train, in place of the script's.
        lora_rate_of: the LoRA whose tuned rate the LoRA in this method takes; `rates` are then the coefficients'.
        models: that it can be put on.
        class_images: prior preservation by images of the likest glyph, in all sizes and places, with captions of them.
        trained_as: the method whose training and rates it shares, where it differs at inference alone.
        weight: of the coefficients at inference.
        timesteps: from which to which, of 1000, they are active at inference.
    """

    name: str
    rates: tuple[float, ...] = ()
    flags: dict[str, Any] = field(default_factory=dict)
    put_on: Callable[[Any], Parameters] | None = None
    lora_rate_of: str | None = None
    models: tuple[str, ...] = ("unet", "dit")
    class_images: bool = False
    trained_as: str | None = None
    weight: float = 1.0
    timesteps: tuple[int, int] | None = None

    def settings(self, rate: float, lora_rate: float | None = None) -> dict[str, Any]:
        """The flags, with one rate for both kinds of parameters if there is no `lora_rate`."""
        return {**self.flags, "learning_rate": rate, "lora_learning_rate": lora_rate or rate}


# ---------------------------------------------------------------------------------------- beside the training script


def output_mixing(coefficients: bool) -> Callable[[Any], Parameters]:
    """out_i += sum_j gamma_ij out_j, before the heads are joined; `gamma` (H, H) a layer starts at zero.

    Args:
        coefficients: whether Delta is trained beside it.
    """

    def put_on(denoiser: Any) -> Parameters:
        parameters = []
        if coefficients:
            add_coeff_adapter(denoiser)
            parameters += coeff_parameters(denoiser)
        for attention in [module for module in denoiser.modules() if isinstance(module, Attention)]:
            gamma = nn.Parameter(torch.zeros(attention.heads, attention.heads))
            parameters.append(gamma)
            for projection in output_projections(attention):
                projection.register_forward_pre_hook(lambda _, inputs, gamma=gamma: (mixed(inputs[0], gamma),))
        return {"coefficients": parameters}

    return put_on


def output_projections(attention: Any) -> list[nn.Module]:
    """Of images, and of text in joint attention."""
    text = getattr(attention, "to_add_out", None)
    return [attention.to_out[0], *([] if text is None else [text])]


def mixed(outputs: Tensor, gamma: Tensor) -> Tensor:
    """Heads' outputs side by side, (B, T, H * D), each with gamma's share of the others."""
    heads = outputs.unflatten(-1, (len(gamma), -1))
    return (heads + torch.einsum("ij, btjd -> btid", gamma, heads)).flatten(-2)


def random_start(denoiser: Any) -> Parameters:
    """alpha in place of I + Delta, from a random start as a linear layer has it: the paper's ablation."""
    add_coeff_adapter(denoiser)
    parameters = coeff_parameters(denoiser)
    with torch.no_grad():
        for coeff in parameters:
            bound = len(coeff) ** -0.5
            coeff.uniform_(-bound, bound).sub_(torch.eye(len(coeff)))  # the file has alpha - I
    return {"coefficients": parameters}


def of_peft(config: Any) -> Callable[[Any], Parameters]:
    def put_on(denoiser: Any) -> Parameters:
        get_peft_model(denoiser, copy.deepcopy(config))  # puts its layers into the denoiser
        return {"lora": [parameter for parameter in denoiser.parameters() if parameter.requires_grad]}

    return put_on


def lora_xs(rank: int) -> Callable[[Any], Parameters]:
    """W + U S R V^T of W's own largest singular vectors, R (rank, rank) trained from zero: arXiv 2405.17604."""

    def put_on(denoiser: Any) -> Parameters:
        parameters = []
        for path, layer in denoiser.named_modules():
            if isinstance(layer, nn.Linear) and path.endswith(tuple(ATTENTION)):
                u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
                core = nn.Parameter(torch.zeros(rank, rank))
                parameters.append(core)
                left, right = u[:, :rank] * s[:rank], v[:rank]
                layer.register_forward_hook(
                    lambda _, inputs, output, left=left, right=right, core=core: (
                        output + inputs[0] @ right.T @ core.T @ left.T
                    )
                )
        return {"coefficients": parameters}

    return put_on


def all_weights(denoiser: Any) -> Parameters:
    denoiser.requires_grad_(True)
    return {"lora": list(denoiser.parameters())}


# ------------------------------------------------------------------------------------------------------------- lists

COEFFICIENTS = (1e-2, 2e-2, 4e-2)
LOW_RANK = (2.5e-3, 5e-3, 1e-2)
RANK_16, RANK_4, RANK_1 = ({"coeff": False, "lora_rank": rank} for rank in (16, 4, 1))
RANK_1_VALUES = RANK_1 | {"lora_layers": VALUES}
BOTH = {"coeff": True}

UNTRAINED = [
    Method("true scenes"),  # the ceiling of each measure
    Method("true scenes through the autoencoder"),
    Method("base model"),  # the floor, and a prompt alone
    Method("base model, prompt of the likest glyph"),
]

MAIN = [
    Method("coefficients, SOAP", COEFFICIENTS, SOAP),
    Method("LoRA, rank 4", LOW_RANK, RANK_4),
    Method("LoRA, rank 4 + coefficients", COEFFICIENTS, SOAP | RANK_4 | BOTH, lora_rate_of="LoRA, rank 4"),
    Method("coefficients, AdamW", COEFFICIENTS, ADAMW),
    Method("LoRA, rank 1 on values and outputs", COEFFICIENTS, RANK_1_VALUES, models=("unet",)),
    Method("output mixing, SOAP", COEFFICIENTS, SOAP, output_mixing(coefficients=False)),
    Method("coefficients + output mixing, SOAP", COEFFICIENTS, SOAP, output_mixing(coefficients=True)),
]

WITH_MORE = [
    Method("coefficients, SOAP, weight decay 0.3", COEFFICIENTS, SOAP | DECAY),
    Method("coefficients, SOAP, augmented", COEFFICIENTS, SOAP | AUGMENT),
    Method("coefficients, SOAP, weight decay 0.3, augmented", COEFFICIENTS, SOAP | DECAY | AUGMENT),
    Method("LoRA, rank 4, augmented", LOW_RANK, RANK_4 | AUGMENT),
]

DEFAULT = "coefficients, SOAP, weight decay 0.3"
COMPOSITION = [
    Method(f"{DEFAULT}, class images", COEFFICIENTS, SOAP | DECAY, class_images=True),
    Method(f"{DEFAULT}, weight 0.8", COEFFICIENTS, trained_as=DEFAULT, weight=0.8),
    Method(f"{DEFAULT}, weight 0.6", COEFFICIENTS, trained_as=DEFAULT, weight=0.6),
    Method(f"{DEFAULT}, early steps", COEFFICIENTS, trained_as=DEFAULT, timesteps=(500, 1000), models=("unet",)),
    Method(f"{DEFAULT}, late steps", COEFFICIENTS, trained_as=DEFAULT, timesteps=(0, 500), models=("unet",)),
    Method(f"{DEFAULT}, decoder", COEFFICIENTS, SOAP | DECAY | {"coeff_include": ("up_blocks.*",)}, models=("unet",)),
]

MORE = [
    Method("LoRA, rank 1", (5e-3, 1e-2, 2e-2), RANK_1),
    Method("LoRA, rank 1 + coefficients", COEFFICIENTS, SOAP | RANK_1 | BOTH, lora_rate_of="LoRA, rank 1"),
    Method("LoRA-XS, SOAP", COEFFICIENTS, SOAP, lora_xs(10)),
    Method("full fine-tuning", (1e-4, 3e-4, 1e-3), ADAMW, all_weights),
    Method("LoRA, rank 16", LOW_RANK, RANK_16),
    Method("LoRA, rank 16 + coefficients", COEFFICIENTS, SOAP | RANK_16 | BOTH, lora_rate_of="LoRA, rank 16"),
    Method(
        "IA3",
        (2e-2, 5e-2, 1e-1),
        ADAMW,
        of_peft(
            IA3Config(
                target_modules=["to_k", "to_v", "add_k_proj", "add_v_proj", "ff.net.2"],
                feedforward_modules=["ff.net.2"],
            )
        ),
    ),
    Method("OFT", LOW_RANK, ADAMW, of_peft(OFTConfig(r=0, oft_block_size=4, target_modules=ATTENTION))),
    Method("VeRA", COEFFICIENTS, ADAMW, of_peft(VeraConfig(r=16, target_modules=ATTENTION))),
    Method("FourierFT", COEFFICIENTS, ADAMW, of_peft(FourierFTConfig(n_frequency=100, target_modules=ATTENTION))),
    Method("TinyLoRA", COEFFICIENTS, ADAMW, of_peft(TinyLoraConfig(r=10, u=100, target_modules=ATTENTION))),
]

ABLATIONS = [
    Method("coefficients, SOAP, self-attention", COEFFICIENTS, SOAP | {"coeff_kinds": ("self",)}, models=("unet",)),
    Method("coefficients, SOAP, cross-attention", COEFFICIENTS, SOAP | {"coeff_kinds": ("cross",)}, models=("unet",)),
    Method("coefficients, SOAP, dropout 0.1", COEFFICIENTS, SOAP | {"coeff_dropout": 0.1}),
    Method("coefficients, SOAP, dropout 0.2", COEFFICIENTS, SOAP | {"coeff_dropout": 0.2}),
    Method("alpha from a random start, SOAP", COEFFICIENTS, SOAP, random_start),
]

METHODS = {method.name: method for method in [*UNTRAINED, *MAIN, *WITH_MORE, *COMPOSITION, *MORE, *ABLATIONS]}
