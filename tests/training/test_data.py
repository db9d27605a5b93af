"""Reading questions, turning them into batches, and what is refused on the way."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from echolora_kernels import DataError
from echolora_kernels.training import data
from echolora_kernels.training.evaluate import exact_match, normalise_answer

ENTRY = {"instruction": "What?", "input": "", "output": "the correct answer is answer2", "answer": "answer2"}


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["all.json", "all.jsonl"])
def test_both_file_forms_read_the_same(tmp_path, name):
    entries = [ENTRY, {"instruction": "Why?\n", "input": "Because, [", "output": " yes "}]
    lines = "\n\n".join(map(json.dumps, entries)) if name.endswith("l") else json.dumps(entries, indent=4)
    assert data.read_llm_adapters(write(tmp_path / name, lines)) == [
        data.Question("What?", "the correct answer is answer2", "answer2"),
        data.Question("Why?\n\n\nBecause, [", "yes", "yes"),
    ]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_what_other_writers_make_is_read(tmp_path, name):
    """A byte order mark, \\r\\n, line separators inside strings, numbers, and null for what is absent."""
    first = {"instruction": "a\u2028b\x85c", "input": None, "output": 4.5, "answer": None}
    second = {"instruction": "d", "output": "it is 4", "answer": 4}
    first, second = (json.dumps(entry, ensure_ascii=False) for entry in (first, second))
    text = f"{first}\r\n{second}\r\n" if name.endswith("l") else f"\r\n[\r\n{first} ,\r\n{second}\r\n]\r\n"
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert data.read_llm_adapters(tmp_path / name) == [
        data.Question("a\u2028b\x85c", "4.5", "4.5"), data.Question("d", "it is 4", "4"),
    ]  # fmt: skip


BROKEN = '[\n {"instruction": "a", "output": "b"},\n {"instruction": "a" "output": "b"}\n]'


@pytest.mark.parametrize(("name", "text", "words"), [
    ("a.json", "{}", ["line 1", "array"]),
    ("a.json", "", ["line 1", "array"]),
    ("a.json", "[]", ["no entry"]),
    ("a.jsonl", "\n", ["no entry"]),
    ("a.json", BROKEN, ["line 3", "not JSON"]),
    ("a.json", '[\n {"instruction": "a", "output": "b"}\n {"a": 1}]', ["line 3", "','"]),
    ("a.json", '[\n {"instruction": "a", "output": "b"}', ["line 2", "','"]),
    ("a.json", '[\n\n {"instruction": "a"}]', ["line 3", "'output'", "None"]),
    ("a.json", '[{"instruction": "a", "output": "b"},\n\n {"instruction": "", "output": "b"}]', ["line 3", "'instruction'"]),
    ("a.json", '[{"instruction": 3, "output": "b"}]', ["line 1", "'instruction'", "3"]),
    ("a.json", '[{"instruction": "a", "output": true}]', ["line 1", "'output'", "True"]),
    ("a.json", '[{"instruction": "a", "output": null}]', ["'output'", "None"]),
    ("a.json", '\n\n{"instruction": "a", "output": "b"}', ["line 3", "array"]),
    ("a.json", '[{"instruction": "a", "output": "b"},\n]', ["line 2", "not JSON"]),
    ("a.json", '[{"instruction": "a", "output": "b"},\n,{"instruction": "a", "output": "b"}]', ["line 2", "not JSON"]),
    ("a.json", '[,{"instruction": "a", "output": "b"}]', ["line 1", "not JSON"]),
    ("a.json", '[{"instruction": "a", "output": "b"}]\n\n[1]', ["line 3", "nothing after"]),
    ("a.json", '["a"]', ["line 1", "str", "object"]),
    ("a.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction"}', ["line 2", "not JSON"]),
    ("a.jsonl", '{"instruction": "a", "output": "b"}\n\n{"output": "b"}', ["line 3", "'instruction'"]),
])  # fmt: skip
def test_malformed_files_are_refused_with_file_line_and_reason(tmp_path, name, text, words):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError) as error:
        data.read_llm_adapters(path)
    assert all(word in str(error.value) for word in [str(path), *words]), error.value


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"missing\.json.*cannot be read"):
        data.read_llm_adapters(tmp_path / "missing.json")
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"[\xff\xfe]")
    with pytest.raises(DataError, match=r"binary\.json.*cannot be read"):
        data.read_llm_adapters(binary)
    with pytest.raises(DataError, match="no_such_task"):
        data.generate_questions("no_such_task", 3, 0)


def test_reasoning_gym_questions_are_reproducible_and_held_out_ones_are_others():
    arguments = {"train_size": 40, "eval_size": 10, "seed": 3}
    train, held_out = data.load_questions("family_relationships", None, **arguments)
    again, _ = data.load_questions("family_relationships", None, **arguments)
    other, _ = data.load_questions("family_relationships", None, **{**arguments, "seed": 4})
    assert train == again != other
    assert 30 < len(train) <= 40 and len(held_out) == 10
    assert not {q.prompt for q in train} & {q.prompt for q in held_out}
    assert all(question.prompt and question.target == question.answer for question in train)


def test_a_file_is_split_without_overlap(data_file, tmp_path):
    train, held_out = data.load_questions(str(data_file), None, train_size=1, eval_size=10, seed=0)
    assert len(train) == 50 and len(held_out) == 10
    assert not {q.prompt for q in train} & {q.prompt for q in held_out}
    one = write(tmp_path / "one.json", json.dumps([ENTRY]))
    with pytest.raises(DataError, match=r"^eval_size: got 1, wants less than the 1 entries"):
        data.load_questions(str(one), None, train_size=1, eval_size=1, seed=0)
    with pytest.raises(DataError, match="0 training"):
        data.load_questions(str(one), str(one), train_size=1, eval_size=1, seed=0)


def test_only_the_target_is_supervised(model_folder, data_file):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    questions = data.read_llm_adapters(data_file)[:3]
    samples, too_long = data.encode(tokenizer, questions, max_length=100)
    assert too_long == 0
    batch = data.collate(samples, tokenizer.pad_token_id)
    for row, question in enumerate(questions):
        supervised = batch["labels"][row][batch["labels"][row] != -100]
        assert tokenizer.decode(supervised) == f"{question.target} </s>"
        real = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        assert tokenizer.decode(real).startswith("<s> Question : What is the colour")
        assert torch.equal(real[-len(supervised) :], supervised)
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(sample.input_ids) for sample in samples]


def test_a_chat_template_is_used_where_there_is_one(model_folder, data_file):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.content }}{% endfor %}{% if add_generation_prompt %} Answer:{% endif %}"
    )
    question = data.read_llm_adapters(data_file)[0]
    assert data.prompt_text(tokenizer, question) == f"<s>{question.prompt} Answer:"


def metaspace_tokenizer():
    """Like SentencePiece: every text gets a space in front, and a space begins a word."""
    words = ["<unk>", "</s>", "▁Question:", "▁What", "▁?", "\n\nAnswer:", "▁red", "▁"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    split = pre_tokenizers.Split("\n\nAnswer:", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.Metaspace(prepend_scheme="first")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["words", "metaspace"])
def test_prompt_and_target_are_tokenised_as_one_text(model_folder, kind):
    tokenizer = AutoTokenizer.from_pretrained(model_folder) if kind == "words" else metaspace_tokenizer()
    question = data.Question("What ?", "red", "red")
    prompt = data.prompt_text(tokenizer, question)
    assert prompt.endswith("\n\nAnswer:")
    sample = data.sample_of(tokenizer, question)
    whole = tokenizer(f"{prompt} red", add_special_tokens=False)["input_ids"]
    assert sample.input_ids == [*whole, tokenizer.eos_token_id]
    assert len(sample.input_ids) - sample.prompt_length == 2  # one word, end of text
    assert sample.input_ids[: sample.prompt_length] == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_a_prompt_that_merges_with_the_target_keeps_its_tokens(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %} thi"
    sample = data.sample_of(tokenizer, data.Question("What", "ng red", "red"))
    words = ["What", "<unk>", "<unk>", "red", "</s>"]
    assert tokenizer.convert_ids_to_tokens(sample.input_ids) == words and sample.prompt_length == 2


def test_evaluation_asks_with_the_prompt_that_was_trained(model_folder, monkeypatch):
    model, asked = AutoModelForCausalLM.from_pretrained(model_folder), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: asked.append(inputs) or generate(**inputs))
    tokenizer, question = AutoTokenizer.from_pretrained(model_folder), data.Question("What ?", "red blue", "red blue")
    exact_match(model, tokenizer, [question])
    sample = data.sample_of(tokenizer, question)
    assert asked[0]["input_ids"].tolist() == [sample.input_ids[: sample.prompt_length]]
    assert asked[0]["max_new_tokens"] == 4


def test_long_questions_are_counted_and_all_too_long_is_refused(model_folder, data_file):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    questions = data.read_llm_adapters(data_file)
    lengths = [len(sample.input_ids) for sample in data.encode(tokenizer, questions, 100)[0]]
    limit = min(lengths)
    samples, too_long = data.encode(tokenizer, questions, limit)
    assert len(samples) == lengths.count(limit) > 0 and too_long == len(questions) - len(samples) > 0
    with pytest.raises(DataError, match=f"all {len(questions)} questions"):
        data.encode(tokenizer, questions, limit - 1)


@pytest.mark.parametrize(("text", "answer"), [
    ("Mother-in-law", "mother-in-law"), (" son.\n", "son"), ("the correct answer is answer2", "answer2"),
    ("The answer is: True!", "true"), ("Sarah is his mother", "sarah is his mother"), ("", ""),
])  # fmt: skip
def test_what_counts_as_the_answer(text, answer):
    assert normalise_answer(text) == answer
