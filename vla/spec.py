"""The spec: a model as data.

Experts hold weights, streams are ordered groups of tokens that an expert processes, edges say which stream reads
which, heads turn hidden states into losses and outputs. Everything else (mask, order, caches, gradient routes) is
derived from the edges in ``graph.py``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ..config import Strict, find, load_tree, parse
from ..errors import UserError

Relation = Literal["full", "causal", "block_causal", "own_block"]
PhaseKind = Literal["prefill", "regress", "denoise"]


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
    ``layers``: how many of its first layers are kept. ``rotary``: whether its keys turn as they were trained or by the space's base.
    """

    kind: Literal["pretrained"] = "pretrained"
    weights: str
    frozen: bool = True
    layers: PositiveInt | None = None
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
    """Layers ``first``, ``first + every``, ... of an expert have no keys of their own: their tokens read only the streams of other
    experts, whose rotated keys and values they project anew, with positions that count from their stream's start (SmolVLA)."""

    first: NonNegativeInt = 1
    every: PositiveInt = 2


class DecoderExpert(Strict):
    """Our own pre-norm decoder with a gated FFN, trained from scratch.

    ``activation``: of the FFN's gate (SwiGLU, or Gemma's GeGLU). ``time``: how the flow time enters its layers. ``time_of``: what
    its time embedding is a function of; weights trained with noise at t = 1 say ``1-t``.
    """

    kind: Literal["decoder"] = "decoder"
    width: PositiveInt
    depth: PositiveInt
    ffn: PositiveInt
    qk_norm: bool = True
    norm_eps: PositiveFloat = 1e-6
    activation: Literal["silu", "gelu_tanh"] = "silu"
    cross: CrossLayers | None = None
    time: Literal["none", "adaptive_norm"] = "none"
    time_of: Literal["t", "1-t"] = "t"
    frozen: bool = False

    def crosses(self, layer: int) -> bool:
        """Whether a layer is one of ``cross``."""
        return self.cross is not None and layer >= self.cross.first and (layer - self.cross.first) % self.cross.every == 0


Expert = Annotated[PretrainedExpert | DecoderExpert, Field(discriminator="kind")]


class Coupling(Strict):
    """Where an expert's layers stand among the steps of the backbone, and in which of them it meets the others.

    Its layer i runs in step ``first + every * i``. ``joint``: the steps from .. to (exclusive) in which its streams read those of other
    experts and are read by them, by default all of its own. HBridge leaves out both ends, DeepVision-VLA joins the last layers of
    experts of unequal depth, SmolVLA's expert can have a layer for every second one of the VLM.
    """

    first: NonNegativeInt = 0
    every: PositiveInt = 1
    joint: tuple[NonNegativeInt, PositiveInt] | None = None


class Stream(Strict):
    """An ordered group of tokens.

    ``tokens``: ``prompt`` (images and text through the VLM's own embedding), ``state`` (one token of proprioception),
    ``actions`` (one token per chunk step), ``queries`` (learned), ``latents`` (learned, and the present frames in the latents of
    the foresight head's autoencoder). ``length`` is the token count; the prompt's is its padded length. ``encoder``: how states
    and actions become tokens. ``scale``: what a prompt's embeddings are multiplied by. ``block`` is the block size of
    ``block_causal`` and ``own_block`` relations. ``positions``: ``continue`` counts on after all earlier streams (absent tokens
    are skipped), ``restart`` begins at 0.
    """

    expert: str
    tokens: Literal["prompt", "state", "actions", "queries", "latents"]
    length: PositiveInt
    encoder: Literal["mlp", "linear"] = "mlp"
    scale: Literal["one", "sqrt_width"] = "one"
    block: PositiveInt | None = None
    positions: Literal["continue", "restart"] = "continue"


class Edge(Strict):
    """``row: {col: relation}``. ``detach`` stops the gradient from the row into the column's keys and values."""

    relation: Relation = "full"
    detach: bool = False


class FlowHead(Strict):
    """Flow matching on the action chunk (t=0 noise, t=1 data; velocity data - noise).

    ``time_distribution``: ``beta`` draws 1 - t from 0.999 Beta(1.5, 1) + 0.001, mass near noise (openpi pi0.py);
    ``uniform`` from U(0, 1).
    """

    kind: Literal["flow"] = "flow"
    action_dim: PositiveInt
    loss: Literal["l2", "l1"] = "l2"
    time_distribution: Literal["beta", "uniform"] = "beta"
    weight: float = 1.0


class LatentHead(Strict):
    """Foresight by regression of an autoencoder's latents of the frames ``horizon`` steps ahead (InternVLA-A1).

    One square of ``patch`` x ``patch`` latent cells per token; cameras in order. ``predicts``: the ``frame`` itself, or its ``change``
    from the present one, so that a picture stays what it was but for what moves.
    """

    kind: Literal["latent"] = "latent"
    autoencoder: str
    cameras: tuple[str, ...]
    image_size: PositiveInt
    patch: PositiveInt
    horizon: PositiveInt
    predicts: Literal["frame", "change"] = "frame"
    weight: float = 0.1


Head = Annotated[FlowHead | LatentHead, Field(discriminator="kind")]


class Phase(Strict):
    """One step of inference. ``steps`` counts Euler steps of a denoise phase."""

    kind: PhaseKind
    streams: tuple[str, ...]
    steps: PositiveInt | None = None


class Spec(Strict):
    """A whole model. See ``configs/model/`` for the systems that are written in it."""

    name: str
    about: str
    space: Space
    experts: dict[str, Expert]
    streams: dict[str, Stream]
    edges: dict[str, dict[str, Relation | Edge]]
    heads: dict[str, Head]
    state_dim: PositiveInt
    cameras: tuple[str, ...]
    couple: dict[str, Coupling] = {}
    schedule: dict[str, Phase] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Spec":
        for name, stream in self.streams.items():
            _known(stream.expert, self.experts, f"streams.{name}.expert", "expert")
            if stream.tokens == "prompt" and not isinstance(self.experts[stream.expert], PretrainedExpert):
                raise ValueError(f"streams.{name} holds a prompt, so its expert '{stream.expert}' must be of kind pretrained")
        for row, cols in self.edges.items():
            _known(row, self.streams, f"edges.{row}", "stream")
            for col in cols:
                _known(col, self.streams, f"edges.{row}.{col}", "stream")
        for name, head in self.heads.items():
            _known(name, self.streams, f"heads.{name}", "stream")
            self._check_head(name, head)
        for name, stream in self.streams.items():
            expert = self.experts[stream.expert]
            timed = isinstance(expert, DecoderExpert) and expert.time != "none"
            if stream.tokens == "actions" and stream.encoder == "linear" and not timed:
                raise ValueError(
                    f"streams.{name}.encoder is linear, so expert '{stream.expert}' must carry the flow time: time: adaptive_norm"
                )
            if stream.tokens in ("queries", "latents") and name not in self.heads:
                raise ValueError(f"streams.{name} holds {stream.tokens}, which a latent head makes: add heads.{name}")
        for name in self.couple:
            _known(name, self.experts, f"couple.{name}", "expert")
        return self

    def _check_head(self, name: str, head: FlowHead | LatentHead) -> None:
        stream = self.streams[name]
        needed = ("actions",) if isinstance(head, FlowHead) else ("queries", "latents")
        if stream.tokens not in needed:
            wanted = " or ".join(f"'{tokens}'" for tokens in needed)
            raise ValueError(f"heads.{name} is a {head.kind} head, so streams.{name}.tokens must be {wanted}, not '{stream.tokens}'")

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


def load_spec(name: str, overrides: list[str] | None = None) -> Spec:
    """The spec in ``configs/model/<name>.yaml`` or in a YAML file given by path.

    Raises:
        UserError: no such spec, or it does not hold together; the message names the key.
    """
    path: Path = find(name, "model")
    return parse(Spec, load_tree(path, overrides), path)


def _known(name: str, table: Mapping[str, object], where: str, what: str) -> None:
    if name not in table:
        raise ValueError(f"{where} names no {what}: '{name}' (there are {', '.join(table)})")
