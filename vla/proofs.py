"""The four proofs that every spec must pass, and an overfit check; ``vla model check`` runs them.

1. gradient probe: a token has a non-zero gradient exactly to the tokens that the graph reaches;
2. cache equivalence: phases with caches equal one joint forward;
3. expert parity: a pretrained expert alone equals the transformers model it came from;
4. frozen: a frozen expert's parameters are bit-identical after training steps and hold neither gradients nor optimizer state.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import find
from ..errors import UserError
from .flow import draw_times
from .graph import Graph
from .inputs import Inputs, Noisy, Targets
from .model import Model, build
from .spec import Flow, LatentHead, Spec, Stream, load_spec

TOLERANCE = 1e-5
"""Largest absolute difference allowed between two ways to compute the same thing in fp32."""

LEARNED = 0.3
"""Share of its loss that a model may keep on one batch, whatever the seed of its weights."""

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Probe:
    """A random batch for a model: two observations, the second with a shorter prompt."""

    inputs: Inputs
    targets: Targets
    noise: dict[str, Tensor]
    time: dict[str, Tensor]

    @property
    def noisy(self) -> dict[str, Noisy]:
        """The noise as what is noisy of each flow."""
        return {n: Noisy(x, self.time[n]) for n, x in self.noise.items()}


def probe(model: Model, batch: int = 2, seed: int = 0) -> Probe:
    """A random batch that fits ``model``; a function of ``seed``."""
    rng = torch.Generator().manual_seed(seed)
    spec, streams = model.spec, model.spec.streams
    size = _image_size(model)
    ids, present = _prompt(model, batch, size, rng)
    images = torch.randint(0, 256, (batch, spec.views, 3, size, size), generator=rng, dtype=torch.uint8)
    shapes = model.flow_shapes()
    actions = next((shapes[n] for n in model.actions), (1, 1))
    state = torch.randn(batch, spec.state_dim, generator=rng)
    targets = Targets(
        torch.randn(batch, *actions, generator=rng), torch.ones(batch, actions[0], dtype=torch.bool), images[:, :: spec.history.frames]
    )
    time = {n: draw_times((batch, 1), Flow(time_distribution="uniform"), rng).expand(batch, length) for n, (length, _) in shapes.items()}
    noise = {n: torch.randn(batch, *shape, generator=rng) for n, shape in shapes.items()}
    latents = None
    for name, module in model.foresight.items():
        if module.autoencoder is None:  # latents come with the data
            patches = model.codec(name).size if module.codec is not None else module.out.out_features
            targets = replace(targets, future=torch.randn(batch, streams[name].length, patches, generator=rng))
            seen = next((s.length for s in streams.values() if s.tokens == "present" and s.of == name), streams[name].length)
            latents = torch.randn(batch, seen, patches, generator=rng)
    features = {n: _features(s, batch, rng) for n, s in streams.items() if s.tokens == "features"}
    clean = {s.of: targets.actions if s.of in model.actions else noise[s.of] for s in streams.values() if s.tokens == "clean" and s.of}
    return Probe(Inputs(images, ids, present, state, latents, features, clean), targets, noise, time)


def gradient_probe(model: Model, tokens_per_stream: int = 3) -> list[str]:
    """Mismatches between real gradients and the closure of the graph, as sentences; empty when the proof holds.

    Detached edges carry no gradient, so what they carry forward is probed by perturbing the column's embeddings.
    """
    model = model.eval()
    data = probe(model, batch=1)
    inputs = replace(data.inputs, present=None)
    features = {n: (x, None) for n, (x, _) in inputs.features.items()}
    inputs = replace(inputs, features=features)
    leaves = {n: torch.zeros(1, model.spec.streams[n].length, width, requires_grad=True) for n, width in model.widths.items()}
    hidden = model.run(inputs, data.noisy, moved=leaves)
    by_gradient, by_value = (model.graph.reaches(model.mot.steps, gradient) for gradient in (True, False))
    starts = _starts(model.graph)
    wrong: list[str] = []
    for row in model.graph.owner:
        length = model.spec.streams[row].length
        for i in sorted({0, length // 2, length - 1, *range(min(tokens_per_stream, length))}):
            weights = torch.randn(hidden[row].shape[-1], generator=torch.Generator().manual_seed(i))
            read = (hidden[row][0, i] * weights).sum()
            gradients = torch.autograd.grad(read, list(leaves.values()), retain_graph=True, allow_unused=True)
            seen = torch.cat([_touched(g, leaf) for g, leaf in zip(gradients, leaves.values(), strict=True)])
            wrong += _differences(model.graph, row, i, seen, by_gradient[starts[row] + i], "gradient")
    for col in sorted({c for (_, c), e in model.graph.edges.items() if e.detach}):
        with torch.no_grad():
            moved = model.run(inputs, data.noisy, moved=leaves | {col: leaves[col] + 1.0})
        for row in model.graph.owner:
            changed = (moved[row] - hidden[row]).abs().amax(-1)[0] > 0
            reach = by_value[starts[row] : starts[row] + len(changed), starts[col] : starts[col] + leaves[col].shape[1]].any(1)
            if not torch.equal(changed, reach):
                wrong.append(f"{row}: {int(changed.sum())} tokens change with {col}, the graph says {int(reach.sum())}")
    return wrong


@torch.no_grad()
def cache_equivalence(model: Model) -> float:
    """Largest difference between phase-by-phase execution and the joint forward, over what every head predicts, in every mode.

    Streams that a schedule leaves out are there in the joint forward: nobody may read them.
    """
    model = model.eval()
    data = probe(model)
    joint = model.joint(data.inputs, data.noisy)
    worst = 0.0
    for mode in (None, *model.spec.modes):
        phases = model.graph.schedule(mode)
        cached: dict[str, Tensor] = {}
        kept = dict(model.contexts(data.inputs))
        for name, phase in phases.items():
            if phase.kind == "denoise":
                cached |= model.velocity(phase.streams, data.inputs, data.noisy, kept)
            else:
                kv, foresight = model.fill(name, data.inputs, kept, mode)
                kept |= kv
                cached |= foresight
        worst = max(worst, *(float((joint[n] - cached[n]).abs().max()) for n in cached))
    return worst


@torch.no_grad()
def expert_parity(model: Model) -> float | None:
    """Largest difference of logits between each pretrained expert alone in our loop and transformers' own forward.

    Alone, the expert has its family's own graph, positions and scale of embeddings, whatever the spec makes of it. A share of the
    largest logit where that is above 1: trained weights give logits of 20, which fp32 rounds to 2e-6. None where the spec has no
    pretrained expert.
    """
    worst = None
    for name, stream in model.spec.streams.items():
        if stream.tokens != "prompt":
            continue
        alone = _alone(model, name)
        expert, data = alone.vlm(name), probe(model).inputs
        assert data.images is not None and data.ids is not None and data.present is not None
        hidden, _ = alone.mot(alone.embed([name], data), {}, outputs=[name])
        ours = expert.logits(hidden[name])
        more = expert.family.alone(expert.model, data.ids, expert.normalise(data.images))
        theirs = expert.model(input_ids=data.ids, attention_mask=data.present.long(), **more).logits
        scale = float(theirs[data.present].abs().max().clamp(min=1))
        worst = max(worst or 0.0, float((ours - theirs)[data.present].abs().max()) / scale)
    return worst


def frozen(model: Model, steps: int = 3) -> list[str]:
    """What went wrong with frozen experts over a few optimizer steps, as sentences; empty when the proof holds."""
    model = model.train()
    optimizer = torch.optim.AdamW(list(model.trained().values()), lr=1e-3)
    experts = [e for e, config in model.spec.experts.items() if config.frozen]
    held = {name: p for e in experts for name, p in model.mot.experts[e].named_parameters(prefix=e)}
    before = {name: p.detach().clone() for name, p in held.items()}
    data = probe(model)
    for _ in range(steps):
        optimizer.zero_grad()
        model.losses(data.inputs, data.targets, data.noise, data.time)["loss"].backward()
        optimizer.step()
    wrong = [f"{name} changed" for name, p in held.items() if not torch.equal(p, before[name])]
    wrong += [f"{name} holds a gradient" for name, p in held.items() if p.grad is not None]
    return wrong + [f"{name} has optimizer state" for name, p in held.items() if p in optimizer.state]


def overfit(model: Model, steps: int = 200) -> float:
    """Mean loss of the last 10 of ``steps`` optimizer steps on one batch over that of the first 10: a model that learns is under 0.3."""
    model = model.train()
    optimizer = torch.optim.AdamW(list(model.trained().values()), lr=3e-3, weight_decay=0.0, foreach=True)
    data = probe(model)
    inputs, targets = model.see(data.inputs, model.graph.names), data.targets
    with torch.no_grad():
        cache = {n: kv for n, kv in model.observe(inputs)[0].items() if _constant(model, n)}
        targets = replace(targets, future=next((model.data(n, targets) for n in model.foresight), targets.future))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.losses(inputs, targets, data.noise, data.time, cache)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / sum(losses[:10])


def check(names: list[str]) -> dict[str, list[dict[str, object]]]:
    """Run every proof over the specs ``names``; rows as ``vla model check --json`` prints them.

    A spec of published size and the small one that stands for it share their proofs, which run once.
    """
    proved: dict[str, dict[str, object]] = {}
    rows = []
    for name in names:
        whole, spec = load_spec(name), load_spec(_proved(name))
        if spec.name not in proved:
            proved[spec.name] = _proofs(spec)
        rows.append(_row(whole, spec, proved[spec.name]))
    return {"rows": rows}


def _row(whole: Spec, spec: Spec, proofs: dict[str, object]) -> dict[str, object]:
    if Graph(whole).matrix() != Graph(spec).matrix():
        raise UserError(f"{spec.name} must have the edges of {whole.name}, which is proved through it; change sizes only")
    return {"spec": whole.name, "graph_hash": Graph(whole).hash(), **proofs}


def _proofs(spec: Spec) -> dict[str, object]:
    wrong_gradients = gradient_probe(build(spec))
    difference, parity = cache_equivalence(build(spec)), expert_parity(build(spec))
    wrong_frozen, ratio = frozen(build(spec)), max(overfit(build(spec, seed)) for seed in SEEDS)
    passed = (
        not wrong_gradients and difference < TOLERANCE and (parity is None or parity < TOLERANCE) and not wrong_frozen and ratio < LEARNED
    )
    return {
        "gradient_probe": wrong_gradients or "ok",
        "cache_equivalence": difference,
        "expert_parity": parity,
        "frozen": wrong_frozen or "ok",
        "overfit": ratio,
        "passed": passed,
    }


def _proved(name: str) -> str:
    """The spec that stands for ``name``: its variant of the same graph at a small size, where there is one."""
    path = find(name, "model")
    tiny = path.with_name(f"{path.stem}_tiny{path.suffix}")
    return str(tiny if tiny.is_file() else path)


def _alone(model: Model, name: str) -> Model:
    """The expert of a prompt stream and nothing else, as its family has it, with the weights of ``model``."""
    spec, vlm = model.spec, model.vlm(name)
    stream, owner = spec.streams[name], model.graph.owner[name]
    theta = vlm.model.config.get_text_config().rope_parameters["rope_theta"]
    changes: dict[str, object] = {
        "space": vlm.space.model_copy(update={"rope_theta": theta}),
        "experts": {owner: spec.experts[owner].model_copy(update={"rotary": "own"})},
        "streams": {name: stream.model_copy(update={"scale": "one"})},
        "edges": {name: {name: "full" if vlm.family.bidirectional else "causal"}},
        **{"heads": {}, "couple": {}, "schedule": None, "modes": {}, "sequence": ()},
    }
    alone = build(spec.model_copy(update=changes)).eval()
    alone.load_state_dict({key: value for key, value in model.state_dict().items() if key.startswith(f"mot.experts.{owner}.")})
    return alone


def _constant(model: Model, stream: str) -> bool:
    """Whether a stream is the work of frozen experts alone."""
    owner = model.graph.owner.get(stream)
    return owner is not None and model.spec.experts[owner].frozen


def _image_size(model: Model) -> int:
    """The side of images that every part of the model takes."""
    heads = [h.image_size for h in model.spec.heads.values() if isinstance(h, LatentHead) and h.autoencoder]
    towers = [model.vlm(n).side for n, s in model.spec.streams.items() if s.tokens == "prompt"]
    return next((size for size in (*heads, *towers) if size is not None), 64)


def _prompt(model: Model, batch: int, size: int, rng: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
    """Random prompt ids with the image tokens of all views in front, a word after each, and their presence (the second row is shorter)."""
    name = next((n for n, s in model.spec.streams.items() if s.tokens == "prompt"), None)
    if name is None:
        return _words(model, batch, rng)
    stream, vlm = model.spec.streams[name], model.vlm(name)
    rows, columns = vlm.grid((size, size))
    views = (rows * columns + 1) * model.spec.views
    ids = torch.randint(0, vlm.model.config.get_text_config().vocab_size, (batch, stream.length), generator=rng)
    ids = torch.where(ids == vlm.image_token, ids - 1, ids)
    is_image = torch.arange(stream.length) % (rows * columns + 1) < rows * columns
    is_image[views:] = False
    present = torch.ones(batch, stream.length, dtype=torch.bool)
    present[1:, -((stream.length - views) // 2) :] = False
    return torch.where(is_image, vlm.image_token, ids), present


def _words(model: Model, batch: int, rng: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
    """Random ids of the stream of words, if there is one, and their presence (the second row is shorter)."""
    stream = next((s for s in model.spec.streams.values() if s.vocabulary is not None), None)
    if stream is None or stream.vocabulary is None:
        return None, None
    present = torch.ones(batch, stream.length, dtype=torch.bool)
    present[1:, -2:] = False
    return torch.randint(0, stream.vocabulary, (batch, stream.length), generator=rng), present


def _features(stream: Stream, batch: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random features of a context; the second row has fewer."""
    assert stream.width is not None
    present = torch.ones(batch, stream.length, dtype=torch.bool)
    present[1:, -(stream.length // 2) :] = False
    return torch.randn(batch, stream.length, stream.width, generator=rng), present


def _starts(graph: Graph) -> dict[str, int]:
    starts, total = {}, 0
    for name in graph.names:
        starts[name] = total
        total += graph.spec.streams[name].length
    return starts


def _touched(gradient: Tensor | None, leaf: Tensor) -> Tensor:
    return (gradient[0] != 0).any(-1) if gradient is not None else torch.zeros(leaf.shape[1], dtype=torch.bool)


def _differences(graph: Graph, row: str, i: int, seen: Tensor, expected: Tensor, what: str) -> list[str]:
    out = []
    for col, start in _starts(graph).items():
        length = graph.spec.streams[col].length
        got, want = seen[start : start + length], expected[start : start + length]
        if not torch.equal(got, want):
            out.append(f"{row}[{i}] has a {what} to {int(got.sum())} tokens of {col}, the graph says {int(want.sum())}")
    return out
