"""Episodes by hand, seeds, and the video that exists whole or not at all."""

import importlib.util

import imageio.v2 as imageio
import numpy as np
import pytest
import toy_environments

from rgpo.control.environments import EnvironmentFailed
from rgpo.control.evaluate import evaluate
from rgpo.errors import RgpoError

toy_environments.register()


def one(_):
    return np.array([1])


def test_returns_and_lengths_by_hand():
    results = evaluate(one, "toy/Counter-v0", episodes=3, end=5)
    assert results.returns.tolist() == [10.0] * 3
    assert results.lengths.tolist() == [5] * 3


def test_endless_episodes_are_cut():
    results = evaluate(one, "toy/Counter-v0", episodes=2, max_steps=7, end=0)
    assert results.lengths.tolist() == [7, 7]
    assert results.returns.tolist() == [14.0, 14.0]


def test_every_episode_has_its_own_seed():
    together = evaluate(one, "CartPole-v1", episodes=5, seed=10).lengths.tolist()
    alone = [evaluate(one, "CartPole-v1", episodes=1, seed=10 + i).lengths[0] for i in range(5)]
    assert together == alone
    assert len(set(together)) > 1


def test_a_task_that_steps_many_as_one_plays_the_same_episodes(monkeypatch):
    """Quadrotors fall out of their arena after different times."""

    def act(observation):
        return np.tanh(observation["vector"][:, :2])

    together = evaluate(act, "rgpo/Quadrotor", episodes=6, seed=3)
    monkeypatch.setattr("rgpo.control.evaluate.best_backend", lambda _: "gymnasium")
    alone = evaluate(act, "rgpo/Quadrotor", episodes=6, seed=3)
    np.testing.assert_allclose(together.returns, alone.returns, rtol=1e-6)
    assert together.lengths.tolist() == alone.lengths.tolist()
    assert len(set(together.lengths)) > 1


def test_the_policy_sees_what_it_acts_on():
    seen = []

    def act(observation):
        seen.append(observation["vector"][0, 0])
        return np.array([0])

    evaluate(act, "toy/Counter-v0", episodes=2, end=3)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_video_of_the_first_episode(tmp_path):
    path = tmp_path / "new" / "film.mp4"
    evaluate(one, "toy/Counter-v0", episodes=2, video=path, end=6)
    assert list(path.parent.iterdir()) == [path]
    with imageio.get_reader(path) as reader:
        frames = list(reader.iter_data())
        assert reader.get_meta_data()["fps"] == 10
    assert len(frames) == 7  # the initial state and six steps
    brightness = [float(frame.mean()) for frame in frames]
    np.testing.assert_allclose(brightness, np.arange(7) * 10, atol=6)


def test_a_failing_episode_leaves_the_old_video(tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(b"old")
    with pytest.raises(EnvironmentFailed):
        evaluate(one, "toy/Counter-v0", video=path, fault=3, kind="raise")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_classic_control_video(tmp_path):
    pytest.importorskip("pygame")
    evaluate(one, "CartPole-v1", episodes=1, video=tmp_path / "film.mp4")
    assert (tmp_path / "film.mp4").stat().st_size > 1000


def test_what_cannot_be_rendered_is_told(tmp_path, monkeypatch):
    def render(_):
        raise ImportError("no pygame here")

    monkeypatch.setattr(toy_environments.Counter, "render", render)
    with pytest.raises(RgpoError, match=r"no pygame here.*rgpo\[video\].*libosmesa6"):
        evaluate(one, "toy/Counter-v0", video=tmp_path / "film.mp4")
    monkeypatch.setattr(toy_environments.Counter, "render", lambda _: "text")
    with pytest.raises(RgpoError, match="gives no image"):
        evaluate(one, "toy/Counter-v0", video=tmp_path / "film.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["imageio", "imageio_ffmpeg"])
def test_a_video_without_its_packages(tmp_path, monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(RgpoError, match=r"pip install \"rgpo\[video\]\""):
        evaluate(one, "toy/Counter-v0", video=tmp_path / "film.mp4")


def test_mujoco_video_without_a_display(tmp_path, monkeypatch):
    """An mp4 where EGL or OSMesa is there, one sentence where not; never a bare OpenGL error."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "film.mp4"
    try:
        evaluate(lambda _: np.zeros((1, 3)), "Hopper-v5", episodes=1, max_steps=3, video=path)
    except RgpoError as error:
        assert "EGL or OSMesa" in str(error)  # noqa: PT017
        assert not path.exists()
    else:
        assert path.stat().st_size > 1000


def test_no_episodes():
    with pytest.raises(ValueError, match="at least one"):
        evaluate(one, "toy/Counter-v0", episodes=0)
