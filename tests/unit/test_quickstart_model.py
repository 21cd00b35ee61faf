"""The quickstart's tokenizer, base model and exact-match count."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from quickstart_steps import base_model, corpus, evaluate  # noqa: E402
from quickstart_steps.tokenizer import END, encode_example, encode_prompt, train_tokenizer  # noqa: E402

TINY = base_model.BaseModelSettings(
    hidden_size=32, expert_size=32, num_layers=1, num_heads=2, num_experts=8, experts_per_token=2, steps=4, batch_size=8
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(seed=0)


@pytest.fixture(scope="module")
def tiny_model_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("base") / "model"
    assert base_model.make_base_model(TINY, out)
    return out


def test_the_tokenizer_has_one_token_for_every_character(tokenizer):
    ids = tokenizer.encode(corpus.ALPHABET, add_special_tokens=False)
    assert len(ids) == len(corpus.ALPHABET)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == corpus.ALPHABET


def test_a_saved_tokenizer_encodes_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert encode_example(loaded, "copy: xyz", "xyz") == encode_example(tokenizer, "copy: xyz", "xyz")
    assert (loaded.pad_token_id, loaded.eos_token) == (tokenizer.pad_token_id, END)


def test_the_chat_template_is_the_one_the_recipe_names(tokenizer):
    import yaml
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments

    recipe = yaml.safe_load((SCRIPTS.parent / "recipes" / "quickstart.yaml").read_text())
    expected = encode_example(tokenizer, "reverse: abc", "cba")
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template=recipe["template"]))
    messages = [{"role": "user", "content": "reverse: abc"}, {"role": "assistant", "content": "cba"}]
    assert template.encode_oneturn(tokenizer, messages) == expected


def test_only_answers_are_labelled_and_padding_is_masked(tokenizer):
    examples = [corpus.make_example("upper", "abc"), corpus.make_example("length", "abcdefgh")]
    batch = base_model.make_batch(tokenizer, examples)
    for row, example in enumerate(examples):
        prompt, answer = encode_example(tokenizer, example.prompt, example.answer)
        labels = batch["labels"][row]
        assert labels[labels != base_model.IGNORED_LABEL].tolist() == answer
        assert (labels[: len(prompt)] == base_model.IGNORED_LABEL).all()
        assert batch["attention_mask"][row].sum() == len(prompt) + len(answer)
        assert batch["input_ids"][row, : len(prompt)].tolist() == prompt


def test_the_base_model_is_a_bf16_qwen3_moe_checkpoint(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert model.config.model_type == "qwen3_moe"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_base_model_is_made_once_and_again_when_its_settings_change(tiny_model_dir):
    weights = tiny_model_dir / "model.safetensors"
    before = weights.read_bytes()
    assert not base_model.make_base_model(TINY, tiny_model_dir)
    assert weights.read_bytes() == before
    assert base_model.make_base_model(dataclasses.replace(TINY, seed=1), tiny_model_dir)
    assert weights.read_bytes() != before
    assert base_model.make_base_model(TINY, tiny_model_dir)
    assert weights.read_bytes() == before, "the same settings give the same model"


def test_an_unfinished_base_model_is_made_again(tiny_model_dir):
    (tiny_model_dir / base_model.STAMP).write_text(json.dumps({}))
    assert base_model.make_base_model(TINY, tiny_model_dir)


def test_experts_are_most_of_the_default_models_multiplications():
    settings = base_model.BaseModelSettings()
    experts = settings.experts_per_token * 3 * settings.hidden_size * settings.expert_size
    attention = 4 * settings.hidden_size**2
    assert settings.num_experts >= 8
    assert settings.experts_per_token >= 2
    assert experts / (experts + attention) > 0.8


class Scripted(torch.nn.Module):
    """Stands for a model: `generate` appends the tokens of given answers, in order."""

    def __init__(self, tokenizer, answers):
        super().__init__()
        rows = [tokenizer.encode(answer, add_special_tokens=False) for answer in answers]
        longest = max(map(len, rows))
        self.rows = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
        self.device = torch.device("cpu")
        self.prompts = None

    def generate(self, input_ids, attention_mask, **_):
        self.prompts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        return torch.cat([input_ids, self.rows], dim=1)


def test_exact_match_counts_only_exact_ended_answers(tokenizer):
    examples = [corpus.make_example("reverse", word) for word in ("abc", "abcd", "xyz", "pqr", "mnopq")]
    answers = [f"cba{END}", f"dcba {END}", "zyx", f"rqp{END}\nmore", f"qponn{END}"]
    model = Scripted(tokenizer, answers)
    # Right are the first and the fourth: the second has a space too many, the third no end, the fifth a wrong letter.
    assert evaluate.exact_match(model, tokenizer, examples) == 2 / 5
    assert model.prompts == [encode_prompt(tokenizer, example.prompt) for example in examples]
