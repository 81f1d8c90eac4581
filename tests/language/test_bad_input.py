"""What a person can get wrong: one sentence, exit status 1, before any stage has cost time."""

import json

import pytest
import tiny
from test_rlhf import judged, written
from transformers import AutoTokenizer

from rgpo import cli
from rgpo.errors import RgpoError
from rgpo.language import fitting
from rgpo.language.reward_model import PreferenceConfig, check_pairs, train_reward_model
from rgpo.language.sample import load_policy

RLVR = ["rlvr", "--held-out", "4", "--entries", "40", "--batch", "2", "--cpu", "False"]
RLHF = ["rlhf", "--pairs", "30", "--held-out", "4", "--batch", "2", "--max-tokens", "8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A policy with a window of 64 tokens."""
    return tiny.policy(tmp_path_factory.mktemp("model"))


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run a command that must be refused; the sentence."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main([*map(str, arguments), "--out", "run"])
        assert ended.value.code == 1
        assert not list((tmp_path / "run").glob("*/done.json"))
        sentence = capsys.readouterr().err.strip()
        assert "\n" not in sentence
        return sentence

    return run


def test_prompts_longer_than_the_window(refused, model, tmp_path):
    sentence = refused(*RLVR, "--model", model)
    assert "tokens and answers may have 16, but the window of" in sentence
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([*(f"spell {i}=" for i in range(12)), "x" * 60]))
    pairs = written(tmp_path / "pairs.jsonl", judged(40))
    given = ("--model", model, "--preferences", pairs, "--prompts", prompts)
    sentence = refused(*RLHF, *given)
    assert "longest prompt has 60 tokens" in sentence
    assert "is 64: leave out long prompts or lower --max-tokens" in sentence


def test_no_gpu_for_a_large_model(refused, model, monkeypatch):
    monkeypatch.setattr(fitting, "LARGE", 1000)
    sentence = refused(*RLVR, "--model", model)
    assert "billion parameters and there is no GPU: use a machine with one" in sentence
    assert "window" in refused(*RLVR, "--model", model, "--cpu", "True")  # on to the next


def test_a_reward_model_that_is_not_there(refused, model, tmp_path):
    pairs = written(tmp_path / "pairs.jsonl", judged(40))
    given = ("--model", model, "--preferences", pairs, "--reward-model", "none")
    assert "reward model 'none' could not be loaded" in refused(*RLHF, *given)


def test_vllm_that_is_not_installed(refused):
    sentence = refused(*RLVR, "--trainer", json.dumps({"use_vllm": True}))
    assert "use_vllm needs vLLM, which is not installed" in sentence


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"chosen": " "}, "preference pair 2 has an empty text"),
        ({"rejected": None}, "preference pair 2 has an empty text"),
        ({"chosen": "same", "rejected": "same"}, "preference pair 2 has equal texts"),
        ("again", "preference pair 40 repeats pair 0"),
    ],
)
def test_pairs_that_teach_nothing(refused, model, tmp_path, change, sentence):
    rows = judged(40)
    if change == "again":
        rows.append(rows[0])
    else:
        rows[2] = rows[2] | change
    pairs = written(tmp_path / "pairs.jsonl", rows)
    assert sentence in refused(*RLHF, "--model", model, "--preferences", pairs)


def test_messages_that_say_nothing_are_empty():
    from datasets import Dataset

    said = [{"role": "assistant", "content": "yes"}]
    rows = [{"chosen": said, "rejected": [{"role": "assistant", "content": " "}]}] * 2
    with pytest.raises(RgpoError, match="pair 0 has an empty text"):
        check_pairs(Dataset.from_list(rows))


def test_pairs_that_the_reward_model_cannot_read_are_left_out(tmp_path):
    """Longer than its window they would end an encoder, whose positions end, with an IndexError."""
    from datasets import Dataset

    rows = judged(40)
    args = PreferenceConfig(str(tmp_path), use_cpu=True, max_steps=1, report_to="none")
    long = [row | {"chosen": row["chosen"] + "x" * 80} for row in rows]
    with pytest.raises(RgpoError, match="every preference pair is longer than 64 tokens"):
        train_reward_model(tiny.reward_model(), tiny.tokenizer(), Dataset.from_list(long), args)


def test_a_tokenizer_needs_an_end_but_no_padding(tmp_path):
    folder = tiny.policy(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    policy = load_policy(folder)
    assert policy.tokenizer.pad_token == "<eos>"  # noqa: S105
    assert len(policy.sample(["ab=", "a="], 3)) == 2
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(RgpoError, match="has no end token"):
        load_policy(folder)
