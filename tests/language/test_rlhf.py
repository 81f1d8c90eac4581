"""The whole of `rgpo rlhf` on small models: stages, resuming between and inside them, bad input."""

import json
import random
import resource
import shutil

import pytest
import tiny
from datasets import Dataset
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rgpo import cli
from rgpo.errors import RgpoError
from rgpo.language import reviews, rlhf
from rgpo.language.gold import Gold
from rgpo.language.preferences import load_pairs, load_prompts
from rgpo.language.rlhf import RlhfConfig
from rgpo.language.sample import Sample
from rgpo.runs.directory import Run

SMALL = {
    "model": "tiny",
    "sft_steps": 60,
    "pairs": 256,
    "reward_steps": 40,
    "updates": 3,
    "batch": 2,
    "held_out": 8,
    "samples": 4,
    "save_every": 1,
    "max_tokens": 16,
    "learning_rate": 1e-3,
    "cpu": True,
}


def quiet(*_):
    """Watch nothing."""


def run(path, watch=quiet, **changes):
    return rlhf.run(RlhfConfig(**SMALL | changes), path, watch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from the beginning to the end."""
    path = tmp_path_factory.mktemp("whole") / "run"
    return path, run(path)


def measured(path):
    """The rows of metrics.jsonl without times, and the evaluated answers."""
    timed = ("seconds", "step_time")
    rows = Run.open(path).metrics()
    answers = (path / "evaluation" / "answers.jsonl").read_text()
    return [{k: v for k, v in row.items() if k not in timed} for row in rows], answers


def test_every_stage_leaves_what_the_next_one_needs(whole):
    path, result = whole
    assert result["reward_accuracy"] > 0.5
    assert result["before"]["kl"]["mean"] == 0  # the policy is its own reference
    assert result["after"]["kl"]["mean"] > 0
    assert -1 <= result["before"]["gold"]["mean"] <= 1
    assert [row["update"] for row in Run.open(path).metrics()] == [4, 8, 12]
    pairs = rlhf.read_rows(path / "preferences" / "pairs.jsonl")
    assert len(pairs) == 256
    held_out = {row["prompt"] for row in rlhf.read_rows(path / "evaluation" / "answers.jsonl")}
    assert not held_out & {row["prompt"] for row in pairs}
    assert len(held_out) == 8


def test_the_labels_are_the_gold_rewards(whole):
    analyzer = SentimentIntensityAnalyzer()
    for row in rlhf.read_rows(whole[0] / "preferences" / "pairs.jsonl"):
        assert row["chosen_gold"] > row["rejected_gold"]
        for answer in ("chosen", "rejected"):
            compound = analyzer.polarity_scores(row[answer])["compound"]
            assert row[f"{answer}_gold"] in (compound, -1.0)


def test_a_run_that_was_interrupted_in_every_stage_gives_the_same(whole, tmp_path):
    path = tmp_path / "run"
    for stage in ("policy", "preferences", "reward", "trained", "evaluation"):

        def stop(name, fraction, _, stage=stage):
            if name == stage and (fraction > 0.4 or stage == "evaluation"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(path, stop)
        assert Run.open(path).status["status"] == "interrupted"
    told = []
    result = run(path, lambda stage, *_: told.append(stage))
    assert set(told) == {"evaluation"}
    assert measured(path) == measured(whole[0])
    expected = whole[1]["after"]
    assert result["after"] == expected


def test_ppo_with_a_critic_of_the_reward_model(whole, tmp_path):
    path = tmp_path / "run"
    settings = {"recipe": "ppo", "advantage": "critic", "kl_in": "reward", "updates": 1}
    for stage in ("policy", "preferences", "reward"):  # the same in both runs
        shutil.copytree(whole[0] / stage, path / stage)
    shutil.copy(whole[0] / "versions.json", path)
    config = json.loads((whole[0] / "config.json").read_text()) | settings
    (path / "config.json").write_text(json.dumps(config))
    run(path, **settings)
    (row,) = Run.open(path).metrics()
    assert row["critic/value_loss"] > 0
    assert row["kl"] >= 0


def test_the_command_line_prints_the_table_and_writes_the_report(whole, capsys):
    path, result = whole
    with pytest.raises(SystemExit) as ended:
        cli.main(["resume", str(path)])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"{result['after']['gold']['mean']:.2f}" in out
    page = (path / "report.html").read_text()
    assert "Answers after RL" in page
    assert "vaderSentiment" in page


def test_report_and_eval_know_the_run(whole, tmp_path, capsys):
    path, result = whole
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(path), "--out", str(tmp_path / "page.html")])
    assert ended.value.code == 0
    assert "Answers after RL" in (tmp_path / "page.html").read_text()
    gold = f"{result['after']['gold']['mean']:.2f}"
    assert f"→ {gold} ±" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", str(path), "--samples", "4", "--seed", "31"])  # the run's own
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "on 32 answers to held-out prompts" in out
    assert f"after RL  {result['after']['proxy']['mean']:.2f}" in " ".join(out.split(" "))
    assert gold in out


def test_a_disk_that_is_full_at_the_reward_model_loses_nothing(whole, tmp_path):
    path, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    for stage in ("policy", "preferences"):
        shutil.copytree(whole[0] / stage, path / stage)
    for name in ("versions.json", "config.json"):
        shutil.copy(whole[0] / name, path)

    def fill(stage, *_):
        if stage == "reward":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    try:
        with pytest.raises(RgpoError, match="free some space"):
            run(path, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def stop(stage, *_):
        if stage == "trained":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(path, stop)
    made = json.loads((path / "reward" / "done.json").read_text())
    assert made["accuracy"] == whole[1]["reward_accuracy"]


def judged(count=160, seed=0, label=None):
    """Pairs in which the word with more vowels is preferred; `label` in place of that."""
    draw = random.Random(seed)
    rows = []
    while len(rows) < count:
        words = ["".join(draw.choices("aeioubcdfg", k=8)) for _ in range(2)]
        vowels = [sum(c in "aeiou" for c in word) for word in words]
        if abs(vowels[0] - vowels[1]) > 1:
            words.sort(key=label or (lambda word: -sum(c in "aeiou" for c in word)))
            rows.append({"prompt": f"say {len(rows)}=", "chosen": words[0], "rejected": words[1]})
    return rows


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


GIVEN = {
    "sft_steps": 4,
    "reward_steps": 60,
    "reward_batch": 32,
    "reward_learning_rate": 2e-3,
    "updates": 1,
}


def test_any_model_with_given_preferences_and_prompts(tmp_path):
    model = tiny.policy(tmp_path / "model")
    pairs = written(tmp_path / "pairs.jsonl", judged())
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"spell {i}=" for i in range(12)))
    changes = {"model": model, "preferences": pairs, "prompts": str(prompts), "pairs": 150}
    result = run(tmp_path / "run", **GIVEN | changes)
    assert result["pairs"] == 150
    assert "gold" not in result["after"]
    answers = rlhf.read_rows(tmp_path / "run" / "evaluation" / "answers.jsonl")
    assert {row["prompt"] for row in answers} == {f"spell {i}=" for i in range(8)}


def test_a_reward_model_at_chance_stops_the_run_before_rl(tmp_path):
    model = tiny.policy(tmp_path / "model")
    coin = random.Random(5)
    rows = judged(label=lambda _: coin.random())
    pairs = written(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(RgpoError, match="which chance does too"):
        run(tmp_path / "run", **GIVEN | {"model": model, "preferences": pairs, "sft_steps": 0})
    assert not (tmp_path / "run" / "trained").exists()
    assert Run.open(tmp_path / "run").status["status"] == "failed"


def hh(said, chosen, rejected):
    """A row of Anthropic/hh-rlhf."""
    start = "".join(f"\n\nHuman: {question}\n\nAssistant:{answer}" for question, answer in said)
    return {"chosen": f"{start} {chosen}", "rejected": f"{start} {rejected}"}


def test_hh_dialogues_become_prompt_and_answers(tmp_path):
    row = hh([("hi", " hello"), ("how are you?", "")], "fine", "go away")
    source = written(tmp_path / "train.jsonl", [row, hh([("and now?", "")], "yes", "no")])
    text = load_pairs(source, chat=False, drop=False)[0]
    assert text["prompt"].endswith("\n\nHuman: how are you?\n\nAssistant:")
    assert (text["chosen"], text["rejected"]) == (" fine", " go away")
    chat = load_pairs(source, chat=True, drop=False)[0]
    assert [turn["role"] for turn in chat["prompt"]] == ["user", "assistant", "user"]
    assert chat["prompt"][-1]["content"] == "how are you?"
    assert chat["rejected"] == [{"role": "assistant", "content": "go away"}]


def test_parquet_and_json_lines_are_read_alike(tmp_path):
    rows = judged(4)
    Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    lines = load_pairs(written(tmp_path / "p.jsonl", rows), chat=False, drop=False)
    assert load_pairs(str(tmp_path / "pairs.parquet"), chat=False, drop=False) == lines == rows
    assert load_prompts(str(tmp_path / "pairs.parquet"), chat=False)[0] == "say 0="


def test_bad_pairs_are_refused_by_number_or_dropped(tmp_path):
    good = judged(3)
    bad = [good[0], good[1] | {"rejected": good[1]["chosen"]}, good[2] | {"chosen": ""}]
    source = written(tmp_path / "pairs.jsonl", [*good, *bad])
    with pytest.raises(RgpoError, match="preference pair 3 repeats pair 0"):
        load_pairs(source, chat=False, drop=False)
    assert load_pairs(source, chat=False, drop=True) == good


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "no/such-model", "--preferences", "PAIRS"], "could not be loaded"),
        (["--model", "no/such-model"], "needs --preferences"),
        (["--preferences", "none.jsonl"], "could not read 'none.jsonl'"),
        (["--preferences", "PAIRS", "--held-out", "200"], "are too few for --held-out 200"),
        (["--recipe", "rppo"], "unknown recipe 'rppo'"),
        (["--kl-in", "reward"], "use advantage='critic'"),
        (["--config", "none.yaml"], "could not read --config none.yaml"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, options, sentence):
    monkeypatch.chdir(tmp_path)
    pairs = written(tmp_path / "pairs.jsonl", judged(40))
    options = [pairs if option == "PAIRS" else option for option in options]
    small = [w for k, v in SMALL.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    with pytest.raises(SystemExit) as ended:
        cli.main(["rlhf", *small, *options])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert error.strip().count("\n") == 0


def test_gold_praises_fluent_praise_only():
    class Reference:
        def log_probs(self, samples):
            import torch

            return [torch.tensor([-9.0 if "great great" in s.text else -1.0]) for s in samples]

    texts = ["the plot was great .", "the plot was awful .", "great great great", ""]
    samples = [Sample("", text, [1], ended=True) for text in texts]
    good, bad, babble, nothing = Gold(Reference(), -2.0)(samples)
    assert good > 0.5
    assert -1 < bad < -0.3
    assert babble == nothing == -1


def test_the_tiny_world_has_a_word_for_everything():
    words = set(reviews.vocabulary())
    for row in reviews.conversations(300, 1):
        assert set(f"{row['prompt']}{row['completion']}".split()) <= words
    assert len(set(reviews.questions())) == len(reviews.THINGS) * len(reviews.QUESTIONS)
