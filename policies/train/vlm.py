"""The recipe that trains the embedded VLM on rendered scenes: instructions to point at, questions to answer.

Several turns about one scene stand in one sequence, because the images are nearly all of the work. A turn reads the
images and itself, never another turn, and its positions begin where the images end: what the model computes for a turn
is exactly what it computes when that turn stands alone.

Asking for a place by name is a long plateau to a fresh network, so the image tokens are also taught directly (``Finder``):
each scores whether it holds the centre of a red cube, a blue plate, ... and where in it, and names the colour and the shape
of what it holds. The finder is thrown away after training. And two heads are shown where to look (``guide_weight``): in the
``guided`` layers a slot, or the end of a noun phrase, at the image token of its thing; an answer, in the last of these
layers, at what its question names (one head at the first noun or coordinate, one at the second), and in the last layer of
all at the image token that it is about. 300 steps without finder and guides left the pointing error at 10 % of the width,
and 400 without the guide from answers to nouns left "is the red cube left of the green cube ?" at chance although both
cubes were found.

Coordinates are learned with soft labels over the location tokens (a Gaussian of ``sigma`` bins about the exact value),
and also from the hidden states *before* the last layers (``exits``): another expert that reads this one's keys and
values sees those layers' inputs, so what is pointed at must be there by then.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ...config import Strict
from ...data.questions import CAMERAS, LOCATIONS, Turn, turns
from ...data.readers.scenes import open_scenes
from .optim import TrainConfig
from .team import Part
from .vlm_model import END, NONE, VlmConfig, build_model, build_processor, save_folder

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
SHAPES = ("cube", "plate", "cylinder")
FOUND = (*(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES), "gripper")
"""What the finder knows by name; a kind that no scene shows is simply never found."""
GUIDED_HEADS = 2
THING, ANSWER, CLUE = range(3)
"""What a guide is for: a thing in the ``guided`` layers, an answer's image token in the last layer, what a question names."""


class Recipe(Strict):
    """``kind: vlm``.

    Attributes:
        data: folder of scenes.
        model: sizes.
        start: folder of a model to start from; ``null`` starts from random weights.
        turns: questions per scene and step.
        sigma: width of the soft labels in location bins.
        exits: hidden states, counted from 0 = the embedding, whose pointing is trained too, through the final norm and the LM head.
        exit_weight: weight of each of them.
        word_weight: weight of the answers in words.
        find_weight: weight of the finder on the image tokens: places and names.
        guided: layers of the language model whose first heads learn where a slot or a noun phrase should look.
        guide_weight: weight of that.
        jitter: photometric augmentation: brightness, contrast and colour are scaled by 1 +- this.
    """

    kind: Literal["vlm"]
    data: str
    model: VlmConfig = VlmConfig()
    start: str | None = None
    turns: PositiveInt = 6
    sigma: PositiveFloat = 1.2
    exits: tuple[PositiveInt, ...] = ()
    exit_weight: NonNegativeFloat = 0.3
    word_weight: NonNegativeFloat = 1.0
    find_weight: NonNegativeFloat = 1.0
    guided: tuple[NonNegativeInt, ...] = (1, 2)
    guide_weight: NonNegativeFloat = 0.3
    jitter: NonNegativeFloat = 0.25
    train: TrainConfig


class Finder(nn.Module):
    """Where each kind of thing is, and what it is that is there, read off the image tokens: training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, 3 * len(FOUND) + len(COLOURS) + len(SHAPES))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image tokens (B*V, T, D) -> scores and offsets (B*V, T, K, 3), colours (B*V, T, colours), shapes (B*V, T, shapes), in fp32."""
        places, colours, shapes = self.head(features).float().split((3 * len(FOUND), len(COLOURS), len(SHAPES)), -1)
        return places.unflatten(-1, (len(FOUND), 3)), colours, shapes

    @staticmethod
    def loss(found: tuple[Tensor, Tensor, Tensor], places: Tensor) -> tuple[Tensor, Tensor]:
        """For finding: cross entropy over tokens, or none of them (score 0), plus the offset inside the right token. For
        naming: cross entropy of colour and shape where a thing is.

        Args:
            found: see ``forward``.
            places: (B*V, K, 2) normalised image coordinates, negative where there is none.
        """
        scored, colours, shapes = found
        side = round(scored.shape[1] ** 0.5)
        present = places[..., 0] >= 0
        cell = (places * side).floor().clamp(0, side - 1)
        index = (cell[..., 1] * side + cell[..., 0]).long()
        scores = torch.cat([scored[..., 0], torch.zeros_like(scored[:, :1, :, 0])], dim=1)  # (B*V, T + 1, K)
        target = torch.where(present, index, scored.shape[1])
        weight = torch.where(present, 1.0, 0.1)
        which = (nn.functional.cross_entropy(scores, target, reduction="none") * weight).sum() / weight.sum()
        offset = scored[..., 1:].gather(1, index[:, None, :, None].expand(-1, 1, -1, 2))[:, 0]
        image, kind = present[:, :-1].nonzero().T  # the gripper has no name
        at = index[image, kind]
        colour = nn.functional.cross_entropy(colours[image, at], kind // len(SHAPES))
        shape = nn.functional.cross_entropy(shapes[image, at], kind % len(SHAPES))
        return which + (offset - (places * side - cell)).abs()[present].mean(), colour + shape


class Reader(nn.Module):
    """The VLM over packed turns, and the finder.

    Images (B, V, 3, H, W), ids (B, T), mask (B, 1, T, T) additive, positions (B, T), want (N,) flat positions (b T + t).
    """

    def __init__(self, vlm: Any, exits: tuple[int, ...]) -> None:
        super().__init__()
        self.vlm = vlm
        self.exits = exits
        self.finder = Finder(vlm.config.text_config.hidden_size)
        vision = vlm.model.vision_model
        vision.embeddings.register_forward_hook(lambda _, inputs, out: out.to(vision.post_layernorm.weight.dtype))

    def forward(
        self, images: Tensor, ids: Tensor, mask: Tensor, positions: Tensor, want: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
        """What the finder found; logits (N, vocabulary) at ``want``, of the model, then of each exit."""
        core = self.vlm.model
        features = core.get_image_features(images).pooler_output
        embedded = core.get_input_embeddings()(ids)
        slots = (ids == self.vlm.config.image_token_id)[..., None]
        embedded = embedded.masked_scatter(slots, features.to(embedded.dtype))
        out = core.text_model(
            inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False, output_hidden_states=bool(self.exits)
        )
        last = out.last_hidden_state.flatten(0, 1)[want]
        early = [core.text_model.norm(out.hidden_states[layer].flatten(0, 1)[want]) for layer in self.exits]
        return self.finder(features), [self.vlm.lm_head(hidden) for hidden in (last, *early)]


class Packer:
    """Turns scenes and turns into the arrays of ``Reader``."""

    def __init__(self, processor: Any, cameras: int, sigma: float) -> None:
        tokenizer = processor.tokenizer
        self.tokenizer = tokenizer
        text = processor.expand_text_with_image_tokens(["<image>" * cameras], [[0] * cameras], [[0] * cameras])[0]
        self.prefix: list[int] = tokenizer(text).input_ids
        image = tokenizer.convert_tokens_to_ids("<image>")
        self.images = np.array([i for i, token in enumerate(self.prefix) if token == image]).reshape(cameras, -1)
        self.end: int = tokenizer.convert_tokens_to_ids(END)
        self.none: int = tokenizer.convert_tokens_to_ids(NONE)
        self.first: int = tokenizer.convert_tokens_to_ids("<loc_0>")
        self.pad: int = tokenizer.pad_token_id
        self.sigma = sigma

    def pack(self, scenes: list[list[Turn]]) -> dict[str, Tensor]:
        """ids (B, T), turn (B, T): 0 for the images and 1, 2, ... for turns, -1 for padding; positions (B, T); and labels:
        where (N,), word (N,) (-1 for a coordinate), slot (N,), value (N,) in [0, 1); and what should look where:
        looks (M, 5) of row, position, position looked at, purpose (``THING``, ...), head (-1: all guided ones)."""
        base = len(self.prefix)
        rows: list[tuple[list[int], list[int], list[int], list[tuple[int, int, float]]]] = []
        looks: list[tuple[int, ...]] = []
        for scene in scenes:
            ids, turn, positions, labels = list(self.prefix), [0] * base, list(range(base)), []
            for number, item in enumerate(scene, 1):
                asked = self.tokenizer(f"{item.text} {' '.join(name for name, _ in item.slots)}").input_ids
                answer = [] if item.slots else [*self.tokenizer(item.answer).input_ids, self.end]
                start = len(ids)
                for k, (_, value) in enumerate(item.slots):
                    labels.append((start + len(asked) - len(item.slots) + k, self.none if value is None else -1, value or 0.0))
                labels += [(start + len(asked) - 1 + k, token, 0.0) for k, token in enumerate(answer)]
                looks += [(len(rows), *look) for look in self._looks(item, asked, start, len(answer) - 1)]
                body = [*asked, *answer[:-1]]
                ids += body
                turn += [number] * len(body)
                positions += range(base, base + len(body))
            rows.append((ids, turn, positions, labels))
        length = -(-max(len(row[0]) for row in rows) // 16) * 16
        pad = [length - len(row[0]) for row in rows]
        return {
            "ids": torch.tensor([row[0] + [self.pad] * n for row, n in zip(rows, pad, strict=True)]),
            "turn": torch.tensor([row[1] + [-1] * n for row, n in zip(rows, pad, strict=True)]),
            "positions": torch.tensor([row[2] + [0] * n for row, n in zip(rows, pad, strict=True)]),
            "where": torch.tensor([b * length + w for b, row in enumerate(rows) for w, _, _ in row[3]]),
            "word": torch.tensor([word for row in rows for _, word, _ in row[3]]),
            "slot": torch.tensor([bool(item.slots) for scene in scenes for item in scene for _ in range(self._labels(item))]),
            "value": torch.tensor([value for row in rows for _, _, value in row[3]]),
            "looks": torch.tensor(looks, dtype=torch.long).reshape(-1, 5),
        }

    def _looks(self, turn: Turn, asked: list[int], start: int, words: int) -> list[tuple[int, int, int, int]]:
        """Position, position looked at, purpose and head, for a turn whose text begins at ``start``.

        Each of the ``words`` of an answer is computed where the one before it stands, so all of these look alike.
        """
        found = []
        for k in range(len(turn.slots)):
            (_, x), (_, y) = turn.slots[k - k % 2 : k - k % 2 + 2]
            if x is not None and y is not None:
                at = start + len(asked) - len(turn.slots) + k
                found.append((at, self._image_token(k // 2 % len(self.images), x, y), THING, -1))
        answers = range(start + len(asked) - 1, start + len(asked) - 1 + words)
        clues = [start + i for i, token in enumerate(asked) if self.first <= token < self.first + LOCATIONS]
        for phrase, (x, y) in turn.marks:
            image = self._image_token(0, x, y)
            if phrase == "?":
                found += [(at, image, ANSWER, -1) for at in answers]
                continue
            ids = self.tokenizer(phrase).input_ids
            end = start + len(ids) - 1 + max(i for i in range(len(asked)) if asked[i : i + len(ids)] == ids)
            found.append((end, image, THING, -1))
            clues.append(end)
        if clues:
            named = sorted(clues)
            found += [(at, named[min(head, len(named) - 1)], CLUE, head) for at in answers for head in range(GUIDED_HEADS)]
        return found

    def _image_token(self, view: int, x: float, y: float) -> int:
        side = round(self.images.shape[1] ** 0.5)
        return int(self.images[view, int(y * side) * side + int(x * side)])

    def _labels(self, turn: Turn) -> int:
        return len(turn.slots) or len(self.tokenizer(turn.answer).input_ids) + 1

    def soft(self, value: Tensor) -> Tensor:
        """Distributions (N, LOCATIONS) about values (N,) in [0, 1)."""
        centres = (torch.arange(LOCATIONS, device=value.device) + 0.5) / LOCATIONS
        return torch.softmax(-0.5 * ((centres - value[:, None]) * LOCATIONS / self.sigma) ** 2, dim=-1)


def turn_mask(turn: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, 1, T, T): causal, and a turn reads the images (turn 0) and itself."""
    length = turn.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=turn.device).tril()
    allowed = causal & ((turn[:, None] == 0) | (turn[:, None] == turn[:, :, None]))
    return torch.zeros(allowed.shape, dtype=dtype, device=turn.device).masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


class VlmTask:
    """See ``loop.Task``."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.processor = build_processor(recipe.model)
        vlm = build_model(recipe.model, recipe.train.seed)
        if recipe.start is not None:
            from transformers import AutoModelForImageTextToText

            vlm = AutoModelForImageTextToText.from_pretrained(recipe.start, dtype=torch.float32)
            vlm.resize_token_embeddings(len(self.processor.tokenizer), mean_resizing=False)  # words may have been added since
        self.looked: dict[int, Tensor] = {}
        register_attention((*recipe.guided, recipe.model.text.layers - 1), self.looked)
        vlm.set_attn_implementation("triune_matmul")
        self.module = Reader(vlm, recipe.exits)
        self.scenes = open_scenes(recipe.data)
        self.packer = Packer(self.processor, self.scenes.images.shape[1], recipe.sigma)

    def batch(self, part: Part) -> dict[str, Tensor]:
        generator = np.random.default_rng(np.random.SeedSequence([self.recipe.train.seed, part.index, 2]))
        chosen = generator.integers(0, len(self.scenes), self.recipe.train.batch_size // part.of)
        asked = [turns(self.scenes.annotations[i], generator, self.recipe.turns) for i in chosen]
        images = torch.from_numpy(jitter(self.scenes.images[chosen], self.recipe.jitter, generator))
        places = torch.from_numpy(np.stack([found_places(self.scenes.annotations[i]) for i in chosen]))
        return {"images": images.permute(0, 1, 4, 2, 3), "places": places, **self.packer.pack(asked)}

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        device = batch["ids"].device.type
        dtype = torch.bfloat16 if torch.is_autocast_enabled(device) else torch.float32
        images = (batch["images"].float() / 127.5 - 1).contiguous()
        # SmolVLM buckets patch positions in the type of the pixels: in bf16, 12 patches a side would fall into 9 buckets
        weights = {n: p if ".vision_model.embeddings." in n else p.to(dtype) for n, p in self.module.named_parameters()}
        with torch.autocast(device, enabled=False):  # all in one type: half the time of autocast's conversions
            inputs = (images, batch["ids"], turn_mask(batch["turn"], dtype), batch["positions"], batch["where"])
            found, (final, *early) = torch.func.functional_call(self.module, weights, inputs)
            slot = batch["slot"]
            at_slots, at_words = slot.nonzero()[:, 0], (~slot).nonzero()[:, 0]
            point = self._point(final[at_slots].float(), batch, at_slots)
            words = nn.functional.cross_entropy(final[at_words].float(), batch["word"][at_words])
            find, name = self.module.finder.loss(found, batch["places"].flatten(0, 1))
            loss = point + self.recipe.word_weight * words + self.recipe.find_weight * (find + name)
            losses = {"loss": loss, "point": point, "words": words, "find": find, "name": name}
            for layer, logits in zip(self.recipe.exits, early, strict=True):
                losses[f"exit_{layer}"] = self._point(logits[at_slots].float(), batch, at_slots)
                losses["loss"] = losses["loss"] + self.recipe.exit_weight * losses[f"exit_{layer}"]
            if self.recipe.guided:
                losses["guide"] = self._guide(batch)
                losses["loss"] = losses["loss"] + self.recipe.guide_weight * losses["guide"]
            with torch.no_grad():
                losses["error"] = self._error(final[at_slots].float(), batch, at_slots)
                losses["exact"] = (final[at_words].argmax(-1) == batch["word"][at_words]).float().mean()
        return losses

    def validate(self) -> dict[str, Any]:
        return {}

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        vlm = build_model(self.recipe.model)
        state = {name.removeprefix("vlm."): tensor for name, tensor in weights.items() if name.startswith("vlm.")}
        missing, unexpected = vlm.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        save_folder(vlm, self.processor, folder, torch.bfloat16)

    def _point(self, logits: Tensor, batch: dict[str, Tensor], at: Tensor) -> Tensor:
        """Cross entropy with soft labels where there is a coordinate, with ``<none>`` elsewhere, over the whole vocabulary."""
        word, value, first = batch["word"][at], batch["value"][at].float(), self.packer.first
        spread = (self.packer.soft(value) * logits[:, first : first + LOCATIONS]).sum(-1)
        hard = logits.gather(1, word.clamp(min=0)[:, None])[:, 0]
        return (logits.logsumexp(-1) - torch.where(word < 0, spread, hard)).mean()

    def _guide(self, batch: dict[str, Tensor]) -> Tensor:
        """Minus the log of the attention that is paid where it should be."""
        guided, final = self.recipe.guided, self.recipe.model.text.layers - 1
        row, at, token, purpose, head = batch["looks"].T
        paid = []
        for layers, kind in ((guided, THING), ((final,), ANSWER), (guided[-1:], CLUE)):
            mine = purpose == kind
            for layer in layers:
                heads = self.looked[layer][row[mine], :, at[mine], token[mine]].float()  # (m, GUIDED_HEADS)
                one = heads.gather(1, head[mine].clamp(min=0)[:, None])[:, 0]
                paid.append(torch.where(head[mine] < 0, heads.mean(1), one))
        return -torch.cat(paid).clamp(min=1e-4).log().mean()

    def _error(self, logits: Tensor, batch: dict[str, Tensor], at: Tensor) -> Tensor:
        """Median pointing error as a share of the image width, of each coordinate that is in its image."""
        inside = batch["word"][at] < 0
        best = logits[inside][:, self.packer.first : self.packer.first + LOCATIONS].argmax(-1)
        return ((best + 0.5) / LOCATIONS - batch["value"][at][inside]).abs().median()


def build(recipe: Recipe, out: Path) -> VlmTask:
    """The task of a recipe."""
    return VlmTask(recipe)


def found_places(annotation: dict[str, Any]) -> np.ndarray:
    """Normalised image coordinates (V, K, 2) of each kind of thing in ``FOUND``, -1 where there is none."""
    places = np.full((len(CAMERAS), len(FOUND), 2), -1, np.float32)
    for thing in (*annotation["objects"], {"colour": "", "shape": "gripper", "image": annotation["gripper"]["image"]}):
        kind = f"{thing['colour']} {thing['shape']}".strip()
        for view, camera in enumerate(CAMERAS):
            if kind in FOUND and thing["image"][camera] is not None:
                places[view, FOUND.index(kind)] = thing["image"][camera]
    return places


def jitter(images: np.ndarray, strength: float, generator: np.random.Generator) -> np.ndarray:
    """Photometric jitter of uint8 (B, V, H, W, 3): brightness, contrast, colour cast and a little noise, one draw per image."""
    count = images.shape[:2]
    gain = 1 + strength * generator.uniform(-1, 1, (*count, 1, 1, 1)) + 0.3 * strength * generator.uniform(-1, 1, (*count, 1, 1, 3))
    shift = 255 * 0.3 * strength * generator.uniform(-1, 1, (*count, 1, 1, 1))
    noise = generator.integers(-4, 5, images.shape, dtype=np.int8)
    out = images.astype(np.float32)
    out *= gain.astype(np.float32)
    out += shift.astype(np.float32)
    out += noise
    return np.clip(out, 0, 255, out=out).astype(np.uint8)


def register_attention(guided: tuple[int, ...], looked: dict[int, Tensor]) -> None:
    """Attention as two matrix products: on a CPU its backward takes half the time of the fused one's.

    The probabilities of the first ``GUIDED_HEADS`` heads of the language model's ``guided`` layers are left in ``looked``.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaAttention

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        scores = torch.matmul(query * scaling, key.transpose(2, 3))
        scores = scores if attention_mask is None else scores + attention_mask
        paid = torch.softmax(scores, -1)
        if isinstance(module, LlamaAttention) and module.layer_idx in guided:
            looked[module.layer_idx] = paid[:, :GUIDED_HEADS]
        return torch.matmul(paid, value).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("triune_matmul", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("triune_matmul", ALL_MASK_ATTENTION_FUNCTIONS["eager"])  # additive, never left out
