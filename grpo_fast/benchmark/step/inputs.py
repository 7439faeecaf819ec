"""The model and the prompts of the suite, and the token that ends a completion."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["make_prompts", "rare_token", "save_random_model"]

_ATTEMPTS = 50


def save_random_model(folder: Path, *, width: int, layers: int, vocabulary: int, positions: int, seed: int) -> None:
    """Write a Llama model with random weights, heads of 64 and a tied embedding, and a tokenizer that has a token for each word.

    Args:
        folder: where to write.
        width: of the hidden states; a multiple of 64, or less than 64.
        layers, vocabulary: of the model.
        positions: tokens of the longest sequence.
        seed: of the weights.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    heads = max(width // 64, 1)
    attention = {"num_attention_heads": heads, "num_key_value_heads": heads // 3 if heads % 3 == 0 else 1}
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": width * 8 // 3, "num_hidden_layers": layers}
    tokens = {"max_position_embeddings": positions, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**sizes, **attention, **tokens, tie_word_embeddings=True)).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{index}": index for index in range(3, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def make_prompts(tokenizer: PreTrainedTokenizerBase, tokens: int, count: int, seed: int) -> tuple[str, ...]:
    """Make texts of random words that have a given number of tokens each.

    Args:
        tokenizer: the model's.
        tokens: of each text.
        count: of texts.
        seed: of the words.

    Raises:
        ValueError: this tokenizer gives no such texts.

    Example:
        >>> make_prompts(tokenizer, 3, 1, seed=0)  # doctest: +SKIP
        (' garden three window',)
    """
    generator = random.Random(seed)
    special, vocabulary = set(tokenizer.all_special_ids), tokenizer.get_vocab()
    known = sorted(index for index in vocabulary.values() if index not in special)
    words = [text for text in map(tokenizer.decode, known) if text.strip().isalnum() and text.isascii()]
    if not words:
        raise ValueError("the tokenizer has no token that is a word in ASCII; expected some, to make prompts of.")
    found: list[str] = []
    for _ in range(count):
        for _ in range(_ATTEMPTS):
            text = " ".join(generator.choice(words).strip() for _ in range(tokens))
            ids: Any = tokenizer(text).input_ids[:tokens]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            if len(tokenizer(text).input_ids) == tokens:
                found.append(text)
                break
        else:
            raise ValueError(f"prompt is {tokens}; expected a number of tokens of which this tokenizer makes a text that it reads alike.")
    return tuple(found)


def rare_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token that the model hardly ever samples: the last special token without a purpose in generation, or the last token.

    Example:
        >>> tokenizer.convert_ids_to_tokens(rare_token(tokenizer))  # of SmolLM2  # doctest: +SKIP
        '<empty_output>'
    """
    purposes = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    special = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special and index not in purposes]
    return max(special) if special else max(tokenizer.get_vocab().values())
