import math

import pytest
import tiny
from test_trainer import COMMON

from rgpo.errors import RgpoError
from rgpo.language import (
    RecipeConfig,
    RecipeTrainer,
    ensemble,
    with_eos_penalty,
    with_length_penalty,
)
from rgpo.language.rewards import checked

BATCH = {
    "prompts": ["p", "q", "r"],
    "completions": ["one", "two", "three"],
    "completion_ids": [[5, 6, 2], [5, 6], [5, 6, 7, 2]],
}


def length(completions, **_):
    return [float(len(text)) for text in completions]


def test_a_good_reward_is_left_alone():
    reward = checked(length)
    assert reward(**BATCH) == [3.0, 3.0, 5.0]
    assert reward.__name__ == "length"
    assert checked(lambda **_: [None, 1.0, 2])(**BATCH) == [None, 1.0, 2]


def test_the_completion_that_makes_a_reward_raise_is_told():
    def picky(completions, answer, trainer_state, **_):
        assert trainer_state == "state"
        return [1 / answer[i] for i, _ in enumerate(completions)]

    sentence = r"reward 'picky' raised ZeroDivisionError .* for completion 'two' of prompt 'q'"
    with pytest.raises(RgpoError, match=sentence):
        checked(picky)(**BATCH, answer=[1, 0, 2], trainer_state="state")

    def together(completions, **_):
        if len(completions) > 1:
            raise MemoryError("too many")
        return [0.0]

    with pytest.raises(RgpoError, match="for 3 completions, for none of them alone"):
        checked(together)(**BATCH)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_told(bad):
    def odd(**_):
        return [0.0, 0.0, bad]

    with pytest.raises(RgpoError, match=f"gave {bad} for completion 'three' of prompt 'r'"):
        checked(odd)(**BATCH)


def test_a_wrong_count_is_told():
    with pytest.raises(RgpoError, match=r"gave 1 numbers for 3 completions.*'one'"):
        checked(lambda **_: [1.0])(**BATCH)


def test_cut_completions_get_the_fixed_score():
    assert with_eos_penalty(length, 2)(**BATCH) == [3.0, -1.0, 5.0]
    assert with_eos_penalty(length, [2, 6], score=-4.0)(**BATCH) == [3.0, 3.0, 5.0]
    assert with_eos_penalty(length, [9], score=-4.0)(**BATCH) == [-4.0] * 3


def test_length_is_paid_for_beyond_what_is_free():
    assert with_length_penalty(length, 0.5, free=2)(**BATCH) == [2.5, 3.0, 4.0]


def test_ensembles_by_hand():
    members = [length, lambda **_: [1.0, 3.0, 5.0], lambda **_: [2.0, 3.0, 8.0]]
    assert ensemble(members, "mean")(**BATCH) == pytest.approx([2, 3, 6])
    assert ensemble(members, "worst")(**BATCH) == pytest.approx([1, 3, 5])
    assert ensemble(members, penalty=0.5)(**BATCH) == pytest.approx([2 - 0.5, 3, 6 - 1.5])
    with pytest.raises(RgpoError, match="two rewards"):
        ensemble([length])
    with pytest.raises(RgpoError, match="choose mean, worst"):
        ensemble(members, "median")
    with pytest.raises(RgpoError, match="gave None for completion 'two'"):
        ensemble([length, lambda **_: [0, None, 0]])(**BATCH)


@pytest.mark.parametrize("reward", ["function", "model"])
def test_the_trainer_stops_at_a_bad_reward(reward, tmp_path):
    if reward == "model":
        bad = tiny.reward_model()
        bad.score.weight.data.fill_(math.nan)
    else:

        def bad(completions, **_):
            return [math.nan] * len(completions)

    args = RecipeConfig(str(tmp_path), use_cpu=True, **COMMON)
    trainer = RecipeTrainer(
        tiny.policy(),
        bad,
        args,
        tiny.prompts(),
        processing_class=tiny.tokenizer(),
        reward_processing_classes=tiny.tokenizer() if reward == "model" else None,
    )
    with pytest.raises(RgpoError, match=r"gave (nan|NaN) for"):
        trainer.train()
    assert trainer.state.global_step == 0
