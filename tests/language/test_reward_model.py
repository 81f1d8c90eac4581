import contextlib
import io
import random

import pytest
import tiny
import torch
from datasets import Dataset
from test_trainer import COMMON, train

from rgpo.errors import RgpoError
from rgpo.language import (
    PreferenceConfig,
    RecipeConfig,
    RecipeTrainer,
    RewardModel,
    train_reward_model,
)
from rgpo.language.critic import Critic
from rgpo.language.reward_model import accuracy, check_pairs

OPTIONS = {
    "use_cpu": True,
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 32,
    "max_steps": 60,
    "save_strategy": "no",
    "disable_tqdm": True,
    "validation_share": 0.25,
}


def preferences(count=200, seed=0):
    """Words in which the one with more vowels is preferred."""
    generator = random.Random(seed)
    rows = []
    while len(rows) < count:
        words = ["".join(generator.choices("aeioubcdfg", k=8)) for _ in range(2)]
        vowels = [sum(c in "aeiou" for c in word) for word in words]
        if abs(vowels[0] - vowels[1]) > 1:
            words.sort(key=lambda word: -sum(c in "aeiou" for c in word))
            rows.append({"prompt": f"say {len(rows)}=", "chosen": words[0], "rejected": words[1]})
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained model and what was printed."""
    args = PreferenceConfig(str(tmp_path_factory.mktemp("reward")), **OPTIONS)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        model = train_reward_model(tiny.reward_model(), tiny.tokenizer(), preferences(), args)
    return model, out.getvalue()


@pytest.fixture
def trained(run):
    return run[0]


def test_preferences_are_learnt_and_the_accuracy_is_printed(run):
    printed = run[1]
    assert "of 50 unseen pairs ranked correctly" in printed
    share = float(printed.split("reward model: ")[1].split("%")[0])
    assert share > 80


def test_the_offset_gives_the_reference_mean_zero_and_is_saved(trained, tmp_path):
    prompts, texts = ["say 1=", "say 2=", "say 3="], ["bcd", "aei", "bce"]
    raw = trained(prompts, texts)
    offset = trained.calibrate(prompts, texts)
    assert offset == pytest.approx(sum(raw) / 3, rel=1e-5)
    assert sum(trained(prompts, texts)) == pytest.approx(0, abs=1e-5)
    trained.save(tmp_path)
    loaded = RewardModel.load(tmp_path)
    assert loaded(prompts, texts) == pytest.approx(trained(prompts, texts), abs=1e-6)
    assert trained.calibrate(prompts, texts) == pytest.approx(offset, rel=1e-5)


def test_scores_do_not_depend_on_their_neighbours(trained):
    prompts, texts = ["say 1="] * 3, ["a", "bcdbcdbcd", "aeiou"]
    alone = [trained([p], [t])[0] for p, t in zip(prompts, texts, strict=True)]
    assert trained(prompts, texts) == pytest.approx(alone, abs=1e-5)
    long = trained(["say "], ["ab" * 60])
    assert long == pytest.approx(trained([""], [("say " + "ab" * 60)[-63:]]), abs=1e-5)


def test_a_critic_starts_at_the_scale_of_the_reward(trained):
    trained.calibrate(["say 1="], ["bcd"])
    critic = Critic.from_reward_model(trained.model).eval()
    ids = torch.tensor([trained.tokenizer("say 1=bcd")["input_ids"] + [2, 2]])
    with torch.no_grad():
        value = critic(ids, torch.ones_like(ids), 1)
    assert value.item() == pytest.approx(0, abs=1e-5)  # the reward of "bcd", whose offset it is


def test_a_policy_learns_from_a_learnt_reward(trained, tmp_path):
    options = COMMON | {"max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 3e-3}
    args = RecipeConfig(str(tmp_path), use_cpu=True, **options)
    _, rows = train(RecipeTrainer, args, tiny.policy(), reward_funcs=trained)
    rewards = [row["rewards/reward_model/mean"] for row in rows if "reward" in row]
    assert sum(rewards[-3:]) / 3 > rewards[0] + 1


def test_chance_stops(tmp_path):
    shuffled = preferences(80)
    generator = random.Random(0)
    noise = [
        row
        if generator.random() < 0.5
        else row | {"chosen": row["rejected"], "rejected": row["chosen"]}
        for row in shuffled
    ]
    args = PreferenceConfig(str(tmp_path), **OPTIONS | {"max_steps": 5})
    with pytest.raises(RgpoError, match="which chance does too"):
        train_reward_model(tiny.reward_model(), tiny.tokenizer(), Dataset.from_list(noise), args)


def test_ties_count_as_half():
    pairs = Dataset.from_list([{"chosen": "a", "rejected": "b"}, {"chosen": "c", "rejected": "d"}])

    class Constant:
        def __call__(self, _prompts, texts):
            return [float(text == "c") for text in texts]

    assert accuracy(Constant(), pairs) == 0.75


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"chosen": "a"}], "need a column rejected, they have chosen"),
        ([{"chosen": "a", "rejected": "b"}], "1 preference pairs are too few"),
        (
            [{"chosen": "a", "rejected": "b"}, {"chosen": "", "rejected": "b"}],
            "pair 1 has an empty",
        ),
        ([{"chosen": "a", "rejected": "b"}, {"chosen": "c", "rejected": "c"}], "pair 1 has equal"),
        ([{"chosen": "a", "rejected": "b"}] * 2, "pair 1 repeats pair 0"),
    ],
)
def test_bad_pairs_are_told(rows, sentence):
    with pytest.raises(RgpoError, match=sentence):
        check_pairs(Dataset.from_list(rows))


def test_tokenizers_of_encoders_end_with_their_separator():
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(RgpoError, match="no end token"):
        RewardModel(tiny.reward_model(), tokenizer)
    tokenizer.add_special_tokens({"sep_token": "<eos>"})
    ended = RewardModel(tiny.reward_model(), tokenizer).tokenizer
    assert ended.eos_token == ended.sep_token
