"""The language workload: the transformer, the task, and runs from data of a known age."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rgpo.core import recipes
from rgpo.errors import RgpoError
from rgpo.studies import language_cells as language
from rgpo.studies.jobs import Cell
from rgpo.studies.transformer import Shape, Transformer

pytest.importorskip("reasoning_gym")
TASK = language.TASK


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The model that the study starts from."""
    folder = tmp_path_factory.mktemp("language")
    save_file(language.warm_start(target=0.25).state_dict(), folder / "warm.safetensors")
    return language.LanguageCells(folder, updates=3)


def test_cached_sampling_is_the_full_forward_pass():
    model = Transformer(Shape(vocabulary=11, length=12), seed=1)
    prompts = torch.randint(0, 11, (5, 4), generator=torch.Generator().manual_seed(0))
    sampled = model.sample(prompts, 6)
    tokens = torch.cat([prompts, sampled], 1)
    with torch.no_grad():
        found, _ = model(tokens[:, :-1])
    torch.testing.assert_close(found[:, 3:].argmax(-1), sampled)


def test_gumbel_sampling_has_the_models_probabilities():
    model = Transformer(Shape(vocabulary=4, length=3), seed=0)
    with torch.no_grad():
        model.head.weight.mul_(4)
    prompts = torch.ones(20_000, 1, dtype=torch.long)
    noise = torch.rand(20_000, 1, 4, generator=torch.Generator().manual_seed(0))
    drawn = model.sample(prompts, 1, noise)
    share = torch.bincount(drawn.flatten(), minlength=4) / len(drawn)
    with torch.no_grad():
        expected = torch.softmax(model(prompts[:1])[0][0, -1], -1)
    assert expected.max() < 0.9
    torch.testing.assert_close(share, expected, rtol=0, atol=0.012)


def test_prompts_answers_and_what_is_right():
    prompts, answers = language.encode(["abc", "hello"])
    assert prompts[0].tolist() == [0, 0, 0, 0, 3, 4, 5, 2]
    assert answers[0].tolist() == [5, 4, 3, 1, 0, 0, 0, 0]
    assert prompts.shape == answers.shape == (2, language.LONGEST + 1)
    wrong = answers.clone()
    wrong[0, 5] = 9  # after the end: nobody looks
    wrong[1, 0] = 9
    assert language._right(wrong, answers).tolist() == [1, 0]


def test_words_for_training_and_evaluation_are_disjoint():
    training, held_out = language.words()
    assert not set(training) & set(held_out)
    assert len(held_out) == 512
    assert {len(w) for w in training} == {3, 4, 5, 6, 7}


def test_completions_carry_their_policys_log_probs_up_to_the_end(cells):
    model = cells.model()
    data = language.completions(model, np.random.default_rng(0))
    assert len(data.tokens) == language.PROMPTS * language.GROUP
    assert set(data.score.tolist()) <= {0.0, 1.0}
    ends = (data.tokens[:, language.LONGEST + 1 :] == language.END).int()
    assert (data.mask.sum(1) == torch.where(ends.any(1), ends.argmax(1) + 1, 8)).all()
    total = torch.exp(torch.log_softmax(data.logits, -1)).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_data_are_exactly_that_many_updates_old(cells):
    run = language.Run(cells.model(), Cell(TASK, "ppo", 2, 0, 1e-3), 5)
    history, acted = [run.model.state_dict()], []
    history = [{k: v.clone() for k, v in run.model.state_dict().items()}]
    for number in range(5):
        acted.append({k: v.clone() for k, v in run.past[0].state_dict().items()})
        run._update(number / 5)
        history.append({k: v.clone() for k, v in run.model.state_dict().items()})
    for number, parameters in enumerate(acted):
        expected = history[max(0, number - 2)]
        assert all(torch.equal(parameters[k], expected[k]) for k in expected)


RUN = [r.name for r in recipes.recipes()]


@pytest.mark.parametrize("name", RUN)
def test_every_recipe_makes_a_finite_update_or_is_refused_by_name(cells, name, monkeypatch):
    reason = cells.refusal(TASK, name)
    if reason is not None:
        assert name in reason
        return
    monkeypatch.setattr(language, "PROMPTS", 4)
    run = language.Run(cells.model(), Cell(TASK, name, 1, 0, 1e-3), 5)
    rows = [run._update(number / 5) for number in range(2)]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert max(row["kl"] for row in rows) > 0
    assert rows[1]["kl_behavior"] >= 0


def test_vcpos_learning_rate_follows_the_effective_samples_of_sequences(cells, monkeypatch):
    monkeypatch.setattr(language, "PROMPTS", 8)
    run = language.Run(cells.model(), Cell(TASK, "vcpo", 2, 0, 3e-4), 5)
    for number in range(3):
        row = run._update(number / 5)
    assert row["sequence_ess"] < row["ess"] - 0.01
    rate = run.optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(3e-4 * row["sequence_ess"] ** 0.5)


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_the_averaged_anchor_starts_again_where_too_few_tokens_exert_a_force(
    cells, monkeypatch, share
):
    monkeypatch.setattr(language, "PROMPTS", 8)
    run = language.Run(cells.model(), Cell(TASK, "ppo-ewma-revised", 1, 0, 1e-3), 5)
    assert run.recipe.anchor_reset == 0.9
    run.recipe = dataclasses.replace(run.recipe, anchor_reset=share)
    for number in range(2):
        run._update(number / 5)
    present = torch.nn.utils.parameters_to_vector(run.model.parameters())
    assert torch.equal(run.average.average, present) == (share > 1)


def test_a_run_repeats_itself(cells):
    cell = Cell(TASK, "rgpo", 1, 3, 1e-3)
    first, second = cells([cell])[0], cells([cell])[0]
    for key in first.keys() - {"seconds"}:
        np.testing.assert_equal(first[key], second[key])


def test_learning_raises_the_accuracy(cells):
    before = language.accuracy(cells.model())
    (result,) = dataclasses.replace(cells, updates=30)([Cell(TASK, "ppo", 0, 0, 5e-4)])
    assert result["final_return"] > before + 0.1


def test_other_tasks_are_refused(tmp_path):
    with pytest.raises(RgpoError, match="has one task"):
        language.language(tmp_path, tasks=["chain_sum"])


def test_a_minibatch_without_any_advantage_hides_nothing_of_the_others(cells, monkeypatch):
    monkeypatch.setattr(language, "PROMPTS", 2)  # one word a minibatch: often all wrong
    found = cells([Cell(TASK, "ppo", 0, 0, 1e-3)])[0]
    assert 0 < found["weight_mean"] <= 1.3
    monkeypatch.setattr(language, "_right", lambda sampled, _: torch.zeros(len(sampled)))
    found = cells([Cell(TASK, "ppo", 0, 0, 1e-3)])[0]
    assert found["weight_mean"] is None
    assert found["kl"] == 0
