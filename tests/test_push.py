"""`push_coeff_to_hub`, against a server that answers as the Hub does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hosts import randomise
from hub_server import Hub, hub_server
from PIL import Image
from safetensors.torch import load, load_file
from tiny_sd import tiny_pipeline

from coeff_diffusers import add_coeff_adapter, coeff_state_dict, push_coeff_to_hub, save_coeff_weights
from coeff_diffusers.model_card import Card

server = hub_server
WEIGHTS = "pytorch_coeff_weights.safetensors"
BASE_CARD = b"---\nlicense: other\nlicense_name: a-license\nlicense_link: LICENSE.md\n---\n# Base\n"


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = tiny_pipeline()
    pipe.register_to_config(_name_or_path="base/model")
    add_coeff_adapter(pipe)
    randomise(pipe)
    return pipe


def push(model: Any, **changes: Any) -> str:
    return push_coeff_to_hub(model, "fox", token="hf_secret", **changes)


def front_matter(card: bytes) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.decode().split("---\n")[1])
    return found


def python_of(card: bytes) -> str:
    return card.decode().partition("```python\n")[2].partition("```")[0]


def test_an_adapter_its_images_and_a_card_are_one_commit(pipe, server: type[Hub]) -> None:
    server.cards["base/model"] = BASE_CARD
    image = Image.new("RGB", (4, 4), "red")
    address = push(pipe, metadata={"instance_prompt": "a sks fox", "steps": "9"}, images=[("a sks fox, red", image)])
    assert address.endswith("/commit/" + "0" * 40)
    assert set(server.files) == {WEIGHTS, "README.md", "images/0.png"}
    torch.testing.assert_close(load(server.files[WEIGHTS]), coeff_state_dict(pipe), rtol=0, atol=0)  # the very values
    assert {token for path, token in server.requests} == {"Bearer hf_secret"}
    assert sum("/commit/" in path for path, _ in server.requests) == 1
    assert front_matter(server.files["README.md"]) == {
        "base_model": "base/model",
        "base_model_relation": "adapter",
        "instance_prompt": "a sks fox",
        "license": "other",
        "license_name": "a-license",
        "license_link": "https://huggingface.co/base/model/blob/main/LICENSE.md",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "dreambooth", "coeff-tuning", "template:sd-lora"],
        "widget": [{"text": "a sks fox, red", "output": {"url": "images/0.png"}}],
    }
    card = server.files["README.md"].decode()
    assert "<Gallery />" in card
    assert "| steps | 9 |" in card
    assert "pip install coeff_diffusers\n" in card


def test_the_cards_lines_run_as_they_stand(pipe, server: type[Hub], tmp_path: Path, monkeypatch) -> None:
    push(pipe, metadata={"instance_prompt": "a sks fox"})
    code = python_of(server.files["README.md"])
    assert 'load_coeff_weights(pipe, "me/fox")' in code
    monkeypatch.chdir(tmp_path)  # where both names are folders
    tiny_pipeline().save_pretrained("base/model")
    save_coeff_weights(pipe, "me/fox")
    names: dict[str, Any] = {}
    exec(code.replace('("a sks fox")', '("a sks fox", num_inference_steps=1)'), names)
    assert names["image"].size == (16, 16)
    torch.testing.assert_close(coeff_state_dict(names["pipe"]), coeff_state_dict(pipe), rtol=0, atol=0)


def test_a_card_that_is_there_stays(pipe, server: type[Hub]) -> None:
    server.cards["me/fox"] = b"# Mine"
    push(pipe)
    assert set(server.files) == {WEIGHTS}
    with pytest.raises(ValueError, match="me/fox has a README.md that would not show the images: replace_card=True"):
        push(pipe, images=[("a fox", Image.new("RGB", (4, 4)))])
    push(pipe, replace_card=True)
    assert set(server.files) == {WEIGHTS, "README.md"}


def test_the_folder_of_a_run_is_pushed_with_its_card_completed(pipe, server: type[Hub], tmp_path: Path) -> None:
    server.cards["base/model"] = BASE_CARD
    server.cards["me/fox"] = b"# Of the run before"
    run = tmp_path / "fox"
    save_coeff_weights(pipe, run)
    for name in ("config.yaml", "validation/step-000002/grid.png", "checkpoint-1/a.safetensors", "mine.txt"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("it")
    card = Card("base/model", "StableDiffusionPipeline", {"coefficients": 152}, {"coefficients": WEIGHTS})
    (run / "README.md").write_text(card.text("fox"))
    push(run)
    assert set(server.files) == {WEIGHTS, "README.md", "config.yaml", "validation/step-000002/grid.png"}
    assert 'load_coeff_weights(pipe, "me/fox")' in python_of(server.files["README.md"])
    assert front_matter(server.files["README.md"])["license_name"] == "a-license"


def test_maps_and_coefficients_that_were_drawn_are_shown(pipe, server: type[Hub], tmp_path: Path) -> None:
    save_coeff_weights(pipe, tmp_path)
    for name in ("attention_maps.png", "coefficients.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    push(tmp_path)  # without a card of its own
    card = Card("base/model", "StableDiffusionPipeline", {"coefficients": 152}, {"coefficients": WEIGHTS})
    (tmp_path / "README.md").write_text(card.text("fox"))
    first = server.files["README.md"].decode()
    push(tmp_path)
    assert set(server.files) == {WEIGHTS, "README.md", "attention_maps.png", "coefficients.png"}
    for text in (first, server.files["README.md"].decode()):
        above, _, below = text.partition("\n\n## What it does to attention\n\n")
        assert (
            below.index("](attention_maps.png)") < below.index("](coefficients.png)") < below.index("\n\n## Use\n\n")
        )
        assert "growth.png" not in text
        assert "beside the frozen base model" in above
    mine = "# Mine\n\n![the maps](attention_maps.png)\n"
    (tmp_path / "README.md").write_text(mine)
    push(tmp_path)
    text = server.files["README.md"].decode()
    assert text.startswith(mine.rstrip())
    assert text.count("](attention_maps.png)") == text.count("](coefficients.png)") == 1


def test_a_file_alone_in_a_folder_gets_a_card(pipe, server: type[Hub], tmp_path: Path) -> None:
    save_coeff_weights(pipe, tmp_path, weight_name="fox.safetensors", metadata={"instance_prompt": "a sks fox"})
    push(tmp_path)
    assert server.files["fox.safetensors"] == (tmp_path / "fox.safetensors").read_bytes()
    assert load_file(tmp_path / "fox.safetensors")
    card = server.files["README.md"]
    assert 'load_coeff_weights(pipe, "me/fox", weight_name="fox.safetensors")' in python_of(card)
    assert "DiffusionPipeline.from_pretrained" in python_of(card)
    assert front_matter(card)["widget"] == [{"text": "a sks fox"}]
    assert "license" not in front_matter(card)


def test_what_cannot_be_pushed_is_an_error_before_anything_is_sent(pipe, server: type[Hub], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no adapter 'cat' to save"):
        push(pipe, adapter_name="cat")
    with pytest.raises(ValueError, match="a folder is pushed as it is; metadata can be given of a model's adapter"):
        push(tmp_path, metadata={"steps": "9"})
    with pytest.raises(FileNotFoundError, match="there is no pytorch_coeff_weights.safetensors in"):
        push(tmp_path)
    for path in (save_coeff_weights(pipe, tmp_path / "run"), "nowhere"):  # the card alone would have been sent
        with pytest.raises(ValueError, match="is no folder: give a model, or the folder that a training run wrote"):
            push(path)
    for images in ([Image.new("RGB", (4, 4))], [("a fox", "fox.png")]):
        with pytest.raises(TypeError, match="images must be pairs of a prompt and a PIL image, got"):
            push(pipe, images=images)
    assert not server.requests


@pytest.mark.parametrize("refuse", ["/create", "/commit/"])
def test_a_refusal_of_the_hub_is_an_oserror(pipe, server: type[Hub], refuse: str) -> None:
    server.refuse = refuse
    with pytest.raises(OSError, match=r"the adapter could not be pushed to 'fox': (.|\n)*the rights"):
        push(pipe)
    assert not server.files


def test_a_base_model_of_the_author_is_named_as_such() -> None:
    card = Card("emoji", "StableDiffusionPipeline", {"coefficients": 152}, {"coefficients": WEIGHTS}).text("fox")
    assert "base_model" not in front_matter(card.encode())
    assert "beside the frozen base model `emoji`, trained by" in card
    assert "It is a model of the author's, not on the Hub." in card
