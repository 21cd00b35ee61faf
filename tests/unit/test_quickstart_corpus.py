"""The quickstart's corpus: right answers, and held-out words that no training text holds."""

import itertools
import json
import string
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from quickstart_steps import corpus, dataset  # noqa: E402


@pytest.mark.parametrize(
    ("skill", "answer"),
    [
        ("copy", "abcad"),
        ("upper", "ABCAD"),
        ("length", "5"),
        ("first", "a"),
        ("last", "d"),
        ("double", "aabbccaadd"),
        ("reverse", "dacba"),
    ],
)
def test_a_skill_answers_as_its_name_says(skill, answer):
    assert corpus.make_example(skill, "abcad") == corpus.Example(prompt=f"{skill}: abcad", answer=answer)


def test_an_unknown_skill_is_an_error():
    with pytest.raises(KeyError, match="spell"):
        corpus.make_example("spell", "abc")


def test_the_new_skill_is_not_among_those_of_the_base_model():
    assert corpus.NEW_SKILL not in corpus.BASE_SKILLS
    assert corpus.NEW_SKILL in corpus.SKILLS


def test_words_have_the_stated_lengths_and_letters():
    words = list(itertools.islice(corpus.words(0, held_out=False), 2000))
    assert {len(word) for word in words} == set(range(corpus.MIN_LETTERS, corpus.MAX_LETTERS + 1))
    assert set("".join(words)) == set(string.ascii_lowercase)


def test_the_same_seed_gives_the_same_words_and_another_seed_gives_others():
    first, again, other = (list(itertools.islice(corpus.words(seed, held_out=False), 50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_about_one_word_in_eight_is_held_out():
    # 4,000 words, each held out with probability 1/8: the standard deviation is sqrt(4000 · 1/8 · 7/8) = 21, so
    # five of them are 105.
    letters = itertools.product("abcdefghij", repeat=4)
    sample = ["".join(word) for word in itertools.islice(letters, 4000)]
    assert abs(sum(map(corpus.is_held_out, sample)) - 500) < 105


def test_no_training_text_holds_a_held_out_word():
    base = [example.prompt for example in itertools.islice(corpus.base_examples(0), 3000)]
    replay = [
        example.prompt
        for example in itertools.islice(corpus.base_examples(dataset.REPLAY_SEED), dataset.REPLAY_EXAMPLES)
    ]
    new = [
        example.prompt
        for example in corpus.skill_examples("reverse", dataset.TRAIN_EXAMPLES, dataset.TRAIN_SEED, held_out=False)
    ]
    held_out = [
        example.prompt
        for skill in corpus.SKILLS
        for example in corpus.skill_examples(skill, dataset.HELD_OUT_EXAMPLES, dataset.HELD_OUT_SEED, held_out=True)
    ]
    trained_words = {prompt.split(": ")[1] for prompt in base + replay + new}
    held_out_words = {prompt.split(": ")[1] for prompt in held_out}
    assert trained_words.isdisjoint(held_out_words)


def test_base_examples_hold_every_base_skill_and_no_other():
    skills = {example.prompt.split(":")[0] for example in itertools.islice(corpus.base_examples(0), 300)}
    assert skills == set(corpus.BASE_SKILLS)


def test_skill_examples_differ_from_each_other():
    examples = corpus.skill_examples("reverse", 500, 1, held_out=True)
    assert len({example.prompt for example in examples}) == 500


def test_every_character_is_in_the_alphabet():
    examples = itertools.islice(corpus.base_examples(0), 500)
    text = "".join(example.prompt + example.answer for example in examples)
    assert set(text) <= set(corpus.ALPHABET)


def test_the_datasets_are_written_in_the_alpaca_format_and_registered(tmp_path):
    dataset.write_datasets(tmp_path)
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    assert set(info) == {dataset.NEW_SKILL_DATASET, dataset.REPLAY_DATASET}
    records = json.loads((tmp_path / info[dataset.NEW_SKILL_DATASET]["file_name"]).read_text())
    assert len(records) == dataset.TRAIN_EXAMPLES
    for record in records:
        skill, word = record["instruction"].split(": ")
        assert (skill, record["output"], record["input"]) == ("reverse", word[::-1], "")


def test_writing_the_datasets_twice_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        dataset.write_datasets(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
