"""A folder stands for the adapters of a model: names are loaded when they are asked for, and leave in turn."""

from __future__ import annotations

import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import UNet2DConditionModel
from hosts import HOSTS, visible
from test_per_sample import with_adapters
from torch import nn

from coeff_diffusers import (
    AdapterStore,
    coeff_adapters,
    coeff_disabled,
    coeff_per_sample,
    coeff_state_dict,
    get_active_coeff_adapters,
    list_coeff_adapters,
    load_coeff_weights,
    save_coeff_weights,
    set_coeff_adapters,
)

NAMES = ["dog", "cat", "owl", "fox"]


@torch.no_grad()
def run(unet: nn.Module, coeff: object = "nothing") -> torch.Tensor:
    given = {} if coeff == "nothing" else {"cross_attention_kwargs": {"coeff": coeff}}
    return unet(**HOSTS["unet"].inputs(), **given, return_dict=False)[0]


@pytest.fixture
def source() -> nn.Module:
    torch.manual_seed(0)
    return with_adapters(visible(HOSTS["unet"].build().eval()), NAMES)


@pytest.fixture
def folder(source, tmp_path):
    for name in NAMES[:3]:
        save_coeff_weights(source, tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
    save_coeff_weights(source, tmp_path / "fox", adapter_name="fox")
    save_coeff_weights(source, tmp_path.parent, weight_name="outside.safetensors", adapter_name="fox")
    return tmp_path


@pytest.fixture
def store(unet, folder):
    return AdapterStore(folder, max_resident=2).attach(unet)


def expected(source: nn.Module, name: str | None) -> torch.Tensor:
    with coeff_disabled(source) if name is None else coeff_adapters(source, name):
        return run(source)


def test_names_are_loaded_when_a_call_asks_and_the_longest_unasked_leave(unet, source, store) -> None:
    assert store.names() == sorted(NAMES)
    assert "fox" in store
    base = run(unet)
    for name in ("dog", "cat", "dog", "fox"):
        torch.testing.assert_close(run(unet, name), expected(source, name), rtol=0, atol=0)
    assert list_coeff_adapters(unet) == ["dog", "fox"]
    torch.testing.assert_close(run(unet), base, rtol=0, atol=0)  # none becomes the model's default
    with coeff_per_sample(unet, ["owl", "cat"]):
        both = run(unet)
    for n, name in enumerate(("owl", "cat")):
        torch.testing.assert_close(both[n], expected(source, name)[n], rtol=1e-4, atol=1e-4)  # a matrix for each
    with coeff_adapters(unet, "dog"):
        run(unet, ["owl", "fox"])  # "dog" leaves, and comes again
        torch.testing.assert_close(run(unet), expected(source, "dog"), rtol=0, atol=0)
    set_coeff_adapters(unet, "cat")
    for name in ("dog", "owl", "fox"):
        run(unet, name)
    assert get_active_coeff_adapters(unet) == {"cat": 1.0}  # the default stays


def test_what_is_replaced_on_disk_is_seen_and_what_is_removed(unet, source, store, folder) -> None:
    run(unet, "dog")
    os.replace(folder / "cat.safetensors", folder / "dog.safetensors")
    torch.testing.assert_close(run(unet, "dog"), expected(source, "cat"), rtol=0, atol=0)
    (folder / "dog.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there is no adapter 'dog' in .*; it has \['fox', 'owl'\]"):
        run(unet, "dog")
    assert list_coeff_adapters(unet) == []


@pytest.mark.parametrize("name", ["../outside", "fox/../dog", "", ".", "..", "/etc/passwd", "dog.safetensors", "a\0b"])
def test_names_do_not_leave_the_folder(unet, store, name) -> None:
    assert name not in store
    with pytest.raises(ValueError, match="there is no adapter"):
        run(unet, name)


def test_what_else_is_refused(unet, store, folder) -> None:
    with pytest.raises(ValueError, match="3 adapters are asked for at once, and max_resident is 2"):
        run(unet, {"dog": 1.0, "cat": 1.0, "owl": 1.0})
    with pytest.raises(ValueError, match="max_resident must be at least 1, got 0"):
        AdapterStore(folder, max_resident=0)
    with pytest.raises(ValueError, match="a model has one store"):
        AdapterStore(folder).attach(unet)
    (folder / "dog.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="dog.safetensors"):
        run(unet, "dog")
    run(unet, "owl")
    store.detach()
    assert list_coeff_adapters(unet) == ["owl"]
    with pytest.raises(ValueError, match=r"has no adapter \['cat'\]"):
        run(unet, "cat")


def test_threads_that_drive_one_another_s_adapters_out_get_their_own(unet, source, store) -> None:
    wanted = {name: expected(source, name) for name in NAMES}
    asked = NAMES * 4
    start = threading.Barrier(4)

    def ask(names: list[str]) -> list[torch.Tensor]:
        start.wait()
        return [run(unet, name) for name in names]

    with ThreadPoolExecutor(4) as threads:
        for names, found in zip(parts := [asked[n::4] for n in range(4)], threads.map(ask, parts), strict=True):
            for name, out in zip(names, found, strict=True):
                torch.testing.assert_close(out, wanted[name], rtol=0, atol=0)


def test_an_adapter_that_is_not_in_use_is_one_tensor(unet, source) -> None:
    state = coeff_state_dict(source, "dog")
    load_coeff_weights(unet, state, adapter_name="first")

    def objects() -> tuple[int, int]:
        gc.collect()
        found = gc.get_objects()
        return len(found), sum(isinstance(each, nn.Parameter | nn.Module) for each in found)

    run(unet, "first")
    objects()  # what Python keeps of a first look at all
    before = objects()
    for n in range(50):
        load_coeff_weights(unet, state, adapter_name=f"a{n}")
        if n % 10 == 0:
            run(unet, f"a{n}")
    after = objects()
    assert after[1] == before[1]
    assert after[0] - before[0] < 50 * 4  # far fewer than its 8 layers each


def test_the_hub_s_names(monkeypatch, source, folder) -> None:
    import huggingface_hub
    from huggingface_hub import HfApi

    def download(repository: str, file: str, **_: object) -> str:
        return str(
            folder / file if repository == "user/pets" else folder / f"{repository.rpartition('/')[2]}.safetensors"
        )

    class Item:
        item_type, item_id = "model", "user/cat"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(
        HfApi,
        "list_repo_files",
        lambda *_, **__: [
            "README.md",
            "dog.safetensors",
            "x/y/z.safetensors",
            "fox/pytorch_coeff_weights.safetensors",
        ],
    )
    monkeypatch.setattr(HfApi, "get_collection", lambda *_: type("", (), {"items": [Item]}))
    torch.manual_seed(0)
    unet = visible(HOSTS["unet"].build().eval())
    assert isinstance(unet, UNet2DConditionModel)
    store = AdapterStore("user/pets").attach(unet)
    assert store.names() == ["dog", "fox"]
    torch.testing.assert_close(run(unet, "fox"), expected(source, "fox"), rtol=0, atol=0)
    store.detach()
    store = AdapterStore("user/pets-0123456789abcdef01234567").attach(unet)
    assert store.names() == ["cat"]
    torch.testing.assert_close(run(unet, "cat"), expected(source, "cat"), rtol=0, atol=0)


def test_contexts_and_calls_that_load_at_once_do_not_wait_for_one_another(unet, source, folder) -> None:
    wanted = {name: expected(source, name) for name in NAMES}
    store = AdapterStore(folder, max_resident=1).attach(unet)
    reached, go_on = threading.Event(), threading.Event()
    load = store._load

    def slow(name: str) -> None:
        reached.set()
        go_on.wait(0.5)  # the other thread is in a context's beginning by then
        load(name)

    store._load = slow
    with ThreadPoolExecutor(1) as thread:
        call = thread.submit(run, unet, "dog")
        assert reached.wait(60)
        with coeff_adapters(unet, "cat"):
            assert torch.equal(run(unet), wanted["cat"])
        assert torch.equal(call.result(timeout=60), wanted["dog"])


def test_contexts_find_a_store_s_first_adapter_and_the_base_model(unet, source, folder) -> None:
    AdapterStore(folder).attach(unet)
    with coeff_disabled(unet):
        assert torch.equal(run(unet), expected(source, None))
    with coeff_adapters(unet, "dog"):
        assert torch.equal(run(unet), expected(source, "dog"))


def test_a_folder_that_is_gone_is_not_looked_for_on_the_hub(unet, store, folder) -> None:
    assert "n" * 300 not in store
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        run(unet, "dog")
