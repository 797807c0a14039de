"""A tokenizer for tests."""

from pathlib import Path


def byte_tokenizer(folder: Path) -> Path:
    """A tokenizer of one token a byte, with a beginning-of-sequence token and the special tokens that SmolVLA asks for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "<eos>", "<bos>", "<image>", "<fake_token_around_image>", "<global-img>", "<unk>")
    names = {word: i for i, word in enumerate((*special, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    images = {"image_token": special[3], "fake_image_token": special[4], "global_image_token": special[5]}
    words = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=images, **words).save_pretrained(folder)
    return folder
