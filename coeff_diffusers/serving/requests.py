"""What is asked for, and what is answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

MAX_NAME = 200  # of a subject, in bytes of UTF-8: files have longer ones, with what is put before and after
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
MAX_SEED = 2**63 - 1  # of torch.Generator.manual_seed


class ImageRequest(BaseModel):
    """Images of one prompt. Image number i of them has the seed `seed + i`."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra={
        "examples": [{"prompt": "a sks dog in the snow", "subject": "dog", "seed": 1}]
    })  # fmt: skip

    prompt: str = Field(min_length=1, max_length=4000)
    negative_prompt: str | None = Field(None, max_length=4000)
    subject: Name | Annotated[dict[Name, FiniteFloat], Field(min_length=1)] | None = Field(
        None, description="A subject's name, or a mixture of names with their weights; the base model without one."
    )
    weight: FiniteFloat = Field(1.0, description="Of the subject, or a factor of the mixture's weights.")
    num_images_per_prompt: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=0, le=MAX_SEED - 10_000, description="Drawn if not given; the answer says it.")
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: FiniteFloat | None = None
    height: int | None = Field(None, ge=1, description="In pixels; with width, or neither.")
    width: int | None = Field(None, ge=1, description="In pixels; with height, or neither.")
    scheduler: str | None = Field(None, description="Class of a scheduler of diffusers that suits the model.")
    response_format: Literal["json", "png"] = Field("json", description="png for a single image.")

    @property
    def mixture(self) -> dict[str, float] | None:
        """Names and weights, as `coeff` takes them; `None` is the base model."""
        if self.subject is None:
            return None
        weights = {self.subject: 1.0} if isinstance(self.subject, str) else self.subject
        return {name: weight * self.weight for name, weight in weights.items()}


class Image(BaseModel):
    """An image, and what made it."""

    seed: int
    b64_json: str = Field(description="The PNG file in base64.")


class ImageResponse(BaseModel):
    """Images, in the order of their seeds, and the settings that make them again."""

    images: list[Image]
    settings: dict[str, Any]


class Subjects(BaseModel):
    """The names that a request can have as its subject."""

    subjects: list[str]


class Subject(BaseModel):
    """What a subject's file says of itself. It is its writer's word."""

    name: str
    instance_prompt: str | None
    metadata: dict[str, str]


class Problem(BaseModel):
    """Why a request was not answered: `field` is the one to change, if it is one."""

    field: str | None = None
    message: str


@dataclass(frozen=True)
class Answer:
    """Of a replica: PNG files, and what made them."""

    images: tuple[bytes, ...]
    settings: dict[str, Any]


class Refusal(Exception):  # noqa: N818
    """A request that cannot be answered. A value between processes, raised within one.

    Args:
        status: of HTTP.
        message: for the client.
        field: of the request, if it is one.
        headers: of the response.
    """

    def __init__(
        self, status: int, message: str, field: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status, message, field, headers)
        self.status, self.message, self.field, self.headers = status, message, field, headers

    def __str__(self) -> str:
        return self.message
