"""The embedded VLM as a transformers folder: SmolVLM classes at a small size, a word-level tokenizer, a processor.

The vocabulary is closed: the words that scenes, questions and task sentences use. Beside the special tokens of SmolVLM
it holds 128 location tokens ``<loc_0>..<loc_127>`` (``<loc_k>`` is the interval [k/128, (k+1)/128) of an image's width
or height), ``<none>`` (not in that image) and eight *slots*: ``<x1> <y1>`` ask where in image 1 the instruction's object
is, ``<x2> <y2>`` the same in image 2, ``<u1> <v1> <u2> <v2>`` where its destination is. A slot's answer is the next
token, so the hidden state at a slot is where the model points, and several slots in one prompt are answered in one pass.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ...config import Strict

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, SmolVLMForConditionalGeneration, SmolVLMProcessor

LOCATIONS = 128
NONE = "<none>"
END = "<end_of_utterance>"
SLOTS = ("<x1>", "<y1>", "<x2>", "<y2>", "<u1>", "<v1>", "<u2>", "<v2>")
SPECIAL = ("<pad>", "<unk>", "<bos>", END, "<image>", "<fake_token_around_image>", "<global-img>", "<video>")
_VOCABULARY = """
0 1 2 3 4 5 6 7 8 9 zero one two three four five six seven eight nine ten , . ? ! : - ' ( )
red green blue yellow purple orange cyan white black gray pink brown magenta gold silver dark light
cube ball cylinder capsule block cubes balls cylinders capsules blocks sphere box object objects thing things item
a an the it its this that these there here is are was be do does has have can you your i we and or not no yes of to in on at by for with
from into onto out off up down
over under above below behind front left right near far next beside between around through along top bottom middle centre center side
inside outside back forward
away closest nearest farthest furthest other another same all any both each every some nothing something
what which where who how many much color colour shape kind
lift pick grasp grab take raise push pull slide move reach touch point show stack place put drop lay set hold holding held release open
close press turn rotate
insert unplug plug hit kick sweep hammer dunk find tell name describe say go stop
table floor gripper hand robot arm finger fingers camera image images picture view scene wall bin basket basketball rim button console
door lock handle drawer
faucet peg hole nut lever plate soccer goal stick shelf window coffee machine mug cup puck dial box cover lid wrench screw nail mounted
topdown vertically horizontally
sideways clockwise counter counterclockwise target position location one's post another bypassing slot sink rotating pushing using edge
cabinet hockey cap receptacle
unlock disassemble assemble assembly thermos container hinge side-way lit get when while then first second third last
see seen visible please now currently against anything empty full bring closed hoop latch ring shut turning switch press pressed
plates
"""
WORDS = tuple(_VOCABULARY.split())


class Tower(Strict):
    """Size of the vision tower or of the language model."""

    width: int
    layers: int
    heads: int
    ffn: int
    kv_heads: int | None = None


class VlmConfig(Strict):
    """Size of the embedded VLM."""

    image_size: int = 96
    patch: int = 8
    shuffle: int = 2
    vision: Tower = Tower(width=192, layers=4, heads=6, ffn=768)
    text: Tower = Tower(width=192, layers=4, heads=6, ffn=512)

    @property
    def image_tokens(self) -> int:
        """Tokens of the language model per image."""
        return (self.image_size // self.patch // self.shuffle) ** 2


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """A lower-casing word-level tokenizer over ``WORDS``, punctuation apart."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = list(dict.fromkeys([*SPECIAL, *SLOTS, NONE, *(f"<loc_{k}>" for k in range(LOCATIONS)), *WORDS]))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    visible = [*SLOTS, NONE, *(f"<loc_{k}>" for k in range(LOCATIONS))]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in visible])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token=END,
        extra_special_tokens={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "video_token": "<video>",
            "end_of_utterance_token": END,
        },
        model_max_length=512,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}"
    "{% endif %}{% endfor %}{% if message['role'] == 'assistant' %} <end_of_utterance>{% endif %}{% endfor %}"
)


def build_processor(config: VlmConfig) -> "SmolVLMProcessor":
    """Images at ``image_size`` without splitting, mean and deviation 0.5, and the tokenizer."""
    from transformers import SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    size = {"longest_edge": config.image_size}
    images = SmolVLMImageProcessor(
        size=size, max_image_size=size, do_image_splitting=False, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    videos = SmolVLMVideoProcessor(size=size, max_image_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return SmolVLMProcessor(images, build_tokenizer(), videos, image_seq_len=config.image_tokens, chat_template=CHAT_TEMPLATE)


def build_model(config: VlmConfig, seed: int = 0) -> "SmolVLMForConditionalGeneration":
    """A freshly initialised model (fp32), the same for the same seed."""
    import torch
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

    tokenizer = build_tokenizer()
    text, vision = config.text, config.vision
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    smolvlm = SmolVLMConfig(
        vision_config=SmolVLMVisionConfig(
            hidden_size=vision.width,
            intermediate_size=vision.ffn,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            image_size=config.image_size,
            patch_size=config.patch,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=text.width,
            intermediate_size=text.ffn,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            num_key_value_heads=text.kv_heads or text.heads,
            head_dim=text.width // text.heads,
            max_position_embeddings=1024,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            **ids,
        ),
        scale_factor=config.shuffle,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmolVLMForConditionalGeneration(smolvlm)


def save_folder(model: "SmolVLMForConditionalGeneration", processor: "SmolVLMProcessor", folder: Path, dtype: "torch.dtype") -> None:
    """Write a folder that ``AutoModelForImageTextToText`` and ``AutoProcessor`` open offline.

    Weights are stored as ``dtype`` and the config asks for fp32, so that they are computed with in fp32: SmolVLM buckets
    patch positions in the type of its weights, and in bf16 12 patches a side fall into 9 buckets.
    """
    import copy
    import json

    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")
    processor.save_pretrained(folder)
