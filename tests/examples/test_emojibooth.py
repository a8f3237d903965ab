"""EmojiBooth: its measures on images whose quality is known, its file of raw numbers, its table, and a method."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import measures
import methods
import pytest
import sizes
import table
import torch
import trial
from judge import load_judge
from methods import METHODS, Method
from PIL import Image, ImageFilter
from plan import COLUMNS, RESULTS, Stage, append, chosen, plan, read, run
from pretrain import to_tensor
from scenes import PLACES, SIZES, Scene, render
from torch import Tensor, nn
from trial import REPORTED, TUNING, Trial

from coeff_diffusers.training.images.files import open_images
from coeff_diffusers.training.run.step import DenoisingStep

SCENE = Scene("panda face", "blue")


def drawn(scene: Scene, move: tuple[int, int] = (0, 0)) -> Image.Image:
    return render(scene, measures.glyph_of(scene.words), move)


# --------------------------------------------------------------------------------------------------------- measures


@pytest.mark.parametrize("subject", ["panda face", "rocket", "pineapple"])
def test_fidelity_falls_from_the_truth_over_blurred_ones_to_another_glyph(subject: str) -> None:
    scene = Scene(subject, "blue")
    true = drawn(scene)
    images = [true, *(true.filter(ImageFilter.GaussianBlur(radius)) for radius in (1, 2)), drawn(Scene("owl", "blue"))]
    for values in (
        [measures.psnr(image, scene) for image in images],
        [measures.likeness(load_judge(), image, scene) for image in images],
    ):
        assert values == sorted(values, reverse=True)
        assert values[0] > values[1]
        assert values[2] > values[3]


def test_an_image_may_lie_two_pixels_off_and_not_more() -> None:
    assert measures.psnr(drawn(SCENE, (2, -2)), SCENE) == pytest.approx(measures.psnr(drawn(SCENE), SCENE))
    assert measures.psnr(drawn(SCENE, (4, 0)), SCENE) < 25


def test_psnr_is_that_of_the_squared_error() -> None:
    image = drawn(SCENE).point(lambda value: value + 10 if value < 128 else value - 10)
    assert measures.psnr(image, SCENE) == pytest.approx(28.13, abs=0.01)  # 20 log10(255 / 10)


def test_the_judge_names_held_out_and_trained_glyphs() -> None:
    names = [*TUNING, *REPORTED]
    named = load_judge().names(to_tensor([drawn(Scene(words, "purple")) for words in names]))
    assert named == names


def test_the_likest_glyph_is_the_one_painted_nearest_to_the_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    painted = {words: drawn(Scene(words, "white")) for words in ("rocket", "koala face", "peach")}
    monkeypatch.setattr(trial, "glyphs_of", lambda model: painted)
    assert trial.likest_glyph("unet", "panda face") == "koala face"


@pytest.mark.parametrize("size", SIZES)
def test_the_size_is_named_after_what_is_seen(size: str) -> None:
    assert measures.name_size(drawn(Scene("panda face", "blue", size))) == size


@pytest.mark.parametrize("place", PLACES)
def test_the_place_is_named_after_what_is_seen(place: str) -> None:
    assert measures.name_place(drawn(Scene("panda face", "blue", "", place))) == place


def test_an_empty_image_has_no_size_and_no_place() -> None:
    empty = Image.new("RGB", (64, 64), "pink")
    assert measures.name_size(empty) is None
    assert measures.name_place(empty) is None


def test_drift_is_the_mean_change_of_the_images() -> None:
    base = [Image.new("RGB", (64, 64), (100, 100, 100))] * len(measures.UNRELATED)
    other = [Image.new("RGB", (64, 64), (106, 100, 100))] * len(measures.UNRELATED)
    assert measures.drift(load_judge(), base, base)["drift"] == 0
    assert measures.drift(load_judge(), other, base)["drift"] == pytest.approx(2.0, abs=1e-3)


# ------------------------------------------------------------------------------------------------------------- plan

LEARNS = Method("learns", (0.1, 0.2))
STAGES = [Stage("unet", [LEARNS], REPORTED[:2], tuned_on=TUNING[:1])]


def losses(each: Trial) -> dict[str, float]:
    return with_losses(abs(each.rates[0] - 0.2) + len(each.subject) / 100) | {"parameters": 3}


def with_losses(loss: float) -> dict[str, float]:
    return {f"loss_{kind}": loss for kind in measures.SCENES}


def test_the_rate_is_chosen_on_tuning_subjects_before_others_are_run(tmp_path: Path) -> None:
    rows = run(STAGES, tmp_path / "trials.csv", execute=losses)
    assert [(row["subject"], row["rates"]) for row in rows] == [
        ("fox face", "0.1"),
        ("fox face", "0.2"),
        (REPORTED[0], "0.2"),
        (REPORTED[1], "0.2"),
    ]


def test_past_the_grid_is_looked_where_its_last_rate_is_the_best(tmp_path: Path) -> None:
    inside = Method("of the middle", (0.1, 0.2, 0.4))
    rows = run([Stage("unet", [LEARNS, inside], [], tuned_on=TUNING[:1])], tmp_path / "trials.csv", execute=losses)
    [past] = plan([Stage("unet", [LEARNS, inside, METHODS["OFT"]], tuned_on=TUNING[:1], beyond=True)], rows)
    assert (past.method, past.subject, past.rates) == (LEARNS, "fox face", (0.4,))


def test_a_run_goes_on_after_the_last_whole_line(tmp_path: Path) -> None:
    file = tmp_path / "trials.csv"
    done = run(STAGES, file, execute=losses)
    whole = file.read_text()
    file.write_text(whole[:-40])
    again: list[Trial] = []
    assert run(STAGES, file, execute=lambda each: again.append(each) or losses(each))[:3] == done[:3]
    assert [each.subject for each in again] == [REPORTED[1]]
    assert list(map(read_key, read(file))) == list(map(read_key, done))


def test_what_another_process_has_run_meanwhile_is_not_run_again(tmp_path: Path) -> None:
    file, ran = tmp_path / "trials.csv", []

    def execute(each: Trial) -> dict[str, float]:
        if each.subject == REPORTED[0]:
            append(file, Trial(LEARNS, "unet", REPORTED[1], rates=each.rates).key | losses(each))
        ran.append(each.subject)
        return losses(each)

    rows = run(STAGES, file, execute=execute)
    assert ran == ["fox face", "fox face", REPORTED[0]]
    assert (
        [row["subject"] for row in rows] == [*ran[:2], REPORTED[1], REPORTED[0]] == [r["subject"] for r in read(file)]
    )


@pytest.mark.parametrize("left", [5, 30, 60])  # letters: within the quoted name of the method, and after it
def test_a_line_below_one_that_was_cut_off_is_read_and_that_one_is_not(left: int, tmp_path: Path) -> None:
    """As after one of two processes was killed."""
    file, trials = tmp_path / "trials.csv", [Trial(METHODS["LoRA, rank 4"], "unet", subject) for subject in REPORTED]
    append(file, trials[0].key)
    whole = file.read_text()
    append(file, trials[1].key)
    file.write_text(file.read_text()[: len(whole) + left])
    append(file, trials[2].key)
    assert [read_key(row) for row in read(file)] == [trials[0].key, trials[2].key]


def test_the_short_version_says_what_it_has_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(trial.__file__).with_name("__main__.py")
    monkeypatch.setattr("sys.argv", [str(script), "--short", "--model", "dit"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(script))["main"]()
    assert "--short has no trials on dit" in capsys.readouterr().err


def test_rates_come_from_a_subject_that_has_seen_all_of_them() -> None:
    first = Trial(LEARNS, "unet", "fox face", rates=(0.1,))
    with pytest.raises(ValueError, match=re.escape("learns on unet has not been tuned")):
        chosen(LEARNS, "unet", [first.key | dict.fromkeys(with_losses(0), "0.1")])


def test_a_tenth_off_any_loss_counts_alike() -> None:
    tried = {0.1: ("0.1", "0.6", "0.6"), 0.2: ("0.3", "0.45", "0.45")}  # geometric means 0.33, 0.39; plain 0.43, 0.4
    rows = [
        Trial(LEARNS, "unet", "fox face", rates=(rate,)).key | dict(zip(with_losses(0), values))
        for rate, values in tried.items()
    ]
    assert chosen(LEARNS, "unet", rows) == (0.1,)


def test_a_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trials.csv").write_text("method,loss\n")
    with pytest.raises(ValueError, match="has the columns"):
        read(tmp_path / "trials.csv")


def test_a_lora_beside_coefficients_has_the_rate_that_it_has_alone(tmp_path: Path) -> None:
    alone, both = METHODS["LoRA, rank 4"], METHODS["LoRA, rank 4 + coefficients"]
    stages = [Stage("unet", [both], REPORTED[:1], tuned_on=TUNING[:1])]
    rows = run(stages, tmp_path / "trials.csv", execute=lambda each: with_losses(each.rates[0]))
    assert rows[-1]["rates"] == f"{both.rates[0]:g}/{alone.rates[0]:g}"
    assert both.settings(*map(float, rows[-1]["rates"].split("/")))["lora_learning_rate"] == alone.rates[0]
    assert not any(row["method"] == alone.name and row["subject"] in REPORTED for row in rows)
    assert [each for each in plan(stages, rows) if each.key not in [read_key(row) for row in rows]] == []


def read_key(row: dict[str, str]) -> dict[str, str]:
    return {name: row[name] for name in COLUMNS[:6]}


# ------------------------------------------------------------------------------------------------------------ table


def test_the_table_says_means_errors_and_how_many_runs(tmp_path: Path) -> None:
    file, names = tmp_path / "trials.csv", ("coefficients, SOAP", "coefficients, AdamW")
    for name, base in zip(names, (10.0, 9.0)):
        for rate in METHODS[name].rates:
            append(file, Trial(METHODS[name], "unet", TUNING[0], rates=(rate,)).key | with_losses(rate))
        for n, subject in enumerate(REPORTED[:3]):
            filled = dict.fromkeys(COLUMNS[6:], "1")
            for seed in (0, 0, 1)[: 3 if base == 10 and not n else 1]:  # a second one of a subject, a line twice
                values = filled | {"psnr_background": str(base + n + 3 * seed)}
                append(file, Trial(METHODS[name], "unet", subject, seed, (0.01,)).key | values)
    text = table.markdown(read(file))
    assert "| coefficients, SOAP | 4, 3 | 1.000 ± 0.000 |" in text
    assert "| 11.5 ± 0.3 |" in text  # of 11.5, 11 and 12
    pair = "| coefficients, SOAP; coefficients, AdamW | 3, 3 | 0.000 ± 0.000, p = 1.000 | "
    assert f"{pair}1.0 ± 0.0, p = 0.250" in text  # of the seed that both have; the least p of 8 patterns
    assert "| coefficients, SOAP | 0.000 | 2.1 |" in text  # 3 / sqrt(2) between the seeds
    table.plot(read(file), "drift", "drift", tmp_path / "drift.png")
    assert Image.open(tmp_path / "drift.png").size == (880, 550)  # one model has rows
    table.plot([row for row in read(file) if not row["drift"]], "drift", "drift", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()  # of tuning alone


def test_a_sheet_whose_images_are_elsewhere_is_not_drawn_over(tmp_path: Path) -> None:
    seen, unseen = (Trial(METHODS[name], "unet", REPORTED[0]) for name in ("true scenes", "base model"))
    Image.new("RGB", (128, 64)).save(tmp_path / f"{seen.slug}.png")
    assert table.draw_sheet([seen.key], "unet", REPORTED[0], tmp_path)
    assert table.draw_sheet([seen.key, unseen.key], "unet", REPORTED[0], tmp_path) is None


def test_pairs_are_of_one_seed_and_a_trial_that_is_there_twice_counts_once() -> None:
    first, second = (METHODS[name] for name in ("coefficients, SOAP", "coefficients, AdamW"))
    rows = [
        Trial(method, "unet", TUNING[0], rates=(rate,)).key | with_losses(rate)
        for method in (first, second)
        for rate in method.rates
    ]
    values = [(first, 0, "10"), (first, 0, "10"), (first, 1, "40"), (second, 0, "9"), (second, 2, "0")]
    rows += [Trial(m, "unet", REPORTED[0], seed, (0.01,)).key | {"drift": value} for m, seed, value in values]
    found = [table.of_method(rows, method, "unet") for method in (first, second)]
    assert table.runs(found[0]) == "2, 1"
    assert table.by_subject(found[0], ["drift"]) == {REPORTED[0]: 25.0}
    assert table.difference(*found, (["drift"], 1)) == "1.0, p = 1.000"


def test_models_of_real_size_are_counted_on_their_configs() -> None:
    assert sizes.counts("SD 1.5")["coefficients"] == 2048
    assert sizes.counts("SD 1.5")["LoRA, rank 4"] == 797_184
    assert sizes.counts("FLUX.1")["coefficients"] == 57 * 24 * 24


def test_what_is_counted_is_what_was_trained() -> None:
    rows = [row for row in read(RESULTS / "trials.csv") if row["model"] == "unet"]
    trained = {row["method"].removesuffix(", SOAP"): int(row["parameters"]) for row in rows}
    counted = sizes.counts_on(trial.load_base("unet").unet)
    assert {name: trained[name] for name in counted} == counted


# ---------------------------------------------------------------------------------------------------------- methods


def test_what_the_training_script_does_not_have_starts_as_the_base() -> None:
    outputs = torch.randn(2, 5, 12)
    assert methods.mixed(outputs, torch.zeros(3, 3)).equal(outputs)
    gamma = torch.zeros(3, 3)
    gamma[0, 2] = 0.5  # head 0 gets half of head 2
    expected = outputs.clone()
    expected[..., :4] += 0.5 * outputs[..., 8:]
    torch.testing.assert_close(methods.mixed(outputs, gamma), expected)
    model = nn.ModuleDict({"to_q": nn.Linear(6, 8)})
    before = model["to_q"](outputs[..., :6])
    [core] = methods.lora_xs(3)(model)["coefficients"]
    torch.testing.assert_close(model["to_q"](outputs[..., :6]), before)
    with torch.no_grad():
        core.copy_(torch.eye(3))
    u, s, v = torch.linalg.svd(model["to_q"].weight)
    doubled = outputs[..., :6] @ (u[:, :3] * s[:3] @ v[:3]).T
    torch.testing.assert_close(model["to_q"](outputs[..., :6]), before + doubled)


def test_class_images_are_trained_on_with_their_own_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    captions = ["a small koala face on a blue background", "a koala face on a pink background, on the left"]
    sources = [(caption, caption, lambda: Image.new("RGB", (64, 64), "red")) for caption in captions]
    monkeypatch.setattr(trial, "class_images", lambda model, subject: open_images(sources, "class_data_dir"))

    class SeenError(Exception):
        """The prompts of a batch."""

    def forward(step: DenoisingStep, moments: Tensor, prompts: list[str], *rest: Any) -> Tensor:
        raise SeenError(prompts)

    monkeypatch.setattr(DenoisingStep, "forward", forward)
    method = METHODS["coefficients, SOAP, weight decay 0.3, class images"]
    with pytest.raises(SeenError) as caught:
        trial.train(Trial(method, "unet", TUNING[0], rates=(2e-2,)))
    [prompts] = caught.value.args
    assert len(prompts) == 2 * trial.BATCH
    assert set(prompts[trial.BATCH :]) == set(captions)


def test_a_lora_and_coefficients_train_with_an_optimizer_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "LOSS_DRAWS", 1)
    each = Trial(METHODS["LoRA, rank 4 + coefficients"], "unet", TUNING[0], rates=(2e-2, 1e-2), steps=3)
    values = trial.run_trial(each)
    assert values["parameters"] == 6144 + 55_552
    assert values["bytes"] > 4 * values["parameters"]
    assert 0 < values["loss_background"] < 1.5
    assert values["step_seconds"] > 0
    assert values["memory_mb"] > 1
