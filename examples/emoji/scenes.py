"""Captioned 64 x 64 scenes: one Noto Emoji glyph on a plain background.

    "a small fox face on a blue background, top left"

A scene is drawn from few sizes and places, so that a model of a few million parameters can learn them all.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

IMAGE_SIZE = 64

BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (16, 16, 16),
    "gray": (128, 128, 128),
    "red": (214, 40, 40),
    "orange": (255, 150, 30),
    "yellow": (255, 226, 60),
    "green": (44, 160, 70),
    "blue": (40, 90, 220),
    "purple": (130, 60, 180),
    "pink": (255, 170, 205),
}

SIZES = {"small": 28, "": 42, "large": 56}  # pixels; no word is the ordinary size

PLACES = {  # shift of the centre, in pixels
    "": (0, 0),
    "on the left": (-12, 0),
    "on the right": (12, 0),
    "at the top": (0, -12),
    "at the bottom": (0, 12),
}

# Words of the captions and the file of emoji-datasource-google (its short_name) that shows them. The first 40 are
# what the curriculum begins with. Chosen to be told apart at 42 pixels: no two breeds, no two makes of car.
GLYPHS = {
    "pig face": "pig", "tiger": "tiger2", "strawberry": "strawberry", "whale": "whale", "frog face": "frog",
    "cow face": "cow", "lion face": "lion_face", "cat face": "cat", "dog face": "dog", "mouse face": "mouse",
    "monkey face": "monkey_face", "bear face": "bear", "wolf face": "wolf", "hamster face": "hamster",
    "unicorn face": "unicorn_face", "zebra face": "zebra_face", "baby chick": "baby_chick", "penguin": "penguin",
    "fish": "tropical_fish", "crab": "crab", "lobster": "lobster", "butterfly": "butterfly", "bee": "bee",
    "snail": "snail", "turtle": "turtle", "snake": "snake", "elephant": "elephant", "apple": "apple",
    "banana": "banana", "grapes": "grapes", "watermelon": "watermelon", "orange": "tangerine", "lemon": "lemon",
    "cherries": "cherries", "tomato": "tomato", "carrot": "carrot", "tree": "deciduous_tree", "cactus": "cactus",
    "sunflower": "sunflower", "rose": "rose",
    # the rest
    "horse face": "horse", "giraffe face": "giraffe_face", "eagle": "eagle", "duck": "duck", "flamingo": "flamingo",
    "parrot": "parrot", "tyrannosaurus": "t-rex", "shark": "shark", "jellyfish": "jellyfish", "spider": "spider",
    "cherry blossom": "cherry_blossom", "pine tree": "evergreen_tree", "palm tree": "palm_tree",
    "four leaf clover": "four_leaf_clover", "maple leaf": "maple_leaf", "pear": "pear", "avocado": "avocado",
    "eggplant": "eggplant", "corn": "corn", "broccoli": "broccoli", "hamburger": "hamburger", "pizza": "pizza",
    "doughnut": "doughnut", "ice cream": "icecream", "house": "house", "car": "car", "airplane": "airplane",
    "sun": "sun_with_face", "star": "star", "cloud": "cloud", "rainbow": "rainbow", "umbrella": "umbrella",
    "snowman": "snowman", "pumpkin": "jack_o_lantern", "christmas tree": "christmas_tree", "soccer ball": "soccer",
    "basketball": "basketball", "guitar": "guitar", "robot face": "robot_face", "ghost": "ghost",
    "raccoon face": "raccoon", "hedgehog": "hedgehog", "sheep": "sheep", "rooster": "rooster", "swan": "swan",
    "peacock": "peacock", "crocodile": "crocodile", "dragon face": "dragon_face", "dolphin": "dolphin",
    "blowfish": "blowfish", "shell": "shell", "shrimp": "shrimp", "blueberries": "blueberries", "coconut": "coconut",
    "camel": "camel", "bell pepper": "bell_pepper", "bread": "bread", "croissant": "croissant",
    "cheese": "cheese_wedge", "french fries": "fries", "hot dog": "hotdog", "popcorn": "popcorn", "cookie": "cookie",
    "birthday cake": "birthday", "lollipop": "lollipop", "teapot": "teapot", "beer": "beer", "volcano": "volcano",
    "castle": "european_castle", "bus": "bus", "fire engine": "fire_engine", "bicycle": "bike",
    "helicopter": "helicopter", "alarm clock": "alarm_clock", "moon": "crescent_moon", "fire": "fire",
    "balloon": "balloon", "gift": "gift", "trophy": "trophy", "crown": "crown",
}  # fmt: skip

# Never seen in training, by no part of the model: what users personalise it with. Values as above.
SUBJECTS = {
    "fox face": "fox_face", "panda face": "panda_face", "koala face": "koala", "rabbit face": "rabbit",
    "polar bear face": "polar_bear", "tiger face": "tiger", "owl": "owl", "octopus": "octopus", "ladybug": "ladybug",
    "pineapple": "pineapple", "peach": "peach", "hibiscus": "hibiscus", "mushroom": "mushroom", "cupcake": "cupcake",
    "rocket": "rocket", "teddy bear": "teddy_bear",
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """What is in an image; `words` is the glyph's name."""

    words: str
    background: str
    size: str = ""
    place: str = ""

    @property
    def caption(self) -> str:
        article = "an" if (self.size or self.words)[0] in "aeiou" and self.words != "unicorn face" else "a"
        noun = f"{self.size} {self.words}".strip()
        where = "an" if self.background == "orange" else "a"
        return f"{article} {noun} on {where} {self.background} background" + (f", {self.place}" if self.place else "")


def draw_scene(words: str, rng: random.Random) -> Scene:
    """A random scene of a glyph. Most lie in the middle, where large ones have to."""
    size = rng.choices(["", "large", "small"], [5, 3, 2])[0]
    place = "" if size == "large" or rng.random() < 0.7 else rng.choice([place for place in PLACES if place])
    return Scene(words, rng.choice(list(BACKGROUNDS)), size, place)


def render(scene: Scene, glyph: Image.Image, jitter: tuple[int, int] = (0, 0)) -> Image.Image:
    """The scene as a 64 x 64 RGB image; `glyph` is RGBA, `jitter` shifts it by pixels."""
    pixels = SIZES[scene.size]
    shift_x, shift_y = PLACES[scene.place]
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUNDS[scene.background])
    small = glyph.resize((pixels, pixels), Image.Resampling.LANCZOS)
    corner = (IMAGE_SIZE - pixels) // 2
    image.paste(small, (corner + shift_x + jitter[0], corner + shift_y + jitter[1]), small)
    return image


def load_glyphs(package: Path, names: dict[str, str]) -> dict[str, Image.Image]:
    """Words -> RGBA image, out of the unpacked npm package `emoji-datasource-google`.

    Raises:
        FileNotFoundError: if the folder does not hold the package.
        KeyError: if the package has no such glyph.
    """
    index = package / "emoji.json"
    if not index.is_file():
        raise FileNotFoundError(f"{package} is not the npm package emoji-datasource-google: it has no emoji.json")
    images = {entry["short_name"]: entry["image"] for entry in json.loads(index.read_text())}
    missing = sorted(set(names.values()) - set(images))
    if missing:
        raise KeyError(f"{package} has no glyphs named {missing}")
    folder = package / "img" / "google" / "64"
    return {words: Image.open(folder / images[name]).convert("RGBA") for words, name in names.items()}
