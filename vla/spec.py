"""The spec: a model as data.

Experts hold weights, streams are ordered groups of tokens that an expert processes, edges say which stream reads
which, heads turn hidden states into losses and outputs. Everything else (mask, order, caches, gradient routes) is
derived from the edges in ``graph.py``.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from math import pi, prod
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ..config import Strict, find, load_tree, parse
from ..errors import UserError

Relation = Literal["full", "causal", "row_causal", "window", "block_causal", "own_block", "earlier_block"]
Encoder = Literal["mlp", "mlp3", "linear", "relu", "norm"]
Turn = Literal["all", "words", "images"]
PhaseKind = Literal["prefill", "ar", "regress", "denoise"]


class Space(Strict):
    """The attention space where coupled experts meet: q (N, H), k and v (G, H)."""

    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    rope_theta: float = 10_000.0

    @model_validator(mode="after")
    def _grouped(self) -> "Space":
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even for rotary positions")
        return self


class PretrainedExpert(Strict):
    """A transformers VLM: its own modules, its own sizes.

    ``weights`` is ``embedded:v1``, ``path:<dir>``, ``hf:<id>@<revision>``, or ``random:<one of these>`` for the same
    architecture with fresh weights: a control, or with ``random:config:<name>`` a published architecture to load weights into.
    ``layers``: how many of its first layers are kept. ``final_norm``: whether its final hidden states are normed, or as its last layer
    left them (GR00T). ``rotary``: whether its keys turn as they were trained or by the space's base.
    ``allow_perturb``: a frozen expert reads no other, unless this says that its answers may change with what it reads (F1).
    """

    kind: Literal["pretrained"] = "pretrained"
    weights: str
    frozen: bool = True
    allow_perturb: bool = False
    layers: PositiveInt | None = None
    final_norm: bool = True
    rotary: Literal["own", "space"] = "own"

    @model_validator(mode="after")
    def _has_weights(self) -> "PretrainedExpert":
        if self.weights.startswith("config:"):
            raise ValueError(f"'{self.weights}' is an architecture without weights; write 'random:{self.weights}' for fresh ones")
        return self

    @property
    def fresh(self) -> bool:
        """Whether the architecture alone is taken, with random weights."""
        return self.weights.startswith("random:")

    @property
    def reference(self) -> str:
        """Where the architecture, and unless ``fresh`` the weights, come from."""
        return self.weights.removeprefix("random:")


class CrossLayers(Strict):
    """Layers ``first``, ``first + every``, ... of an expert read the streams of others in a way of their own.

    ``reads``: ``keys``, the rotated keys and values of the others in the same step, projected anew, with positions that count from
    their stream's start (SmolVLA), or ``hidden``, the final hidden states along edges ``via: hidden`` (GR00T, text of Wan).
    ``place``: ``instead`` of self-attention, or ``after`` it with a norm and an output of its own. ``adapter``: what hidden states
    pass first, once for all layers: an MLP, or a layer norm. ``turns``: what of them the first, second, ... of these layers reads, over
    and over: the words of a prompt, its images, or all (GR00T).
    """

    first: NonNegativeInt = 1
    every: PositiveInt = 2
    reads: Literal["keys", "hidden"] = "keys"
    place: Literal["instead", "after"] = "instead"
    adapter: Literal["none", "mlp", "norm"] = "none"
    turns: tuple[Turn, ...] = ("all",)

    @model_validator(mode="after")
    def _consistent(self) -> "CrossLayers":
        if self.reads == "keys" and (self.place == "after" or self.adapter != "none" or self.turns != ("all",)):
            raise ValueError("place: after, adapter and turns are for layers that read hidden states; set reads: hidden")
        if "all" not in self.turns and not {"words", "images"} <= set(self.turns):
            raise ValueError(f"turns {', '.join(self.turns)} leave words or images unread; name both, or all")
        return self


class TimeFeatures(Strict):
    """Sine and cosine of ``scale * t * base ** -x`` for ``width`` / 2 values of x from 0 to 1, or up to 1 without the ``endpoint``.

    The default has periods from 0.004 to 4 (openpi); scale 1000, base 10000 and no endpoint are those of DDPM and Wan.
    """

    width: PositiveInt | None = None
    scale: PositiveFloat = 2 * pi / 4e-3
    base: PositiveFloat = 1000.0
    endpoint: bool = True


class DecoderExpert(Strict):
    """Our own pre-norm transformer, trained from scratch or loaded with converted weights.

    ``space``: its own attention space; where it meets others in keys, a ``bridge`` maps it into the shared one and back: ``linear``
    (HBridge) or with a layer norm behind (DeepVision). ``norm``: RMS with a weight, layer norm with weight
    and bias, or without; ``final_eps``: that of the final one, where it differs from ``norm_eps``. ``qk_norm``: of each head, of the
    ``whole`` projection, or none. ``activation``: of the FFN, ``gated`` (SwiGLU, Gemma's GeGLU) or not. ``bias``: of all projections, or
    of the FFN's alone. ``axes``: rotary channels per axis of its positions, by default all of one; an empty list turns nothing.
    ``time``: how the flow time enters its layers: scale, shift and gate of each norm (``adaptive_norm``), scale and shift of the
    attention's alone (``attention_norm``, GR00T), or of a table in each layer plus one projection for all (``adaln``, Wan).
    ``time_of``: what its time embedding is a function of; weights trained with noise at t = 1 say ``1-t``.
    """

    kind: Literal["decoder"] = "decoder"
    width: PositiveInt
    depth: PositiveInt
    ffn: PositiveInt
    space: Space | None = None
    bridge: Literal["none", "linear", "linear_norm"] = "none"
    norm: Literal["rms", "layer", "layer_plain"] = "rms"
    norm_eps: PositiveFloat = 1e-6
    final_norm: bool = True
    final_eps: PositiveFloat | None = None
    qk_norm: bool | Literal["whole"] = True
    bias: bool | Literal["ffn"] = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    gated: bool = True
    axes: tuple[PositiveInt, ...] | None = None
    cross: CrossLayers | None = None
    time: Literal["none", "adaptive_norm", "attention_norm", "adaln"] = "none"
    time_of: Literal["t", "1-t"] = "t"
    time_features: TimeFeatures = TimeFeatures()
    frozen: bool = False
    allow_perturb: bool = False

    @model_validator(mode="after")
    def _bridged(self) -> "DecoderExpert":
        if self.bridge != "none" and (self.space is None or (self.cross is not None and self.cross.place == "instead")):
            raise ValueError(
                "a bridge leads from a space of the expert's own, and not to layers that read in place of keys; set space alone"
            )
        if self.cross is not None and sum(map(self.crosses, range(self.depth))) < len(self.cross.turns):
            raise ValueError(f"an expert of {self.depth} layers has fewer cross layers than cross.turns; make it deeper")
        return self

    def crosses(self, layer: int) -> bool:
        """Whether a layer is one of ``cross``."""
        return self.cross is not None and layer >= self.cross.first and (layer - self.cross.first) % self.cross.every == 0


Expert = Annotated[PretrainedExpert | DecoderExpert, Field(discriminator="kind")]


class Coupling(Strict):
    """Where an expert's layers stand among the steps of the backbone, and in which of them it meets the others.

    Its layer i runs in step ``first + every * i``, or where ``steps`` says. ``joint``: the steps from .. to (exclusive) in which its
    streams read those of other experts and are read by them, by default all of its own. HBridge leaves out both ends, DeepVision-VLA
    joins the last layers of experts of unequal depth, SmolVLA's expert can have a layer for every second one of the VLM.
    """

    first: NonNegativeInt = 0
    every: PositiveInt = 1
    steps: tuple[NonNegativeInt, ...] | None = None
    joint: tuple[NonNegativeInt, PositiveInt] | None = None


class Stream(Strict):
    """An ordered group of tokens.

    ``expert``: who processes it; none for a context of ``width`` channels, which others read through edges ``via: hidden``.
    ``tokens``: ``prompt`` (images and text through the VLM's own embedding), ``words`` (ids of a ``vocabulary``, embedded here),
    ``features`` (of ``width`` channels, as they are given; through the encoder where an expert processes them), ``state`` (one token
    of proprioception), ``actions`` (one noisy token per chunk step), ``queries`` (learned; registers where no head reads them),
    ``latents`` (learned, and the present frames in the latents of the foresight head), ``frames`` (noisy latents of the frames to
    come). Three are made ``of`` another stream: ``present``, the present frames encoded as that stream's frames are; ``clean``, that
    stream's data without noise (the target in training, its result in inference); ``hidden``, its final hidden states.
    ``length`` is the token count; the prompt's is its padded length. ``encoder``: how states, actions and hidden states become
    tokens: by SiLU MLPs, one linear layer, an MLP with ReLU of ``inner`` channels, or a layer norm of hidden states. ``joins``: features
    of the flow time that join actions there although the expert's norms carry it (GR00T). ``table`` adds sines of their place to
    tokens, counted from its value, or numbers that are ``learned``. ``scale``: what a prompt's embeddings are multiplied
    by. ``block`` is the block size of ``block_causal`` and ``own_block`` relations. ``time_of``: the flow stream whose time its
    tokens carry; without, they are clean (t = 1).
    ``positions``: ``continue`` counts on after all earlier streams (absent tokens are skipped), ``restart`` begins at ``start``.
    ``ids``: one per ``token``, or ``one`` for all of a piece (BAGEL's images). ``advances``: whether later streams count on from
    it (a noisy copy does not). ``grid``: frames, rows and columns, for positions of three axes.
    """

    expert: str | None = None
    tokens: Literal["prompt", "words", "features", "state", "actions", "queries", "latents", "frames", "present", "clean", "hidden"]
    length: PositiveInt
    of: str | None = None
    width: PositiveInt | None = None
    vocabulary: PositiveInt | None = None
    encoder: Encoder = "mlp"
    inner: PositiveInt | None = None
    joins: TimeFeatures | None = None
    table: NonNegativeInt | Literal["learned"] | None = None
    scale: Literal["one", "sqrt_width"] = "one"
    time_of: str | None = None
    block: PositiveInt | None = None
    positions: Literal["continue", "restart"] = "continue"
    start: NonNegativeInt = 0
    ids: Literal["token", "one"] = "token"
    advances: bool = True
    grid: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Stream":
        if self.expert is None and self.tokens not in ("features", "state"):
            raise ValueError(f"a context holds features or state, not {self.tokens}; name the expert that processes it")
        if (self.expert is None or self.tokens == "features") != (self.width is not None):
            raise ValueError("width is that of features and of a context (a stream without an expert), and only theirs")
        if (self.tokens == "words") != (self.vocabulary is not None):
            raise ValueError("vocabulary is the number of ids of a stream of words, and only theirs")
        if (self.tokens in ("present", "clean", "hidden")) != (self.of is not None):
            raise ValueError("of names the stream that tokens of kind present, clean or hidden are made of, and only theirs")
        if (self.encoder == "relu") != (self.inner is not None):
            raise ValueError("inner is the width within an encoder with ReLU, and only there")
        if self.encoder in ("relu", "norm") and self.tokens not in ("state", "hidden", "features"):
            raise ValueError(f"encoder {self.encoder} is for states, features and hidden states, not for {self.tokens}")
        if self.joins is not None and (self.tokens != "actions" or self.encoder != "mlp"):
            raise ValueError("joins is for actions through an MLP")
        if self.grid is not None and prod(self.grid) != self.length:
            raise ValueError(f"grid {self.grid} holds {prod(self.grid)} tokens, length says {self.length}")
        if self.start and self.positions != "restart":
            raise ValueError("start is where positions begin that restart; set positions: restart")
        return self


class Piece(Strict):
    """A run of tokens of one stream in an interleaved sequence."""

    stream: str
    length: PositiveInt


class Run(Strict):
    """Pieces that follow each other several ``times``; ``block``: all of them together are one block."""

    times: PositiveInt
    pieces: tuple["Piece | Run", ...]
    block: bool = False


class Edge(Strict):
    """``row: {col: relation}``.

    ``relation``: everything (``full``); what is not later (``causal``), of that the last ``block`` tokens (``window``); blocks that are not
    later, the own block, strictly earlier blocks. Within a stream or a sequence; between two streams blocks are counted in each, and
    ``row_causal`` lets row k read tokens 0 to k of another (a copy of its prompt, TwinBrainVLA).
    ``detach`` stops the gradient from the row into the column's keys and values. ``via: hidden`` reads the column's final hidden states
    in the row's cross layers, not its keys layer by layer.
    """

    relation: Relation = "full"
    detach: bool = False
    via: Literal["keys", "hidden"] = "keys"

    @model_validator(mode="after")
    def _consistent(self) -> "Edge":
        if self.via == "hidden" and self.relation != "full":
            raise ValueError(f"an edge via hidden states is full, not {self.relation}")
        return self


class Flow(Strict):
    """How a flow is trained and integrated (t=0 noise, t=1 data; velocity data - noise).

    ``time_distribution``: ``beta`` draws 1 - t from 0.999 Beta(1.5, 1) + 0.001, mass near noise (openpi pi0.py); ``uniform`` from
    U(0, 1); ``logit_normal`` is the sigmoid of a normal number. ``shift`` s bends 1 - t to s (1 - t) / (1 + (s - 1)(1 - t)), in
    training and in the grid of inference. ``time_weight``: ``bell`` weighs the middle of the flow most (FastWAM).
    """

    time_distribution: Literal["beta", "uniform", "logit_normal"] = "beta"
    shift: PositiveFloat = 1.0
    time_weight: Literal["one", "bell"] = "one"


class FlowHead(Flow):
    """Flow matching on the action chunk. ``prefix``: up to how many steps of it may be given clean (training-time real-time
    chunking, arXiv 2512.05964: training draws how many, and they carry t = 1). ``inner``: channels of an MLP with ReLU that makes the
    velocity, in place of one linear layer."""

    kind: Literal["flow"] = "flow"
    action_dim: PositiveInt
    loss: Literal["l2", "l1"] = "l2"
    prefix: NonNegativeInt = 0
    inner: PositiveInt | None = None
    weight: float = 1.0


class LatentHead(Flow):
    """Foresight in an autoencoder's latents of the frames ``horizon`` steps ahead: by regression (InternVLA-A1), or by flow matching
    where the stream's tokens are ``frames``.

    One square of ``patch`` x ``patch`` latent cells per token; cameras in order. ``predicts``: the ``frame`` itself, or its ``change``
    from the present one, so that a picture stays what it was but for what moves. Without an ``autoencoder`` the latents of
    ``channels`` come encoded with the data, as patches.
    """

    kind: Literal["latent"] = "latent"
    autoencoder: str | None = None
    channels: PositiveInt | None = None
    cameras: tuple[str, ...]
    image_size: PositiveInt
    patch: PositiveInt
    horizon: PositiveInt
    predicts: Literal["frame", "change"] = "frame"
    weight: float = 0.1

    @model_validator(mode="after")
    def _has_latents(self) -> "LatentHead":
        if (self.autoencoder is None) == (self.channels is None):
            raise ValueError("give either the autoencoder, or the channels of latents that come encoded with the data")
        return self


class WordHead(Strict):
    """The next word of a stream of words: cross-entropy in training, the likeliest in an ``ar`` phase."""

    kind: Literal["words"] = "words"
    weight: float = 1.0


Head = Annotated[FlowHead | LatentHead | WordHead, Field(discriminator="kind")]


class Guidance(Strict):
    """Classifier-free guidance: v = v0 + ``scale`` (v - v0), where v0 does without the streams ``without``."""

    scale: float
    without: tuple[str, ...]


class Phase(Strict):
    """One step of inference. ``steps`` counts Euler steps of a denoise phase, ``shift`` bends their grid where it is not that of
    training; of its flows, those in ``clean`` are given without noise and those in ``noise`` stay noise, while the others are denoised.

    ``period``: after how many calls a prefill or regress phase runs anew; between, its keys and values are read as they were.
    ``stale``: the age in seconds from which on they are refused.
    """

    kind: PhaseKind
    streams: tuple[str, ...]
    steps: PositiveInt | None = None
    shift: PositiveFloat | None = None
    clean: tuple[str, ...] = ()
    noise: tuple[str, ...] = ()
    guidance: Guidance | None = None
    period: PositiveInt = 1
    stale: PositiveFloat | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Phase":
        if self.kind == "denoise" and (self.period > 1 or self.stale is not None):
            raise ValueError("a denoise phase runs at every call; period and stale are for what it reads")
        if self.kind != "denoise" and (self.guidance or self.steps or self.shift or self.clean or self.noise):
            raise ValueError(f"steps, shift, clean, noise and guidance are for denoise phases, not for {self.kind}")
        return self


Schedule = dict[str, Phase]


class History(Strict):
    """How many ``frames`` of each camera are seen, ``every`` so many control steps, the present one the last of them."""

    frames: PositiveInt = 1
    every: PositiveInt = 1


class Spec(Strict):
    """A whole model. See ``configs/model/`` for the systems that are written in it.

    ``sequence``: streams that stand interleaved, piece by piece; there ``causal`` means earlier in the sequence, and a piece, or a run
    that says so, is a block.
    ``history``: what is seen of the past; before an episode's beginning its first frame stands.
    ``schedule``: the phases of inference, derived from the edges where it is not given. ``modes``: other schedules of the same
    weights.
    """

    name: str
    about: str
    space: Space
    experts: dict[str, Expert]
    streams: dict[str, Stream]
    edges: dict[str, dict[str, Relation | Edge]]
    heads: dict[str, Head]
    state_dim: PositiveInt
    cameras: tuple[str, ...]
    history: History = History()
    couple: dict[str, Coupling] = {}
    sequence: tuple[Piece | Run, ...] = ()
    schedule: Schedule | None = None
    modes: dict[str, Schedule] = {}

    @model_validator(mode="after")
    def _consistent(self) -> "Spec":
        for name, stream in self.streams.items():
            self._check_stream(name, stream)
        for row, cols in self.edges.items():
            _known(row, self.streams, f"edges.{row}", "stream")
            for col in cols:
                _known(col, self.streams, f"edges.{row}.{col}", "stream")
        for name, head in self.heads.items():
            _known(name, self.streams, f"heads.{name}", "stream")
            self._check_head(name, head)
        for name in self.couple:
            _known(name, self.experts, f"couple.{name}", "expert")
        for name, expert in self.experts.items():
            if isinstance(expert, DecoderExpert) and expert.axes:
                head_dim = (expert.space or self.space).head_dim
                if sum(expert.axes) != head_dim:
                    raise ValueError(f"experts.{name}.axes has {sum(expert.axes)} channels, the space's head_dim is {head_dim}")
        lengths: dict[str, int] = {}
        for piece, _ in self.pieces:
            _known(piece.stream, self.streams, "sequence", "stream")
            lengths[piece.stream] = lengths.get(piece.stream, 0) + piece.length
        for name, length in lengths.items():
            if length != self.streams[name].length:
                raise ValueError(f"sequence has {length} tokens of {name}, its length is {self.streams[name].length}")
        return self

    def _check_stream(self, name: str, stream: Stream) -> None:
        if stream.of is not None:
            _known(stream.of, self.streams, f"streams.{name}.of", "stream")
            source = self.streams[stream.of]
            needed = {"present": ("frames",), "clean": ("frames", "actions"), "hidden": None}[stream.tokens]
            if needed is not None and source.tokens not in needed:
                raise ValueError(
                    f"streams.{name} is {stream.tokens} of {stream.of}, which must hold {' or '.join(needed)}, not {source.tokens}"
                )
            if stream.tokens != "present" and stream.length != source.length:
                raise ValueError(f"streams.{name} is made of {stream.of}, so its length must be {source.length}, not {stream.length}")
        if stream.expert is None:
            return
        _known(stream.expert, self.experts, f"streams.{name}.expert", "expert")
        expert = self.experts[stream.expert]
        if stream.tokens == "prompt" and not isinstance(expert, PretrainedExpert):
            raise ValueError(f"streams.{name} holds a prompt, so its expert '{stream.expert}' must be of kind pretrained")
        timed = isinstance(expert, DecoderExpert) and expert.time != "none"
        if stream.tokens in ("actions", "frames") and stream.encoder != "mlp" and not timed:
            raise ValueError(
                f"streams.{name}.encoder is {stream.encoder}, so expert '{stream.expert}' must carry the flow time: "
                "time: adaptive_norm or adaln"
            )
        if stream.time_of is not None and (stream.time_of not in self.flows or name in self.flows):
            raise ValueError(f"streams.{name}.time_of names a stream that is denoised ({', '.join(self.flows)}), for a stream that is not")
        if stream.tokens in ("latents", "frames") and name not in self.heads:
            raise ValueError(f"streams.{name} holds {stream.tokens}, which a latent head makes: add heads.{name}")
        if stream.tokens == "actions" and name not in self.heads:
            raise ValueError(f"streams.{name} holds actions, which a flow head denoises: add heads.{name}")

    def _check_head(self, name: str, head: FlowHead | LatentHead | WordHead) -> None:
        stream = self.streams[name]
        needed = {"flow": ("actions",), "latent": ("queries", "latents", "frames"), "words": ("words",)}[head.kind]
        if stream.tokens not in needed:
            wanted = " or ".join(f"'{tokens}'" for tokens in needed)
            raise ValueError(f"heads.{name} is a {head.kind} head, so streams.{name}.tokens must be {wanted}, not '{stream.tokens}'")

    @property
    def views(self) -> int:
        """Images that are seen: of each camera in order, the oldest first."""
        return len(self.cameras) * self.history.frames

    @property
    def pieces(self) -> list[tuple[Piece, int]]:
        """The interleaved sequence piece by piece, each with the number of its block."""
        return _unrolled(self.sequence, itertools.count())

    @property
    def flows(self) -> tuple[str, ...]:
        """Streams that are denoised."""
        return tuple(name for name, stream in self.streams.items() if stream.tokens in ("actions", "frames"))

    def flow(self, name: str) -> FlowHead | LatentHead:
        """The head of a stream that is denoised."""
        head = self.heads[name]
        assert name in self.flows and not isinstance(head, WordHead), f"stream {name} is no flow"
        return head

    def edge(self, row: str, col: str) -> Edge | None:
        """The edge by which ``row`` reads ``col``, or None."""
        edge = self.edges.get(row, {}).get(col)
        return Edge(relation=edge) if isinstance(edge, str) else edge

    def cut(self, *cuts: tuple[str, str]) -> "Spec":
        """This spec without some edges ``(row, col)``: what an ablation runs.

        Raises:
            UserError: an edge to cut does not exist.
        """
        tree = self.model_dump(mode="json")
        for row, col in cuts:
            if self.edge(row, col) is None:
                have = ", ".join(f"{r} <- {c}" for r, cols in self.edges.items() for c in cols)
                raise UserError(f"{self.name} has no edge {row} <- {col} to cut; it has {have}")
            del tree["edges"][row][col]
        return parse(Spec, tree, f"{self.name} with cuts")

    def shortened(self, length: int) -> "Spec":
        """This spec with prompts of ``length`` tokens, and as many where a stream is made of their hidden states."""
        streams: dict[str, Stream] = {}
        for name, stream in self.streams.items():
            streams[name] = stream.model_copy(update={"length": length}) if self._of_prompt(name) else stream
        return self.model_copy(update={"streams": streams})

    def _of_prompt(self, name: str) -> bool:
        stream = self.streams[name]
        return stream.tokens == "prompt" or (stream.tokens == "hidden" and self._of_prompt(stream.of or ""))


def load_spec(name: str, overrides: list[str] | None = None) -> Spec:
    """The spec in ``configs/model/<name>.yaml`` or in a YAML file given by path.

    Raises:
        UserError: no such spec, or it does not hold together; the message names the key.
    """
    path: Path = find(name, "model")
    return parse(Spec, load_tree(path, overrides), path)


def _unrolled(items: Sequence[Piece | Run], blocks: Iterator[int], block: int | None = None) -> list[tuple[Piece, int]]:
    out: list[tuple[Piece, int]] = []
    for item in items:
        if isinstance(item, Piece):
            out.append((item, next(blocks) if block is None else block))
            continue
        inner = next(blocks) if item.block and block is None else block
        for _ in range(item.times):
            out += _unrolled(item.pieces, blocks, inner)
    return out


def _known(name: str, table: Mapping[str, object], where: str, what: str) -> None:
    if name not in table:
        raise ValueError(f"{where} names no {what}: '{name}' (there are {', '.join(table)})")
