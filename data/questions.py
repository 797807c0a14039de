"""Instructions and questions about an annotated scene, with their answers: what grounds a VLM, and what scores it.

A turn is a text to be read and what should follow. Pointing turns end in *slots* (``<x1> <y1> <x2> <y2>`` for where the
thing is in image 1 and 2, ``<u1> <v1> <u2> <v2>`` for where its destination is): each is answered by one normalised
coordinate, or by nothing when the point is not in that image. The other turns are answered in words.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

CAMERAS = ("agentview", "wrist")
TARGET_SLOTS = ("<x1>", "<y1>", "<x2>", "<y2>")
DESTINATION_SLOTS = ("<u1>", "<v1>", "<u2>", "<v2>")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
LOCATIONS = 128

MARGIN = 0.06
"""Two things whose centres differ by less than this share of the image are neither left nor right of each other."""

PIXELS = 12
"""A thing of which fewer pixels are in sight, because the arm hides it, is not asked about."""

Thing = dict[str, Any]
Maker = Callable[["Asker"], "Turn | None"]

LIFT = ("lift", "pick up", "grasp", "grab", "take", "raise", "push", "pull", "reach", "touch", "move", "hold", "find", "show", "point to")
STACK = ("stack {} on {}", "put {} on {}", "place {} on {}", "stack {} on top of {}", "put {} next to {}", "push {} to {}")


@dataclass(frozen=True)
class Turn:
    """One question.

    Attributes:
        kind: ``point``, ``colour``, ``relation``, ``count``, ``exist``, ``holding`` or ``caption``.
        text: what is asked, without slots.
        slots: slot tokens that follow the text, each with its answer in [0, 1), or ``None`` for "not in that image".
        answer: words of the answer where there are no slots.
        marks: phrases of the text, each with the place in image 1 of the thing that it is about; the mark of ``?`` is what
            the answer is about. Training may use them, nothing else does.
    """

    kind: str
    text: str
    slots: tuple[tuple[str, float | None], ...] = ()
    answer: str = ""
    marks: tuple[tuple[str, tuple[float, float]], ...] = ()


class Asker:
    """Draws turns about one scene.

    Args:
        annotation: as ``envs.scenes`` writes it.
        generator: all choices come from it.
    """

    def __init__(self, annotation: dict[str, Any], generator: np.random.Generator) -> None:
        self.annotation = annotation
        self.generator = generator
        self.things: list[Thing] = annotation["objects"]
        self.seen = [thing for thing in self.things if _visible(thing)]

    def ask(self, kinds: tuple[str, ...]) -> Turn:
        """A turn of one of ``kinds``; one that the scene does not allow becomes another, in the end a ``point``."""
        for kind in (*kinds, *kinds):
            turn = MAKERS[kind](self)
            if turn is not None:
                return turn
        turn = point(self)
        assert turn is not None
        return turn

    def pick(self, items: Any) -> Any:
        """One of ``items``."""
        return items[int(self.generator.integers(len(items)))]

    def describe(self, thing: Thing) -> str:
        """A noun phrase that fits this thing alone."""
        colours = [other["colour"] for other in self.things]
        shapes = [other["shape"] for other in self.things]
        options = [f"the {thing['colour']} {thing['shape']}"] * 8
        if colours.count(thing["colour"]) == 1:
            options += [f"the {thing['colour']} object", f"the {thing['colour']} thing"]
            options += [f"the {thing['colour']} block"] if thing["shape"] == "cube" else []
        if shapes.count(thing["shape"]) == 1:
            options.append(f"the {thing['shape']}")
        return str(self.pick(options))

    def slots(self, target: Thing | None, destination: Thing | None, both: bool) -> tuple[tuple[str, float | None], ...]:
        """Slots and their answers for a target and, if ``both``, a destination."""
        asked = (*TARGET_SLOTS, *DESTINATION_SLOTS) if both else TARGET_SLOTS
        return tuple(zip(asked, _coordinates(target) + _coordinates(destination), strict=False))

    def marks(self, *about: tuple[str, Thing | None]) -> tuple[tuple[str, tuple[float, float]], ...]:
        """Marks for phrases about things, of those that image 1 shows."""
        seen = [(phrase, thing["image"][CAMERAS[0]]) for phrase, thing in about if thing is not None]
        return tuple((phrase, (xy[0], xy[1])) for phrase, xy in seen if xy is not None)

    def relations(self, subject: Thing, anchor: Thing) -> list[str]:
        """What holds of two things in image 1: ``left of``, ``right of``, ``in front of``, ``behind``."""
        (x, y), (ax, ay) = subject["image"][CAMERAS[0]], anchor["image"][CAMERAS[0]]
        found = ["left of"] if x < ax - MARGIN else ["right of"] if x > ax + MARGIN else []
        if subject["state"] == anchor["state"] == "table":
            found += ["in front of"] if y > ay + MARGIN else ["behind"] if y < ay - MARGIN else []
        return found

    def decided(self, subject: Thing, anchor: Thing, relation: str) -> bool:
        """Whether ``relation`` clearly holds or clearly does not."""
        sideways = relation in ("left of", "right of")
        difference = subject["image"][CAMERAS[0]][0 if sideways else 1] - anchor["image"][CAMERAS[0]][0 if sideways else 1]
        return abs(difference) > MARGIN and (sideways or subject["state"] == anchor["state"] == "table")


def point(asker: Asker) -> Turn | None:
    """An instruction; its slots say where to act."""
    told = asker.annotation.get("instructions", [])
    if told and asker.generator.random() < 0.8:
        task = asker.pick(told)
        both = bool(asker.generator.random() < 0.7)
        return Turn("point", task["text"], asker.slots(task["target"], task["destination"], both))
    if not asker.things:
        return Turn("point", "point to the gripper", asker.slots(asker.annotation["gripper"], None, False))
    target = asker.pick(asker.things)
    others = [thing for thing in asker.things if thing is not target]
    draw = asker.generator.random()
    if draw < 0.25 and others:
        destination = asker.pick(others)
        first, second = asker.describe(target), asker.describe(destination)
        text = str(asker.pick(STACK[:2] * 3 + STACK)).format(first, second)
        return Turn("point", text, asker.slots(target, destination, True), marks=asker.marks((first, target), (second, destination)))
    both = bool(asker.generator.random() < 0.5)
    if draw < 0.30:
        return Turn("point", "point to the gripper", asker.slots(asker.annotation["gripper"], None, both))
    if draw < 0.34:
        absent = _absent(asker)
        return Turn("point", f"{asker.pick(LIFT)} {absent}", asker.slots(None, None, both))
    phrase = asker.describe(target)
    text = f"{asker.pick(LIFT[:3] * 3 + LIFT)} {phrase}"
    return Turn("point", text, asker.slots(target, None, both), marks=asker.marks((phrase, target)))


def instruct(asker: Asker, target: Thing) -> Turn:
    """An order to "pick up ..." a given thing, with the slots of its place."""
    return Turn("point", f"pick up {asker.describe(target)}", asker.slots(target, None, False))


def colour(asker: Asker) -> Turn | None:
    """The colour of a thing named by its shape, its place, or its relation to another."""
    if not asker.seen:
        return None
    thing = asker.pick(asker.seen)
    word = asker.pick(("color", "colour"))
    options: list[tuple[str, tuple[tuple[str, Thing | None], ...]]] = []
    if [other["shape"] for other in asker.things].count(thing["shape"]) == 1:
        options += [(f"what {word} is the {thing['shape']} ?", ((f"the {thing['shape']}", thing),))] * 2
    if len(asker.seen) == len(asker.things):
        for anchor in asker.seen:
            if anchor is not thing:
                clear = [r for r in asker.relations(thing, anchor) if _only(asker, thing, anchor, r)]
                phrase = asker.describe(anchor)
                options += [(f"what {word} is the object {r} {phrase} ?", ((phrase, anchor),)) for r in clear]
    if _apart(asker, thing):
        options.append((f"what {word} is the object at {locate(thing['image'][CAMERAS[0]])} ?", ()))
    if not options:
        return None
    text, about = asker.pick(options)
    return Turn("colour", text, answer=thing["colour"], marks=asker.marks(*about, ("?", thing)))


def relation(asker: Asker) -> Turn | None:
    """Whether, or what, is left of, right of, in front of or behind a thing."""
    if len(asker.seen) < 2:
        return None
    order = asker.generator.permutation(len(asker.seen))
    subject, anchor = asker.seen[order[0]], asker.seen[order[1]]
    word = asker.pick(("left of", "right of", "left of", "right of", "in front of", "behind"))
    if asker.generator.random() < 0.5:
        if not asker.decided(subject, anchor, word):
            return None
        said = "yes" if word in asker.relations(subject, anchor) else "no"
        first, second = asker.describe(subject), asker.describe(anchor)
        marks = asker.marks((first, subject), (second, anchor))
        return Turn("relation", f"is {first} {word} {second} ?", answer=said, marks=marks)
    if len(asker.seen) != len(asker.things) or not all(asker.decided(other, anchor, word) for other in asker.seen if other is not anchor):
        return None
    found = [other for other in asker.seen if other is not anchor and word in asker.relations(other, anchor)]
    if len(found) > 1:
        return None
    said = f"the {found[0]['colour']} {found[0]['shape']}" if found else "nothing"
    phrase = asker.describe(anchor)
    marks = asker.marks((phrase, anchor), ("?", found[0] if found else None))
    return Turn("relation", f"what is {word} {phrase} ?", answer=said, marks=marks)


def shape(asker: Asker) -> Turn | None:
    """The shape of a thing named by its colour."""
    found = [thing for thing in asker.seen if [other["colour"] for other in asker.things].count(thing["colour"]) == 1]
    if not found:
        return None
    thing = asker.pick(found)
    phrase = f"the {thing['colour']} object"
    marks = asker.marks((phrase, thing), ("?", thing))
    return Turn("shape", f"what shape is {phrase} ?", answer=thing["shape"], marks=marks)


def count(asker: Asker) -> Turn | None:
    """How many things there are, of all kinds or of one."""
    if len(asker.seen) != len(asker.things) or any(thing["state"] == "held" for thing in asker.things):
        return None
    thing = asker.pick(asker.things)
    key = asker.pick((None, "colour", "shape"))
    words = {None: "objects", "colour": f"{thing['colour']} objects", "shape": f"{thing['shape']}s"}[key]
    number = len(asker.things) if key is None else sum(other[key] == thing[key] for other in asker.things)
    return Turn("count", f"how many {words} are there ?", answer=NUMBERS[number])


def exist(asker: Asker) -> Turn | None:
    """Whether a thing is there."""
    if asker.generator.random() < 0.5 or not asker.seen:
        return Turn("exist", f"is there {_absent(asker).replace('the', 'a', 1)} ?", answer="no")
    thing = asker.pick(asker.seen)
    phrase = f"a {thing['colour']} {thing['shape']}"
    return Turn("exist", f"is there {phrase} ?", answer="yes", marks=asker.marks((phrase, thing), ("?", thing)))


def holding(asker: Asker) -> Turn | None:
    """What the gripper holds, or what lies on a thing."""
    held = [thing for thing in asker.things if thing["state"] == "held"]
    if asker.generator.random() < 0.5 or not asker.seen:
        said = f"the {held[0]['colour']} {held[0]['shape']}" if held else "nothing"
        marks = asker.marks(("the gripper", asker.annotation["gripper"]), ("?", held[0] if held else None))
        return Turn("holding", "what is the gripper holding ?", answer=said, marks=marks)
    below = asker.pick(asker.seen)
    above = [thing for thing in asker.things if thing["on"] == below["name"]]
    said = f"the {above[0]['colour']} {above[0]['shape']}" if above else "nothing"
    phrase = asker.describe(below)
    marks = asker.marks((phrase, below), ("?", above[0] if above else None))
    return Turn("holding", f"what is on {phrase} ?", answer=said, marks=marks)


def caption(asker: Asker) -> Turn | None:
    """All things from left to right, and one relation."""
    if not asker.seen:
        return None
    ordered = sorted(asker.seen, key=lambda thing: thing["image"][CAMERAS[0]][0])
    across = [thing["image"][CAMERAS[0]][0] for thing in ordered]
    if any(b - a < MARGIN / 2 for a, b in pairwise(across)):
        return None
    words = " , ".join(f"a {thing['colour']} {thing['shape']}" for thing in ordered)
    return Turn("caption", str(asker.pick(("describe the scene .", "what is on the table ?", "what do you see ?"))), answer=words)


MAKERS: dict[str, Maker] = {
    "point": point, "colour": colour, "relation": relation, "shape": shape, "count": count, "exist": exist, "holding": holding,
    "caption": caption,
}  # fmt: skip


QUESTIONS = (0.28, 0.40, 0.06, 0.05, 0.07, 0.08, 0.06)
"""How often each kind of question is tried first, in the order of ``MAKERS`` after ``point``."""


def turns(annotation: dict[str, Any], generator: np.random.Generator, number: int) -> list[Turn]:
    """``number`` turns about a scene: half of them point, the others ask. Where no things are annotated, all point: nothing can be
    asked about what is not known."""
    asker = Asker(annotation, generator)
    drawn = []
    for _ in range(number):
        if not asker.things or generator.random() < 0.5:
            drawn.append(asker.ask(("point",)))
        else:
            kinds = generator.choice(list(MAKERS)[1:], 3, replace=False, p=QUESTIONS)
            drawn.append(asker.ask(tuple(map(str, kinds))))
    return drawn


def locate(xy: list[float]) -> str:
    """Two location tokens."""
    return " ".join(f"<loc_{min(LOCATIONS - 1, int(value * LOCATIONS))}>" for value in xy)


def _visible(thing: Thing) -> bool:
    """Whether image 1 shows enough of a thing to ask about it; where that was not recorded, whether it is within the image."""
    camera = CAMERAS[0]
    return thing["image"][camera] is not None and thing.get("visible", {}).get(camera, PIXELS) >= PIXELS


def _coordinates(thing: Thing | None) -> list[float | None]:
    found: list[float | None] = []
    for camera in CAMERAS:
        xy = thing["image"][camera] if thing is not None else None
        found += [None, None] if xy is None else [float(xy[0]), float(xy[1])]
    return found


def _absent(asker: Asker) -> str:
    """A thing that is not there. Never a purple cube or a capsule: training must not teach that these are absent."""
    present = {(thing["colour"], thing["shape"]) for thing in asker.things} | {("purple", "cube")}
    colours = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
    while True:
        pair = asker.pick(colours), asker.pick(("cube", "cube", "plate", "cylinder"))
        if pair not in present:
            return f"the {pair[0]} {pair[1]}"


def _only(asker: Asker, thing: Thing, anchor: Thing, word: str) -> bool:
    """Whether ``thing`` is the only one of which ``word`` holds, and clearly so."""
    others = [other for other in asker.seen if other is not thing and other is not anchor]
    return all(asker.decided(other, anchor, word) and word not in asker.relations(other, anchor) for other in others)


def _apart(asker: Asker, thing: Thing) -> bool:
    xy = np.array(thing["image"][CAMERAS[0]])
    return all(np.abs(xy - other["image"][CAMERAS[0]]).max() > MARGIN for other in asker.seen if other is not thing)
