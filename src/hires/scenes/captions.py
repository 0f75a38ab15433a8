"""Captions: what a camera sees of a scene, in a closed vocabulary."""

from math import cos, sin

import numpy as np
import torch

from hires.scenes.render import FAMILIES, OUTLINES
from hires.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    MATERIALS,
    REACH,
    SHAPES,
    WHOLE,
    Camera,
    Object,
    Scene,
    stream_of,
)

COUNTS = ("one", "two", "three", "four", "five")
LONGEST = 28  # words
ENOUGH = 0.35  # share of an object that must be in view for it to be named
PARTLY = 0.75  # below this share a single object is "part of" itself

PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
SURROUNDS = {
    "brick": ("on brick", "on a brick wall", "against a brick wall", "on bricks"),
    "sand": ("on sand", "on the sand", "lying on rippled sand", "in the sand"),
    "grass": ("on grass", "on the grass", "in the grass", "lying on grass"),
    "planks": ("on planks", "on wooden planks", "on a plank floor", "lying on planks"),
    "water": ("on water", "floating on water", "in the water", "on the water"),
    "snow": ("on snow", "in the snow", "lying on snow", "on white snow"),
}
ALONE = {
    "brick": ("brick", "a brick wall"),
    "sand": ("sand", "rippled sand"),
    "grass": ("grass", "the grass"),
    "planks": ("planks", "a plank floor"),
    "water": ("water", "the water"),
    "snow": ("snow", "white snow"),
}
OPENINGS = ("", "", "", "a picture of ", "a photo of ", "there are ", "a view of ")
CLOSE_OPENINGS = ("a close view of ", "a close up of ", "", "a detail of ")
EMPTY_OPENINGS = ("a close view of ", "a close up of ", "nothing but ", "only ", "a detail of ")
RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


def _vocabulary() -> tuple[str, ...]:
    phrases = [
        *COUNTS,
        "small",
        "large",
        *COLOURS,
        *MATERIALS,
        *SHAPES,
        *PLURALS.values(),
        "a an and with part of there is",
    ]
    for table in (SURROUNDS, ALONE, RELATIONS):
        phrases += [phrase for options in table.values() for phrase in options]
    phrases += [*OPENINGS, *CLOSE_OPENINGS, *EMPTY_OPENINGS, *BACKGROUNDS]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


VOCABULARY: tuple[str, ...] = _vocabulary()


def _points_inside(shape: str) -> np.ndarray:
    """(points, 2) of a grid that lie inside the unit shape."""
    axis = torch.linspace(-REACH, REACH, 23)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    family, *parameters = OUTLINES[shape]
    p, q, scale = (torch.full_like(x, v) for v in parameters)
    inside = FAMILIES[family](x, y, p, q, scale)[0] < 0
    return torch.stack([x[inside], y[inside]], 1).double().numpy()


POINTS = {shape: _points_inside(shape) for shape in SHAPES}


def visible_share(item: Object, camera: Camera) -> float:
    """The share of an object's area that the camera sees, 0 to 1 (square scenes)."""
    half, reach = 0.5 / camera.zoom, REACH * item.radius
    dx, dy = item.x - camera.x, item.y - camera.y
    if abs(dx) + reach <= half and abs(dy) + reach <= half:
        return 1.0
    if abs(dx) - reach >= half or abs(dy) - reach >= half:
        return 0.0
    c, s = cos(item.angle) * item.radius, sin(item.angle) * item.radius
    points = POINTS[item.shape]
    x, y = c * points[:, 0] - s * points[:, 1] + dx, s * points[:, 0] + c * points[:, 1] + dy
    return float(((np.abs(x) <= half) & (np.abs(y) <= half)).mean())


def in_view(scene: Scene, camera: Camera = WHOLE) -> list[tuple[Object, float]]:
    """The objects a caption names, each with its visible share: much of it, or it fills much of the view."""
    seen = []
    for item in scene.objects:
        share = visible_share(item, camera)
        if share >= ENOUGH or share * (item.radius * camera.zoom) ** 2 >= 0.06:
            seen.append((item, share))
    return seen


def _relation(first: list[Object], second: list[Object]) -> list[str]:
    """Where all of `first` is, as seen from all of `second`."""
    margin = 0.06
    found = []
    if max(o.x for o in first) + margin < min(o.x for o in second):
        found.append("left")
    if min(o.x for o in first) - margin > max(o.x for o in second):
        found.append("right")
    if max(o.y for o in first) + margin < min(o.y for o in second):
        found.append("above")
    if min(o.y for o in first) - margin > max(o.y for o in second):
        found.append("below")
    return found


def caption(scene: Scene, camera: Camera = WHOLE, rng: np.random.Generator | None = None) -> str:
    """Say what is in view: at most 28 words of `VOCABULARY`, commas the only punctuation.

    The wording is drawn from `rng`; without one it follows from the scene's id.
    """
    rng = stream_of(scene.id, 1) if rng is None else rng
    draws = iter(rng.random(32).tolist())

    def pick(options: tuple[str, ...] | list[str]) -> str:
        return options[int(next(draws) * len(options))]

    seen = in_view(scene, camera)
    if not seen:
        return pick(EMPTY_OPENINGS) + pick(ALONE[scene.background])
    groups: dict[tuple[str, str, str], list[tuple[Object, float]]] = {}
    for item, share in seen:
        groups.setdefault((item.colour, item.material, item.shape), []).append((item, share))

    whole = camera.zoom < 1.5
    names = []
    for (colour, material, shape), members in groups.items():
        sized, plain = next(draws) < 0.4, next(draws) < 0.12
        size = members[0][0].size
        words = [size] if sized and whole and size != "medium" else []
        words += [colour] if plain else [colour, material]
        words.append(shape if len(members) == 1 else PLURALS[shape])
        if len(members) > 1:
            words.insert(0, COUNTS[len(members) - 1])
        else:
            article = "an" if words[0][0] in "aeiou" else "a"
            words.insert(0, "one" if next(draws) < 0.15 else article)
            if members[0][1] < PARTLY:
                words[:0] = ["part", "of"]
        names.append(" ".join(words))

    where = [[item for item, _ in members] for members in groups.values()]
    order = list(range(len(names)))
    if len(order) > 1 and next(draws) < 0.5:
        order = order[1:] + order[:1]
    names, where = [names[k] for k in order], [where[k] for k in order]
    said = names[0]
    if len(names) > 1:
        relations = _relation(where[0], where[1])
        link = f" {pick(RELATIONS[pick(relations)])} " if relations and next(draws) < 0.75 else None
        if link is None:
            said += " and " + names[1] if len(names) == 2 else ", " + names[1]
        else:
            said += link + names[1]
        if len(names) == 3:
            said += (", with " if link else " and ") + names[2]
    opening = pick(OPENINGS if camera.zoom < 2.5 else CLOSE_OPENINGS)
    if opening == "there are ":
        opening = "there is " if len(where[0]) == 1 else opening
    ground = " " + pick(SURROUNDS[scene.background])
    for attempt in (opening + said + ground, said + ground, said + " on " + scene.background):
        if len(attempt.split()) <= LONGEST:
            return attempt
    return said
