"""The server: requests, batches and the folder by themselves, and the whole over HTTP on loopback."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import torch
from diffusers import SchedulerMixin, StableDiffusionPipeline
from PIL import Image

from coeff_diffusers import add_coeff_adapter, coeff_parameters, coeff_per_sample, save_coeff_weights
from coeff_diffusers.console import hush
from coeff_diffusers.serving.door import Door
from coeff_diffusers.serving.folder import SubjectFolder
from coeff_diffusers.serving.pipeline import SubjectPipeline
from coeff_diffusers.serving.requests import ImageRequest, Refusal
from coeff_diffusers.serving.run import check_room, checked_names
from coeff_diffusers.serving.settings import ServeSettings, parse_serve, token_of
from coeff_diffusers.training import InputError

MODEL = Path(__file__).parents[1] / "examples" / "emoji" / "model"
PROMPT = "a pig face on a blue background"
STEPS = 2
TOKEN = "of-the-tests"


@pytest.fixture(scope="module")
def pipe() -> Any:
    hush()
    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    for number, name in enumerate(("dog", "cat", "owl")):
        torch.manual_seed(number)
        add_coeff_adapter(pipe, adapter_name=name)
        with torch.no_grad():
            for parameter in coeff_parameters(pipe.unet, name):
                parameter.normal_(0, 0.3)
    return pipe


@pytest.fixture(scope="module")
def folder(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "subjects"
    for name in ("dog", "cat"):
        save_coeff_weights(pipe, folder, weight_name=f"{name}.safetensors", adapter_name=name)
    save_coeff_weights(pipe, folder / "owl", adapter_name="owl", metadata={"instance_prompt": "a sks owl"})
    return folder


@pytest.fixture(scope="module")
def alone(pipe: Any) -> Any:
    """The image of a request that is made by itself, by the library."""

    def make(subject: Any, seed: int = 0, prompt: str = PROMPT, **options: Any) -> Image.Image:
        options = {"num_inference_steps": STEPS, "guidance_scale": 2.5, "guidance_rescale": 0.7} | options
        with coeff_per_sample(pipe, [subject]):
            return pipe([prompt], generator=[torch.Generator().manual_seed(seed)], **options).images[0]

    return make


def assert_same(image: Image.Image, other: Image.Image) -> None:
    """But for 1e-4 in a batch of another size, which may be one step of 255 where a value lies between two."""
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int))
    assert difference.max() <= 1


def settings(folder: Path, **others: Any) -> ServeSettings:
    return ServeSettings(pretrained_model_name_or_path=str(MODEL), adapters=str(folder), **others)


@pytest.fixture(scope="module")
def served(folder: Path) -> SubjectPipeline:
    return SubjectPipeline(settings(folder))


def request(subject: Any = None, seed: int = 0, **others: Any) -> ImageRequest:
    return ImageRequest(**{"prompt": PROMPT, "subject": subject, "seed": seed, "num_inference_steps": STEPS} | others)


# ------------------------------------------------------------------------------------------------------ one pipeline


def test_an_image_is_the_same_whatever_it_is_batched_with(served: SubjectPipeline, alone: Any) -> None:
    first = request("dog", 3)
    mixed = request({"dog": 0.5, "cat": 0.5}, 4, weight=0.8)
    batches = [[first, request("cat"), mixed], [first, request(), request("owl")]]
    made = [served.make([served.check(each) for each in batch]) for batch in batches]
    assert made[0][0][0].tobytes() == made[1][0][0].tobytes()
    assert_same(made[0][0][0], alone("dog", 3))
    assert_same(made[0][2][0], alone({"dog": 0.4, "cat": 0.4}, 4))
    assert_same(made[1][1][0], alone(None))
    assert_same(made[1][2][0], alone("owl"))


def test_each_image_of_a_prompt_has_its_own_seed(served: SubjectPipeline, alone: Any) -> None:
    images = served.make([served.check(request("dog", 5, num_images_per_prompt=2))])[0]
    for i, image in enumerate(images):
        assert_same(image, alone("dog", 5 + i))


def test_requests_of_one_kind_share_a_batch(served: SubjectPipeline) -> None:
    kind = served.kind(request())
    assert served.kind(request("dog", 7, prompt="a bee", guidance_scale=2.5)) == kind  # 2.5 is this model's own
    others = [{"guidance_scale": 3.0}, {"num_inference_steps": 3}, {"height": 32}, {"negative_prompt": "a cow"}]
    for other in [*others, {"scheduler": "EulerDiscreteScheduler"}]:
        assert served.kind(request(**other)) != kind


def test_a_scheduler_whose_package_is_missing_is_not_offered(served: SubjectPipeline) -> None:
    assert {"DDIMScheduler", "EulerDiscreteScheduler"} <= set(served.schedulers)
    assert not [name for name, kind in served.schedulers.items() if not issubclass(kind, SchedulerMixin)]


def test_a_scheduler_is_for_its_batch_alone(served: SubjectPipeline, alone: Any) -> None:
    images = served.make([request(scheduler="EulerDiscreteScheduler")])[0]
    assert images[0].tobytes() != alone(None).tobytes()
    assert_same(served.make([request()])[0][0], alone(None))


@pytest.mark.parametrize(
    ("field", "others"),
    [
        ("num_inference_steps", {"num_inference_steps": 101}),
        ("height", {"height": 2048}),
        ("width", {"width": 30}),
        ("width", {"height": 32}),
        ("height", {"width": 32}),
        ("num_images_per_prompt", {"num_images_per_prompt": 9}),
        ("response_format", {"num_images_per_prompt": 2, "response_format": "png"}),
        ("scheduler", {"scheduler": "os.system"}),
        ("subject", {"subject": "tiger"}),
        ("subject", {"subject": "../dog"}),
    ],
)
def test_what_cannot_be_asked_for_names_its_field(served: SubjectPipeline, field: str, others: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as refused:
        served.check(request(**others))
    assert refused.value.field == field
    assert refused.value.status == (404 if field == "subject" else 422)


def test_weights_whose_product_is_infinite_are_refused(served: SubjectPipeline) -> None:
    with pytest.raises(Refusal, match="'dog'") as refused:
        served.check(request({"dog": 1e308}, weight=1e308))
    assert refused.value.field == "weight"


def test_a_file_that_cannot_be_read_does_not_say_where_it_is(served: SubjectPipeline, folder: Path) -> None:
    bad = folder / "bad.safetensors"
    bad.write_bytes(b"nothing")
    try:
        for ask in (lambda: served.check(request("bad")), lambda: SubjectFolder(str(folder)).describe("bad")):
            with pytest.raises(Refusal, match=r"^bad\.safetensors is no readable"):
                ask()
    finally:
        bad.unlink()


def test_a_request_that_fails_in_a_batch_fails_alone(served: SubjectPipeline, alone: Any, folder: Path) -> None:
    late = folder / "late.safetensors"
    late.write_bytes((folder / "dog.safetensors").read_bytes())
    batch = [served.check(request("late")), served.check(request("cat", 2))]
    late.unlink()
    answers = served.make(batch)
    assert isinstance(answers[0], Refusal)
    assert (answers[0].status, answers[0].message) == (404, "there is no subject 'late'")
    assert_same(answers[1][0], alone("cat", 2))


def test_a_batch_that_nobody_waits_for_ends_after_a_step(served: SubjectPipeline) -> None:
    asked: list[int] = []
    answers = served.make([request(num_inference_steps=50)], lambda: not asked.append(1))
    assert len(asked) == 1
    assert answers[0].status == 499


def test_a_file_for_another_model_is_refused_with_the_loader_s_message(
    served: SubjectPipeline, unet: Any, tmp_path: Path
) -> None:
    with pytest.raises(Refusal, match=r"^new\.safetensors is no readable \.safetensors file"):
        served.check_file("new", b"nothing")
    add_coeff_adapter(unet)
    other = save_coeff_weights(unet, tmp_path).read_bytes()
    with pytest.raises(Refusal, match=r"(?s)^new\.safetensors does not fit StableDiffusionPipeline:.* heads here"):
        served.check_file("new", other)


# ------------------------------------------------------------------------------------------------------------ folder


def test_a_subject_is_put_replaced_and_deleted(folder: Path, tmp_path: Path) -> None:
    subjects = SubjectFolder(str(tmp_path))
    data = (folder / "dog.safetensors").read_bytes()
    assert subjects.put("new", data)
    assert not subjects.put("new", data)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "pytorch_coeff_weights.safetensors").write_bytes(data)
    assert subjects.names() == ["new"]
    subjects.delete("new")
    assert subjects.names() == []
    with pytest.raises(Refusal, match="no subject 'new'"):
        subjects.delete("new")


@pytest.mark.parametrize("name", ["../new", "a/b", "", ".", "con", "new ", "a\nb", "é" * 101])
def test_a_name_stays_in_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refusal, match=r"must (be|have)") as refused:
        SubjectFolder(str(tmp_path)).put(name, b"")
    assert refused.value.field == "name"
    assert list(tmp_path.iterdir()) == []


def test_names_are_those_that_can_be_asked_for(folder: Path, tmp_path: Path) -> None:
    for name in ("dog", "my.dog"):
        (tmp_path / f"{name}.safetensors").write_bytes((folder / "dog.safetensors").read_bytes())
    (tmp_path / "cat.safetensors").mkdir()
    assert SubjectFolder(str(tmp_path)).names() == ["dog"]


def test_a_folder_that_is_gone_is_a_503(served: SubjectPipeline, folder: Path, tmp_path: Path) -> None:
    subjects = SubjectFolder(str(tmp_path / "gone"))
    for ask in (subjects.names, lambda: subjects.describe("dog"), lambda: subjects.delete("dog")):
        with pytest.raises(Refusal, match="cannot be found") as refused:
            ask()
        assert refused.value.status == 503
    away = folder.rename(folder.with_name("away"))
    try:
        with pytest.raises(Refusal, match="cannot be found"):
            served.check(request("dog"))
    finally:
        away.rename(folder)


# -------------------------------------------------------------------------------------------------------------- door


def run_through_door(requests: list[tuple[str, int]], most: int) -> list[list[str]]:
    """The batches that requests (kind, images) get, all of which come while one of kind "first" is running."""
    batches: list[list[str]] = []

    async def main() -> None:
        door, inside = Door(most), []

        async def ask(kind: str, images: int) -> None:
            async with door.through(kind, images) as place:
                done = asyncio.get_running_loop().create_future()
                inside.append((place, done))
                await done

        async def run_batches() -> None:
            while True:
                await asyncio.sleep(0.01)
                batch = list(inside)
                if batch:
                    inside.clear()
                    with door.closed():
                        batches.append([place.kind for place, _ in batch])
                        await asyncio.sleep(0.01)
                    for _, done in batch:
                        done.set_result(None)

        runner = asyncio.create_task(run_batches())
        tasks = [asyncio.create_task(ask("first", 1))]
        await asyncio.sleep(0.015)
        tasks += [asyncio.create_task(ask(*each)) for each in requests]
        await asyncio.gather(*tasks)
        runner.cancel()

    asyncio.run(main())
    return batches


def test_requests_of_a_kind_wait_for_one_another_and_not_for_others() -> None:
    asked = [("a", 1), ("b", 1), ("a", 1), ("a", 2), ("b", 1)]
    assert run_through_door(asked, most=4) == [["first"], ["a", "a", "a"], ["b", "b"]]
    assert run_through_door(asked, most=3) == [["first"], ["a", "a"], ["b", "b"], ["a"]]


def test_a_request_that_is_given_up_leaves_the_door() -> None:
    async def main() -> None:
        door = Door(1)
        async with door.through("a", 1):
            waiting = asyncio.create_task(door.through("a", 1).__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.sleep(0)
        async with door.through("b", 1) as place:
            assert not place.gone

    asyncio.run(asyncio.wait_for(main(), 5))


# -------------------------------------------------------------------------------------------------------------- flags


def test_flags_are_the_settings(folder: Path) -> None:
    flags = ["--pretrained_model_name_or_path", "m", "--adapters", str(folder), "--port", "81", "--num_gpus", "0.5"]
    made = parse_serve(flags)
    assert (made.port, made.num_gpus, made.host) == (81, 0.5, "127.0.0.1")
    with pytest.raises(InputError, match=r"--port must be in \[1, 65535\]"):
        parse_serve([*flags, "--port", "0"])
    with pytest.raises(SystemExit):
        parse_serve(["--adapters", "x"])


@pytest.mark.parametrize("token", ["", "two words", "pässwörd", "line\n"])
def test_a_token_that_no_header_carries_is_refused_and_not_shown(
    folder: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COEFF_SERVE_TOKEN", token)
    with pytest.raises(InputError, match="COEFF_SERVE_TOKEN") as refused:
        token_of(settings(folder))
    assert not token or token not in str(refused.value)
    assert token_of(settings(folder, token="other")) == "other"
    monkeypatch.delenv("COEFF_SERVE_TOKEN")
    assert token_of(settings(folder)) is None


def test_replicas_that_do_not_fit_are_refused_rather_than_waited_for(folder: Path) -> None:
    check_room(settings(folder, num_replicas=4, num_cpus=0.5, num_gpus=0), {"CPU": 2})
    with pytest.raises(InputError, match=r"--num_replicas 4 of 1 CPU .* machine's 2; --num_cpus takes less"):
        check_room(settings(folder, num_replicas=4, num_cpus=1, num_gpus=0), {"CPU": 2})
    with pytest.raises(InputError, match=r"1 GPU .* machine's 0; --num_gpus"):
        check_room(settings(folder, num_gpus=1), {"CPU": 2})


def test_what_cannot_be_served_is_said_before_ray_starts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--pretrained_model_name_or_path: .*none"):
        checked_names(replace(settings(folder), pretrained_model_name_or_path=str(tmp_path / "none")))
    with pytest.raises(InputError, match=r"^--adapters: .*none is no folder here"):
        checked_names(settings(tmp_path / "none"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match=r"--port \d+: Address already in use"):
            checked_names(settings(folder, port=taken.getsockname()[1]))
    assert checked_names(settings(folder)) == ["cat", "dog", "owl"]


# -------------------------------------------------------------------------------------------------------- over HTTP


class Server:
    def __init__(self, url: str, process: subprocess.Popen[bytes]) -> None:
        self.url, self.process = url, process

    def ask(self, method: str, path: str, token: str | None = TOKEN, **options: Any) -> requests.Response:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return requests.request(method, self.url + path, headers=headers, timeout=120, **options)

    def image(self, subject: Any, seed: int = 0, **others: Any) -> requests.Response:
        body = {"prompt": PROMPT, "subject": subject, "seed": seed, "num_inference_steps": STEPS} | others
        return self.ask("POST", "/v1/images", json=body)

    def replica(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children(recursive=True)
        largest = max((p for p in children if p.name().startswith("ray::")), key=lambda p: p.memory_info().rss)
        return largest


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    flags = {"pretrained_model_name_or_path": MODEL, "adapters": folder, "port": port}
    flags |= {"max_batch_size": 4, "max_queued_requests": 6, "max_upload_size": 100_000, "num_cpus": 1}
    command = [sys.executable, "-m", "coeff_diffusers", "serve"]
    command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | {"COEFF_SERVE_TOKEN": TOKEN}
        )
    server = Server(f"http://127.0.0.1:{port}", process)
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            if "Ctrl-C stops" in log.read_text():
                break
            time.sleep(0.2)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def pixels(response: requests.Response) -> Image.Image:
    assert response.status_code == 200, response.text
    return Image.open(io.BytesIO(base64.b64decode(response.json()["images"][0]["b64_json"])))


@pytest.mark.slow
def test_many_clients_get_their_own_subjects(server: Server, alone: Any) -> None:
    asked = [(subject, seed) for seed in range(3) for subject in ("dog", "cat", "owl", None)]
    with ThreadPoolExecutor(5) as clients:  # of one kind, and each fifth of another
        answers = list(clients.map(lambda each: server.image(*each, guidance_scale=2 + each[1] % 2), asked))
    for (subject, seed), answer in zip(asked, answers):
        assert_same(pixels(answer), alone(subject, seed, guidance_scale=2 + seed % 2))


@pytest.mark.slow
def test_an_image_comes_as_png_with_its_settings(server: Server, alone: Any) -> None:
    answer = server.image("dog", None, response_format="png")
    assert answer.headers["content-type"] == "image/png"
    image = Image.open(io.BytesIO(answer.content))
    assert_same(image, alone("dog", int(answer.headers["x-seed"])))
    assert f'"seed": {answer.headers["x-seed"]}' in image.text["parameters"]


@pytest.mark.slow
def test_subjects_come_and_go_by_http(server: Server, folder: Path, alone: Any) -> None:
    dog, cat = ((folder / f"{name}.safetensors").read_bytes() for name in ("dog", "cat"))
    assert server.ask("PUT", "/v1/subjects/pet", data=dog).status_code == 201
    assert server.ask("GET", "/v1/subjects").json() == {"subjects": ["cat", "dog", "owl", "pet"]}
    assert_same(pixels(server.image("pet")), alone("dog"))
    assert server.ask("PUT", "/v1/subjects/pet", data=cat).status_code == 204
    assert_same(pixels(server.image("pet")), alone("cat"))
    assert server.ask("DELETE", "/v1/subjects/pet").status_code == 204
    assert server.image("pet").status_code == 404
    assert server.ask("DELETE", "/v1/subjects/pet").status_code == 404
    assert server.ask("GET", "/v1/subjects/owl").json()["instance_prompt"] == "a sks owl"


@pytest.mark.slow
def test_what_is_refused_says_why(server: Server, folder: Path) -> None:
    for path, token in (("/v1/subjects", None), ("/v1/subjects", "wrong")):
        assert server.ask("GET", path, token).status_code == 401
    assert server.ask("GET", "/healthz", None).json() == {"replicas": 1}
    refused = server.ask("PUT", "/v1/subjects/pet", data=b"x" * 100)
    assert (refused.status_code, refused.json()["message"][:16]) == (422, "pet.safetensors ")
    assert server.ask("PUT", "/v1/subjects/pet", data=b"x" * 100_001).status_code == 413
    assert server.ask("PUT", "/v1/subjects/..%2Fpet", data=b"x").status_code in (404, 422)
    assert server.ask("PUT", "/v1/subjects/.pet", data=b"x").json()["field"] == "name"
    assert sorted(path.name for path in folder.parent.rglob("*pet*")) == []
    assert server.image("dog", num_inference_steps=1000).json()["field"] == "num_inference_steps"
    assert server.image("dog", weight="heavy").json()["field"] == "weight"
    assert server.image("dog", steps=3).json()["field"] == "steps"
    assert "/v1/images" in server.ask("GET", "/openapi.json", None).json()["paths"]


@pytest.mark.slow
def test_every_error_is_json_that_says_why(server: Server) -> None:
    def post(body: bytes, kind: str = "application/json") -> Any:
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": kind}
        answer = requests.post(server.url + "/v1/images", data=body, headers=headers, timeout=60)
        return answer.status_code, answer.json()["field"], answer.json()["message"]

    assert post(b"{")[:2] == (422, None)
    assert post(b"[" * 100_000)[0] in (400, 422)
    assert post(b'{"prompt": "' + b"x" * (1 << 20) + b'"}')[0] == 413
    assert "Content-Type must be" in post(b'{"prompt": "x"}', "application/x-www-form-urlencoded")[2]
    assert post(b'{"prompt": "x", "subject": 3}')[:2] == (422, "subject")
    assert (answer := server.ask("GET", "/nothing")).status_code == 404
    assert answer.json()["message"] == "Not Found"
    assert server.ask("GET", "/v1/images").json()["message"] == "Method Not Allowed"


@pytest.mark.slow
def test_no_port_is_heard_by_other_machines(server: Server) -> None:
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    heard = [c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert heard
    assert {ip.removeprefix("::ffff:") for ip in heard} == {"127.0.0.1"}


@pytest.mark.slow
def test_a_full_queue_says_when_to_try_again_and_who_leaves_frees_a_place(server: Server) -> None:
    def give_up(seed: int) -> int | None:
        body = {"prompt": PROMPT, "subject": "dog", "seed": seed, "num_inference_steps": 100}
        headers = {"Authorization": f"Bearer {TOKEN}"}
        try:
            answer = requests.post(server.url + "/v1/images", json=body, headers=headers, timeout=2)
        except requests.Timeout:
            return None
        assert int(answer.headers["retry-after"]) >= 1
        return answer.status_code

    with ThreadPoolExecutor(20) as clients:  # 4 in a batch, 6 wait
        answers = list(clients.map(give_up, range(20)))
    assert set(answers) == {None, 503}
    began = time.monotonic()
    assert server.image("dog").status_code == 200
    assert time.monotonic() - began < 20  # those that went away would take more


@pytest.mark.slow
def test_a_replica_that_dies_is_replaced_and_its_requests_are_answered(server: Server, alone: Any) -> None:
    with ThreadPoolExecutor(2) as clients:
        answers = [clients.submit(server.image, subject, num_inference_steps=60) for subject in ("dog", "cat")]
        time.sleep(1)
        server.replica().kill()
    for subject, answer in zip(("dog", "cat"), answers):
        assert_same(pixels(answer.result()), alone(subject, num_inference_steps=60))
