"""Writes prompts.txt, the bundled prompts, from the word lists of prompt_words.txt: `python -m rapm.zoo.make_prompts`.

Nothing is random: subjects, settings and looks of a group take turns, and the order of the list is that of hashes, so
that any first part of it has a little of everything.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

PER_GROUP = 46
NEAR = 0.7  # two prompts share less than this part of their words
NUMBERS = "two; three; four; five; six; seven; eight; nine; ten; a dozen"
RELATIONS = "to the left of; to the right of; in front of; behind; next to"
# How a scene, {}, is pictured. "day" needs daylight out of doors; a look that speaks of what the scene already says is
# passed over.
LOOKS = {
    "plain": ("{}; a photo of {}; {}; {}, sharp focus; {}; a photograph of {}; {}, natural colors"),
    "day": (
        "{}, golden hour; {}, soft overcast light; {}, early morning light; {}, bright midday sun; {}, "
        "backlit by a low sun; {}, late afternoon light, long shadows"
    ),
    "camera": (
        "{}, 35mm film photograph; {}, shallow depth of field; black and white photograph of {}; {}, "
        "wide-angle photograph; {}, shot from a low angle; cinematic still of {}; {}, muted colors, fine film "
        "grain; {}, documentary photograph; {}, telephoto shot with a blurred background"
    ),
    "room": (
        "{}, soft window light; {}, warm lamplight; {}, bright airy photograph; {}, soft shadows; {}, cozy "
        "atmosphere; {}, moody low-key lighting"
    ),
    "studio": (
        "{}, studio lighting; {}, softbox lighting, clean composition; {}, high-key photograph; {}, dramatic "
        "side light; {}, minimalist composition; {}, high detail, neutral colors"
    ),
    "table": (
        "{}, food photography; {}, seen from directly above; {}, close-up, shallow depth of field; {}, soft "
        "window light; {}, dark and moody; {}, bright and fresh colors; {}, 50mm photograph"
    ),
    "face": (
        "portrait of {}; close-up portrait of {}; {}, 85mm portrait, blurred background; black and white "
        "portrait of {}; {}, candid photograph; {}, natural light; {}, editorial photograph; head and "
        "shoulders portrait of {}"
    ),
    "pose": (
        "studio portrait of {}; {}, softbox lighting; {}, dramatic side light; {}, magazine cover photograph; "
        "{}, medium format photograph; {}, soft rim light; low-key portrait of {}"
    ),
    "macro": (
        "macro photograph of {}; extreme close-up of {}; {}, focus stacked; {}, crisp detail, diffuse light; "
        "{}, backlit macro shot; {}, tiny details in sharp focus"
    ),
    "paint": (
        "an oil painting of {}; a watercolor painting of {}; an impressionist painting of {}; a gouache "
        "painting of {}; {}, acrylic painting with visible brush strokes; {}, loose watercolor and ink; {}, "
        "digital painting; {}, painted in soft pastels"
    ),
    "draw": (
        "a pencil drawing of {}; {}, ink drawing with fine hatching; {}, children's book illustration; {}, "
        "flat vector illustration; {}, vintage engraving; {}, woodblock print; {}, linocut print in two "
        "colors; a charcoal sketch of {}; {}, comic book style; {}, anime style, clean lines"
    ),
    "render": (
        "{}, low poly 3D render; {}, isometric illustration; {}, pixel art; {}, stylized 3D render; {}, paper "
        "cutout style; {}, clay animation style"
    ),
    "epic": (
        "{}, concept art; {}, fantasy illustration; {}, highly detailed digital painting; {}, volumetric "
        "light; {}, dramatic lighting; {}, matte painting; {}, storybook illustration; {}, epic wide shot"
    ),
    "graphic": (
        "{}; {}, flat design; {}, bold simple shapes; {}, limited color palette; {}, screen print; {}, clean vector art"
    ),
    "craft": (
        "{}, handmade look; {}, soft studio light; {}, tilt-shift photograph; {}, shallow depth of field; {}, "
        "pastel background; {}, close-up photograph"
    ),
    "underwater": (
        "underwater photograph of {}; {}, wildlife documentary still; {}, wide-angle photograph; {}, clear "
        "blue tones; {}, natural history photograph"
    ),
}
# What the look must not speak of once the scene does.
CLASHES = (
    r"light|lit\b|lamp|sun|dawn|dusk|noon|candle|neon|moon|night|hour|evening|morning|afternoon|dark|storm|stars|sky|"
    r"fog|mist|shadow|moody|high-key|low-key",
    r"background|wall|backdrop|curtain|focus",
    r"seen|angle|wide|close|panorama|frame|depth",
    r"color|tone|shades|black and white|engraving|charcoal|pencil|ink\b",
    r"bright|soft|warm|cold",
    r"painting|drawing|style|simple|outlines|pattern",
    r"detail|structure",
    r"contrast|dramatic|minimalist|empty|plain",
    r"portrait|looking",
    r"telephoto|workshop|cellar|loft|\bhall|tools|garage|window|theater",
)


class Group(NamedTuple):
    """`subjects` x `settings`, each drawn in one of the `looks`, which take turns."""

    category: str
    looks: list[str]
    subjects: list[str]
    settings: list[str]


def read_groups() -> list[Group]:
    """Those of prompt_words.txt."""
    text = Path(__file__).with_name("prompt_words.txt").read_text(encoding="utf-8")
    groups = []
    for block in text.strip().split("\n\n")[1:]:
        head, _, words = block.partition("\n")
        category, looks = head.split(": ")
        subjects, settings = (_split(part.replace("\n", " ")) for part in words.split("\n+\n"))
        groups.append(Group(category, looks.split(), subjects, settings))
    return groups


def make_prompts() -> list[tuple[str, str]]:
    """(category, prompt), in the order of the file."""
    pairs = [(group.category, prompt) for number, group in enumerate(read_groups()) for prompt in _group(number, group)]
    kept: list[tuple[str, str]] = []
    seen: list[tuple[int, int]] = []  # a bit for each word, and how many there are
    bits: dict[str, int] = {}
    for category, prompt in sorted(pairs, key=lambda pair: hashlib.sha256(pair[1].encode()).digest()):
        words = set(re.findall(r"[a-z0-9-]+", prompt.lower()))
        mine = sum(1 << bits.setdefault(word, len(bits)) for word in words)
        shared = ((len(words) + count, (mine & other).bit_count()) for other, count in seen)
        if all(both < NEAR * (total - both) for total, both in shared):
            kept.append((category, prompt))
            seen.append((mine, len(words)))
    return kept


def _group(number: int, group: Group) -> list[str]:
    _, families, subjects, settings = group
    pairs = [(i, (i + shift) % len(settings)) for shift in range(len(settings)) for i in range(len(subjects))]
    return [_prompt(k, number, families, subjects[i], settings[j]) for k, (i, j) in enumerate(pairs[:PER_GROUP])]


def _prompt(k: int, number: int, families: list[str], subject: str, setting: str) -> str:
    """The k-th prompt of a group."""
    day, setting = not setting.startswith("*"), setting.removeprefix("*")
    subject = subject.replace("#", _rotated(NUMBERS, 7 * k + number)[0]).replace("@", _rotated(RELATIONS, k)[0])
    scene = f"{subject} {setting}"
    if " with " in subject and setting.startswith("with "):
        scene = f"{subject}, {setting.removeprefix('with ')}"
    turns = [families[(k + step) % len(families)] for step in range(len(families))]
    looks = [
        look
        for family in turns
        if day or family != "day"
        for look in _rotated(LOOKS[family], k // len(families) + number)
    ]
    first = next(look for look in looks if not _clash(scene, look))
    prompt = first.format(scene)
    if k % 4 == 3 and first in _split(LOOKS["day"]) + _split(LOOKS["room"]):  # two, as many do who want a photograph
        more = [look for look in _rotated(LOOKS["camera"], k + number) if look.startswith("{}")]
        prompt = next((look.format(prompt) for look in more if not _clash(prompt, look)), prompt)
    return prompt


def _clash(scene: str, look: str) -> bool:
    return any(re.search(words, scene) and re.search(words, look) for words in CLASHES)


def _split(phrases: str) -> list[str]:
    return phrases.split("; ")


def _rotated(phrases: str, k: int) -> list[str]:
    options = _split(phrases)
    k %= len(options)
    return options[k:] + options[:k]


if __name__ == "__main__":
    text = "".join(prompt + "\n" for _, prompt in make_prompts())
    Path(__file__).with_name("prompts.txt").write_text(text, encoding="utf-8")
