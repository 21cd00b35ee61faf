"""The quickstart's tokenizer: one token per character, trained on the corpus, with the `phi` template's markers."""

from __future__ import annotations

import itertools

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from quickstart_steps.corpus import ALPHABET, base_examples

PAD, USER, ASSISTANT, SYSTEM, END, UNKNOWN = "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|unk|>"

#: The same text as LLaMA-Factory's template `phi`, which the recipe names.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TRAINING_TEXTS = 2000


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A character tokenizer trained on TRAINING_TEXTS examples and the alphabet (rare characters would be missed)."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    # `.` would not match a newline.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    texts = (f"{example.prompt}\n{example.answer}" for example in itertools.islice(base_examples(seed), TRAINING_TEXTS))
    trainer = trainers.WordLevelTrainer(
        special_tokens=[PAD, USER, ASSISTANT, SYSTEM, END, UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(itertools.chain([ALPHABET], texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def encode_example(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, up to where the answer starts, and of the answer with the end of the turn."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    answer_ids = tokenizer.encode(f"{answer}{END}\n", add_special_tokens=False)
    return prompt_ids, answer_ids


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """Token ids of a user's turn and the marker that opens the assistant's."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(text, add_special_tokens=False)
