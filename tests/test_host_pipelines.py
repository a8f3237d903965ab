"""Pipelines that set processors of their own, or build models of others: coefficients go along, or it is said.

A scan of diffusers' source finds them, so that a new release shows new ones.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_models
import tiny_sd
import torch
import torch.nn.functional as F
from diffusers import (
    AnimateDiffControlNetPipeline,
    AnimateDiffPAGPipeline,
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    AnimateDiffSparseControlNetPipeline,
    AnimateDiffVideoToVideoControlNetPipeline,
    AnimateDiffVideoToVideoPipeline,
    AutoencoderKL,
    ControlNetModel,
    ControlNetXSAdapter,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    Flux2KleinKVPipeline,
    HunyuanDiT2DModel,
    HunyuanDiTPAGPipeline,
    LEditsPPPipelineStableDiffusion,
    LEditsPPPipelineStableDiffusionXL,
    MotionAdapter,
    PIAPipeline,
    PixArtSigmaPAGPipeline,
    SanaPAGPipeline,
    SparseControlNetModel,
    StableDiffusion3PAGImg2ImgPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusionAttendAndExcitePipeline,
    StableDiffusionControlNetPAGInpaintPipeline,
    StableDiffusionControlNetPAGPipeline,
    StableDiffusionControlNetXSPipeline,
    StableDiffusionPAGImg2ImgPipeline,
    StableDiffusionPAGInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPix2PixZeroPipeline,
    StableDiffusionSAGPipeline,
    StableDiffusionXLControlNetPAGImg2ImgPipeline,
    StableDiffusionXLControlNetPAGPipeline,
    StableDiffusionXLControlNetXSPipeline,
    StableDiffusionXLPAGImg2ImgPipeline,
    StableDiffusionXLPAGInpaintPipeline,
    StableDiffusionXLPAGPipeline,
    TextToVideoZeroPipeline,
    TextToVideoZeroSDXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.pipelines.pag.pipeline_pag_kolors import KolorsPAGPipeline
from hosts import randomise, visible
from model_zoo import HUNYUAN_DIT, build, call
from PIL import Image
from test_host_api import problems

from coeff_diffusers import (
    CoeffAttnProcessor,
    add_coeff_adapter,
    check_coeff_adapters,
    coeff_disabled,
    coeff_per_sample,
    coeff_state_dict,
    list_coeff_adapters,
    load_coeff_weights,
    save_coeff_weights,
    set_coeff_adapters,
    unload_coeff_weights,
)
from coeff_diffusers.layers import attention_layers

# Files of diffusers/pipelines that set processors or copy weights from model to model, and what that means here. Every
# word is a column of the table of docs/compatibility.md; "none" has nothing to do with the coefficients of a user.
FILES = {
    "animatediff/pipeline_animatediff.py": "builds",
    "animatediff/pipeline_animatediff_controlnet.py": "builds",
    "animatediff/pipeline_animatediff_sdxl.py": "builds",
    "animatediff/pipeline_animatediff_sparsectrl.py": "builds",
    "animatediff/pipeline_animatediff_video2video.py": "builds",
    "animatediff/pipeline_animatediff_video2video_controlnet.py": "builds",
    "audioldm2/modeling_audioldm2.py": "none",  # a model's own set_attn_processor
    "deprecated/controlnet_xs/pipeline_controlnet_xs.py": "builds",
    "deprecated/controlnet_xs/pipeline_controlnet_xs_sd_xl.py": "builds",
    "deprecated/pia/pipeline_pia.py": "builds",
    "deprecated/stable_diffusion_attend_and_excite/pipeline_stable_diffusion_attend_and_excite.py": "own softmax",
    "deprecated/stable_diffusion_sag/pipeline_stable_diffusion_sag.py": "own softmax",
    "deprecated/stable_diffusion_variants/pipeline_stable_diffusion_pix2pix_zero.py": "own softmax",
    "deprecated/text_to_video_synthesis/pipeline_text_to_video_zero.py": "goes along",
    "deprecated/text_to_video_synthesis/pipeline_text_to_video_zero_sdxl.py": "goes along",
    "deprecated/versatile_diffusion/modeling_text_unet.py": "none",  # as above
    "deprecated/wuerstchen/modeling_wuerstchen_prior.py": "none",  # as above
    "flux2/pipeline_flux2_klein_kv.py": "sets once",
    "free_noise_utils.py": "rebuilds",
    "kandinsky3/convert_kandinsky3_unet.py": "none",  # a script
    "ledits_pp/pipeline_leditspp_stable_diffusion.py": "own softmax",
    "ledits_pp/pipeline_leditspp_stable_diffusion_xl.py": "own softmax",
    "ltx2/duration_head.py": "none",  # of a model that has no maps to mix
    "pipeline_utils.py": "none",  # fuse_qkv_projections, tested in test_host_api.py
    "stable_diffusion/convert_from_ckpt.py": "none",  # a script
    "z_image/pipeline_z_image_controlnet.py": "shares",
    "z_image/pipeline_z_image_controlnet_inpaint.py": "shares",
}
COMPATIBILITY = Path(__file__).parents[1] / "docs" / "compatibility.md"
SETS = re.compile(r"\.set_attn_processor\(|\.processor = |\.set_processor\(")
BUILDS = re.compile(r"\w+\.from_(unet2d|unet|transformer)\(|\.load_state_dict\(")


def test_the_pipelines_that_do_so_are_known() -> None:
    folder = Path(diffusers.__file__).parent / "pipelines"
    texts = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.py")}
    found = {path for path, text in texts.items() if SETS.search(text) or BUILDS.search(text)}
    guided = {path for path in found if path.startswith("pag/")}  # all of which go along, by one mixin
    assert found - guided == set(FILES), "to be looked at, and put into docs/compatibility.md"
    assert {path for path in guided if "_set_pag_attn_processor" not in texts[path]} == set()


def made(pipeline: type, pipe: Any, **more: Any) -> Any:
    """Of the components of another pipeline."""
    names = inspect.signature(pipeline.__init__).parameters
    made = pipeline(**{name: part for name, part in (pipe.components | more).items() if name in names})
    made.set_progress_bar_config(disable=True)
    return made


def sd() -> Any:
    pipe = tiny_sd.tiny_pipeline()
    pipe.unet.eval()
    return pipe


def image(side: int) -> Image.Image:
    return Image.fromarray((np.random.default_rng(0).random((side, side, 3)) * 255).astype("uint8"))


def run(pipe: Any, **settings: Any) -> np.ndarray:
    settings = {"prompt": "a fox", "num_inference_steps": 1, "output_type": "np"} | settings
    out = pipe(**settings, generator=torch.Generator().manual_seed(0))
    return np.asarray(out.frames if hasattr(out, "frames") else out.images)


def family(name: str, pipeline: type, **more: Any) -> Any:
    return made(pipeline, tiny_models.tiny_pipeline(name), **more)


def with_controlnet(pipe: Any, pipeline: type) -> Any:
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8)).eval()
    return made(pipeline, pipe, controlnet=controlnet, pag_applied_layers=["mid"])


def motion_adapter(unet: Any, **more: Any) -> MotionAdapter:
    torch.manual_seed(0)
    adapter = MotionAdapter(
        block_out_channels=unet.config.block_out_channels, motion_layers_per_block=1, motion_num_attention_heads=2,
        motion_norm_num_groups=4, **more,
    )  # fmt: skip
    return visible(adapter).eval()


def prompt_embeddings(**shapes: tuple[int, ...]) -> dict[str, Any]:
    """In the place of a prompt, where the text encoders need packages or sizes that the tests do without."""
    r = torch.Generator().manual_seed(0)
    given = {name: torch.randn(1, *shape, generator=r) for name, shape in shapes.items()}
    return {"prompt": None} | given | {f"negative_{name}": -tensor for name, tensor in given.items()}


def hunyuan_dit() -> Any:
    torch.manual_seed(0)
    transformer = visible(HunyuanDiT2DModel(**HUNYUAN_DIT | {"num_layers": 2}).eval())
    vae = AutoencoderKL(**tiny_models._vae_config(blocks=4))  # the pipeline expects that images shrink by 8
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    parts = {"transformer": transformer, "vae": vae, "scheduler": DDPMScheduler()} | none
    return made(HunyuanDiTPAGPipeline, sd(), **parts, pag_applied_layers=["blocks.1"])


@contextmanager
def mixed_by_hand(pipe: Any) -> Iterator[None]:
    """The base model, but for each layer's first call for attention, which mixes by the formula."""
    alphas: list[torch.Tensor] = []
    sdpa = F.scaled_dot_product_attention

    def mix(q: Any, k: Any, v: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not alphas:
            return sdpa(q, k, v, attn_mask, *args, **kwargs)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if attn_mask is not None:
            scores = scores + attn_mask
        return torch.einsum("ij,bjts->bits", alphas.pop(), scores.softmax(-1)) @ v

    handles = []
    for part in pipe.components.values():
        for layer in attention_layers(part).values() if hasattr(part, "attn_processors") else ():
            if isinstance(layer.processor, CoeffAttnProcessor):
                alpha = torch.eye(layer.processor.num_heads) + layer.processor.coeff["default"].detach()
                handles.append(layer.register_forward_pre_hook(lambda *_, alpha=alpha: alphas.append(alpha)))
                handles.append(layer.register_forward_hook(lambda *_: alphas.clear()))
    with coeff_disabled(pipe), pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", mix)
        yield
    for handle in handles:
        handle.remove()


def assert_mixed(mixed: np.ndarray, by_hand: np.ndarray, base: np.ndarray) -> None:
    change = np.abs(mixed - base).max()
    assert change > 1e-3  # of a range of 1; float error is 1e-5
    # float32 by another order of sums, which guidance and further steps enlarge
    np.testing.assert_allclose(mixed, by_hand, atol=0.01 * change)


XL, SD3, VIDEO = "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", {"num_frames": 3, "height": 16, "width": 16}
MID, BLOCK = {"pag_applied_layers": ["mid"]}, {"pag_applied_layers": [r"blocks\.1\.attn$"]}
IMAGE, INPAINT = ({"image": image(16), "strength": 1.0} | more for more in ({}, {"mask_image": image(16)}))
PAG = {"pag_scale": 3.0}

# What sets its processors in its own call, and takes them off after it: a pipeline, and the settings of a call.
GO_ALONG: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "SD": (lambda: made(StableDiffusionPAGPipeline, sd(), **MID), PAG),
    "SD, no other guidance": (lambda: made(StableDiffusionPAGPipeline, sd(), **MID), PAG | {"guidance_scale": 0.0}),
    "SD from an image": (lambda: made(StableDiffusionPAGImg2ImgPipeline, sd(), **MID), PAG | IMAGE),
    "SD inpainting": (lambda: made(StableDiffusionPAGInpaintPipeline, sd(), **MID), PAG | INPAINT),
    "SD ControlNet": (
        lambda: with_controlnet(sd(), StableDiffusionControlNetPAGPipeline), PAG | {"image": image(16)}),
    "SD ControlNet inpainting": (
        lambda: with_controlnet(sd(), StableDiffusionControlNetPAGInpaintPipeline),
        PAG | INPAINT | {"control_image": image(16)}),
    "SDXL": (partial(family, XL, StableDiffusionXLPAGPipeline, **MID), PAG),
    "SDXL from an image": (partial(family, XL, StableDiffusionXLPAGImg2ImgPipeline, **MID), PAG | IMAGE),
    "SDXL inpainting": (partial(family, XL, StableDiffusionXLPAGInpaintPipeline, **MID), PAG | INPAINT),
    "SDXL ControlNet": (
        lambda: with_controlnet(tiny_models.tiny_pipeline(XL), StableDiffusionXLControlNetPAGPipeline),
        PAG | {"image": image(32)}),
    "SDXL ControlNet from an image": (
        lambda: with_controlnet(tiny_models.tiny_pipeline(XL), StableDiffusionXLControlNetPAGImg2ImgPipeline),
        PAG | {"image": image(32), "control_image": image(32), "strength": 1.0}),
    "SD 3": (partial(family, SD3, StableDiffusion3PAGPipeline, **BLOCK),
             PAG | tiny_models.call_settings(SD3, num_inference_steps=1)),
    "SD 3 from an image": (
        partial(family, SD3, StableDiffusion3PAGImg2ImgPipeline, **BLOCK),
        PAG | tiny_models.call_settings(SD3, num_inference_steps=1) | {"image": image(32), "strength": 1.0}),
    "PixArt-Sigma": (
        partial(family, "PixArtSigmaPipeline", PixArtSigmaPAGPipeline, pag_applied_layers=["blocks.0"]),
        PAG | tiny_models.call_settings("PixArtSigmaPipeline", num_inference_steps=1)),
    "Sana": (
        partial(family, "SanaPipeline", SanaPAGPipeline, pag_applied_layers=["blocks.0"]),
        PAG | tiny_models.call_settings("SanaPipeline", num_inference_steps=1)),
    "Kolors": (  # by its module: under diffusers' own name it asks for sentencepiece
        partial(family, XL, KolorsPAGPipeline, text_encoder=None, tokenizer=None, **MID),
        PAG | prompt_embeddings(prompt_embeds=(5, 32), pooled_prompt_embeds=(16,))),
    "HunyuanDiT": (
        hunyuan_dit,
        PAG | prompt_embeddings(prompt_embeds=(5, 8), prompt_embeds_2=(5, 8)) | {
            "height": 32, "width": 32, "use_resolution_binning": False,
            **{f"{negative}prompt_attention_mask{number}": torch.ones(1, 5)
               for negative in ("", "negative_") for number in ("", "_2")}}),
    "AnimateDiff": (
        lambda: made(AnimateDiffPAGPipeline, (pipe := sd()), motion_adapter=motion_adapter(pipe.unet),
                     pag_applied_layers=["mid_block.*attn1"]), PAG | VIDEO),
    "TextToVideoZero": (
        lambda: made(TextToVideoZeroPipeline, sd()), {"video_length": 2, "num_inference_steps": 4, "t0": 1, "t1": 2}),
    "SDXL TextToVideoZero": (
        partial(family, XL, TextToVideoZeroSDXLPipeline),
        {"video_length": 2, "num_inference_steps": 4, "t0": 1, "t1": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", GO_ALONG)
def test_processors_of_one_call_take_the_coefficients_along(name) -> None:
    make, settings = GO_ALONG[name]
    pipe = make()
    base = run(pipe, **settings)
    add_coeff_adapter(pipe)
    processors = [layer.processor for part in pipe.components.values() if hasattr(part, "attn_processors")
                  for layer in attention_layers(part).values()]  # fmt: skip
    randomise(pipe)
    mixed = run(pipe, **settings)
    assert problems(pipe) == []
    after = [layer.processor for part in pipe.components.values() if hasattr(part, "attn_processors")
             for layer in attention_layers(part).values()]  # fmt: skip
    assert all(one is other for one, other in zip(after, processors, strict=True))
    with coeff_disabled(pipe):
        np.testing.assert_array_equal(run(pipe, **settings), base)
    with mixed_by_hand(pipe):
        assert_mixed(mixed, run(pipe, **settings), base)


def test_perturbed_layers_mix_what_is_not_perturbed() -> None:
    """A difference in the layer with perturbed guidance alone shows in the image."""
    pipe = made(StableDiffusionPAGPipeline, sd(), **MID)
    add_coeff_adapter(pipe)
    randomise(pipe)
    path = "mid_block.attentions.0.transformer_blocks.0.attn1"
    whole = run(pipe, **PAG)
    set_coeff_adapters(pipe, "default", {path: 0.0})
    assert np.abs(run(pipe, **PAG) - whole).max() > 1e-3


@pytest.mark.parametrize("guidance", [7.5, 0.0], ids=["guided", "unguided"])
def test_each_image_of_perturbed_guidance_has_its_own_adapter(guidance) -> None:
    pipe = made(StableDiffusionPAGPipeline, sd(), pag_applied_layers=["down", "mid", "up"])
    settings = PAG | {"guidance_scale": guidance}
    for seed, name in enumerate(("dog", "cat")):
        add_coeff_adapter(pipe, adapter_name=name)
        randomise(pipe, name, seed)
    alone = []
    for name in ("dog", "cat"):
        set_coeff_adapters(pipe, name)
        alone.append(run(pipe, **settings)[0])
    seeds = [torch.Generator().manual_seed(0) for _ in alone]
    with coeff_per_sample(pipe, ["dog", "cat"]):
        both = pipe(["a fox"] * 2, num_inference_steps=1, output_type="np", generator=seeds, **settings).images
    np.testing.assert_allclose(both, np.stack(alone), atol=1e-4)  # float32, another batch
    assert np.abs(alone[0] - alone[1]).max() > 1e-2


def like(unet: Any, **config: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return visible(UNet2DConditionModel.from_config({**unet.config, **config}).eval())


def three_levels() -> UNet2DConditionModel:
    """As many as LEDITS++ takes maps from."""
    torch.manual_seed(0)
    config = {"down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3}
    config |= {"sample_size": 16, "block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
    return visible(UNet2DConditionModel(**config, cross_attention_dim=16, attention_head_dim=(2, 4, 4)).eval())


def three_levels_xl() -> UNet2DConditionModel:
    return like(
        tiny_models.tiny_pipeline(XL).unet, block_out_channels=(8, 16, 16), transformer_layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4, 4),
    )  # fmt: skip


def invert_and_edit(pipe: Any) -> np.ndarray:
    pipe.invert(image(32), num_inversion_steps=4, skip=0.1, generator=torch.Generator().manual_seed(0))
    edit = {"editing_prompt": ["a fox"], "edit_guidance_scale": [5.0], "edit_threshold": [0.7], "output_type": "np"}
    return np.asarray(pipe(**edit, generator=torch.Generator().manual_seed(0)).images)


def sag() -> Any:
    pipe = sd()
    pipe.unet.register_to_config(attention_head_dim=[2, 4])  # the type that this pipeline reads
    return made(StableDiffusionSAGPipeline, pipe)


SOLVER = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
OWN_SOFTMAX: dict[str, tuple[Callable[[], Any], Callable[[Any], np.ndarray], bool]] = {
    # and whether the processors are put back after the call
    "SAG": (sag, partial(run, sag_scale=1.0), True),
    "Attend-and-Excite": (
        lambda: made(StableDiffusionAttendAndExcitePipeline, sd()),
        partial(run, token_indices=[2, 5], max_iter_to_alter=1, attn_res=(8, 8)), True),
    "LEDITS++": (
        lambda: made(LEditsPPPipelineStableDiffusion, sd(), unet=three_levels(),
                     scheduler=DPMSolverMultistepScheduler(**SOLVER)), invert_and_edit, False),
    "SDXL LEDITS++": (
        lambda: family(XL, LEditsPPPipelineStableDiffusionXL, unet=three_levels_xl(),
                       scheduler=DPMSolverMultistepScheduler(**SOLVER)), invert_and_edit, False),
    "Pix2PixZero": (
        lambda: made(StableDiffusionPix2PixZeroPipeline, sd(),
                     **dict.fromkeys(("inverse_scheduler", "caption_generator", "caption_processor"))),
        partial(run, source_embeds=torch.zeros(1, 16, 16), target_embeds=torch.ones(1, 16, 16)), False),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_SOFTMAX)
def test_pipelines_that_form_maps_themselves_are_refused_and_the_ways_out_work(name) -> None:
    make, use, put_back = OWN_SOFTMAX[name]
    pipe = make()
    base = use(make())
    add_coeff_adapter(pipe)
    randomise(pipe)
    with pytest.raises(RuntimeError, match=r"can take part: call model.set_attn_processor\(AttnP.*If a"):
        use(pipe)
    with coeff_disabled(pipe):
        np.testing.assert_array_equal(use(pipe), base)
    assert problems(pipe)  # processors that the pipeline has left behind, for it was stopped or leaves them always
    with pytest.raises(ValueError, match=r"First call model.set_attn_processor\(AttnProcessor2_0\(\)\)"):
        set_coeff_adapters(pipe, "default")
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    set_coeff_adapters(pipe, "default")
    assert problems(pipe) == []
    with coeff_disabled(pipe):
        np.testing.assert_array_equal(use(pipe), base)
    assert (problems(pipe) == []) == put_back
    unload_coeff_weights(pipe)


def test_a_layer_whose_maps_a_pipeline_takes_can_be_left_out() -> None:
    pipe = sag()
    base = run(pipe, sag_scale=1.0)
    add_coeff_adapter(pipe)
    randomise(pipe)
    set_coeff_adapters(pipe, "default", {"mid_block.attentions.0.transformer_blocks.0.attn1": 0})
    assert np.abs(run(pipe, sag_scale=1.0) - base).max() > 1e-2  # the other layers are mixed
    assert problems(pipe) == []


def sparse_controlnet() -> SparseControlNetModel:
    torch.manual_seed(0)
    config = {"down_block_types": ("CrossAttnDownBlockMotion",) * 2, "block_out_channels": (8, 16)}
    config |= {"layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 2}
    config |= {"motion_num_attention_heads": 2, "conditioning_embedding_out_channels": (4, 8)}
    return visible(SparseControlNetModel(**config)).eval()


def moving(unet: Any, **more: Any) -> dict[str, Any]:
    return {"motion_adapter": motion_adapter(unet, **more)}


def controlled(unet: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return {"controlnet": ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8)).eval()}


def controlled_xs(unet: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    adapter = ControlNetXSAdapter.from_unet(unet, size_ratio=0.5, conditioning_embedding_out_channels=(4, 8))
    return {"controlnet": visible(adapter).eval()}


def two_layers(pipe: Any) -> Any:
    """As many in each block as ControlNet-XS takes for granted."""
    pipe.unet = like(pipe.unet, layers_per_block=2)
    return pipe


FROM_VIDEO = {"video": [image(16)] * 3, "height": 16, "width": 16, "strength": 1.0}
# What builds a model of the UNet: a tuned pipeline, the class, further components, and the settings of a call.
BUILT: dict[str, tuple[Callable[[], Any], type, Callable[[Any], dict[str, Any]], dict[str, Any]]] = {
    "AnimateDiff": (sd, AnimateDiffPipeline, moving, VIDEO),
    "AnimateDiff ControlNet": (
        sd, AnimateDiffControlNetPipeline, lambda unet: moving(unet) | controlled(unet),
        VIDEO | {"conditioning_frames": [image(16)] * 3}),
    "AnimateDiff SparseCtrl": (
        sd, AnimateDiffSparseControlNetPipeline, lambda unet: moving(unet) | {"controlnet": sparse_controlnet()},
        VIDEO | {"conditioning_frames": [image(16)], "controlnet_frame_indices": [0]}),
    "AnimateDiff SDXL": (
        partial(tiny_models.tiny_pipeline, XL), AnimateDiffSDXLPipeline,
        partial(moving, use_motion_mid_block=False), VIDEO | {"height": 32, "width": 32}),
    "AnimateDiff from a video": (sd, AnimateDiffVideoToVideoPipeline, moving, FROM_VIDEO),
    "AnimateDiff ControlNet from a video": (
        sd, AnimateDiffVideoToVideoControlNetPipeline, lambda unet: moving(unet) | controlled(unet),
        FROM_VIDEO | {"conditioning_frames": [image(16)] * 3}),
    "PIA": (
        sd, PIAPipeline, partial(moving, use_motion_mid_block=False, conv_in_channels=9),
        VIDEO | {"image": image(16)}),
    "ControlNet-XS": (
        lambda: two_layers(sd()), StableDiffusionControlNetXSPipeline, controlled_xs, {"image": image(16)}),
    "SDXL ControlNet-XS": (
        lambda: two_layers(tiny_models.tiny_pipeline(XL)), StableDiffusionXLControlNetXSPipeline, controlled_xs,
        {"image": image(32)}),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILT)
def test_a_pipeline_built_of_a_tuned_model_says_what_it_lacks_and_takes_it_in_one_line(name, caplog) -> None:
    make, pipeline, more, settings = BUILT[name]
    tuned = make()
    parts = more(tuned.unet)
    add_coeff_adapter(tuned)
    randomise(tuned)
    pipe = made(pipeline, tuned, **parts)
    assert caplog.text.count("load_coeff_weights(copy, coeff_state_dict(model)) puts them on a copy") == 1
    assert list_coeff_adapters(pipe) == []
    base = seeded(pipe, **settings)
    if name.endswith("ControlNet-XS"):
        with pytest.raises(ValueError, match="unet.mid_block.attentions.*: there is no such attention layer"):
            load_coeff_weights(pipe, coeff_state_dict(tuned))
        (block,) = re.findall(r"```python\n(import re\n.*?)```", COMPATIBILITY.read_text("utf-8"), re.DOTALL)
        controlnet = controlled(like(tuned.unet))["controlnet"]
        exec(block, {"tuned": tuned, "xs": pipe, "controlnet": controlnet})
        assert problems(controlnet) == []
    else:
        load_coeff_weights(pipe, coeff_state_dict(tuned))
    mixed = seeded(pipe, **settings)
    with mixed_by_hand(pipe):
        assert_mixed(mixed, seeded(pipe, **settings), base)


def seeded(pipe: Any, **settings: Any) -> np.ndarray:
    """SparseCtrl draws beside the generator."""
    torch.manual_seed(0)
    return run(pipe, **settings)


def test_a_file_of_the_tuned_model_is_loaded_into_one_built_of_it_by_strict_false(tmp_path) -> None:
    tuned = sd()
    add_coeff_adapter(tuned)
    randomise(tuned)
    file = save_coeff_weights(tuned, tmp_path)
    pipe = made(AnimateDiffPipeline, (plain := sd()), motion_adapter=motion_adapter(plain.unet))
    with pytest.raises(ValueError, match="the file is for a UNet2DConditionModel, this is a UNetMotionModel"):
        load_coeff_weights(pipe, file)
    load_coeff_weights(pipe, file, strict=False)
    assert check_coeff_adapters(pipe)[0] == "ok: 14 of 28 attention layers have coefficients"
    torch.testing.assert_close(coeff_state_dict(pipe), coeff_state_dict(tuned), rtol=0, atol=0)


def test_it_is_said_once_a_copy_that_a_copy_has_no_coefficients(unet, caplog) -> None:
    add_coeff_adapter(unet)
    for copies in (1, 2):
        for part in (*unet.down_blocks, unet.mid_block):
            part.state_dict()
        assert caplog.text.count("puts them on a copy") == copies


def test_saving_the_model_is_no_copy_of_a_part(unet, caplog, tmp_path) -> None:
    add_coeff_adapter(unet)
    unet.save_pretrained(tmp_path)
    torch.nn.Sequential(unet).state_dict()
    assert "are copied" not in caplog.text


def test_free_noise_rebuilds_layers_and_they_are_missed_until_they_are_given_coefficients(tmp_path) -> None:
    pipe = made(AnimateDiffPipeline, (plain := sd()), motion_adapter=motion_adapter(plain.unet))
    add_coeff_adapter(pipe)
    randomise(pipe)
    expected = run(pipe, **VIDEO)
    for switch in (lambda: pipe.enable_free_noise(context_length=3, context_stride=1), pipe.disable_free_noise):
        switch()
        assert len(problems(pipe)) == 14
        assert "motion_modules.0.transformer_blocks.0.attn1 lost its coefficients" in problems(pipe)[0]
        with pytest.raises(RuntimeError, match="14 of 28 layers with coefficients are other modules by now"):
            run(pipe, **VIDEO)
        with pytest.raises(ValueError, match="14 layers with coefficients were replaced.*enable_free_noise"):
            save_coeff_weights(pipe, tmp_path)
        set_coeff_adapters(pipe, "default")
        assert problems(pipe) == []
        assert len(coeff_state_dict(pipe)) == 28
        # free noise of as many frames as a window adds up what is there already
        np.testing.assert_allclose(run(pipe, **VIDEO), expected, atol=1e-4)


def test_layers_that_are_gone_are_named(unet) -> None:
    add_coeff_adapter(unet)
    del unet.mid_block.attentions[0].transformer_blocks[0]
    gone = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert problems(unet)[0] == f"problem: unet.{gone} lost its coefficients, its processor is no longer there"
    with pytest.raises(ValueError, match=f"these layers with coefficients are gone.*{gone}.*unload_coeff_weights"):
        set_coeff_adapters(unet, "default")
    unload_coeff_weights(unet)
    assert not unet._forward_pre_hooks


def test_a_pipeline_that_sets_processors_once_is_noticed() -> None:
    name = "Flux2KleinPipeline"
    tuned = tiny_models.tiny_pipeline(name)
    add_coeff_adapter(tuned)
    randomise(tuned)
    pipe = made(Flux2KleinKVPipeline, tuned)
    settings = tiny_models.call_settings(name, num_inference_steps=1)
    with pytest.raises(RuntimeError, match="was replaced by Flux2KV.*; set_coeff_adapters"):
        run(pipe, **settings)
    set_coeff_adapters(pipe, "default")
    mixed = run(pipe, **settings)
    with coeff_disabled(pipe):
        assert np.abs(run(pipe, **settings) - mixed).max() > 1e-2


def test_layers_that_models_share_share_their_coefficients() -> None:
    controlnet, transformer = build("ZImageControlNetModel"), build("ZImageTransformer2DModel")
    with torch.no_grad():
        add_coeff_adapter(transformer)
        randomise(transformer)
        shared = type(controlnet).from_transformer(controlnet, transformer)
        mixed = call("ZImageControlNetModel", shared)
        with coeff_disabled(transformer):
            assert (call("ZImageControlNetModel", shared) - mixed).norm() > 1e-3 * mixed.norm()
