"""Every kind of observation space against values written by hand."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, Text, Tuple

from rgpo.control.observations import ObservationEncoder
from rgpo.errors import RgpoError


def encode(space, observation):
    encoder = ObservationEncoder(space)
    batch = encoder.empty(3)
    encoder.write(observation, batch, 1)
    assert {key: array.shape[1:] for key, array in batch.items()} == encoder.shapes
    return {key: array[1] for key, array in batch.items()}


@pytest.mark.parametrize(
    ("space", "observation", "vector"),
    [
        (Box(-1, 1, (3,), np.float64), np.array([0.25, -0.5, 1.0]), [0.25, -0.5, 1]),
        (Box(-1, 1, (2, 2)), np.array([[1, 2], [3, 4]], np.float32), [1, 2, 3, 4]),
        (Box(0, 255, (4,), np.uint8), np.array([0, 7, 255, 1], np.uint8), [0, 7, 255, 1]),
        (Box(0, 1, ()), np.array(0.5, np.float32), [0.5]),
        (Discrete(4), 2, [0, 0, 1, 0]),
        (Discrete(3, start=-1), -1, [1, 0, 0]),
        (MultiDiscrete([2, 3]), np.array([1, 2]), [0, 1, 0, 0, 1]),
        (MultiBinary(3), np.array([1, 0, 1], np.int8), [1, 0, 1]),
        (Tuple((Discrete(2), Box(0, 9, (1,)))), (1, np.array([7.0])), [0, 1, 7]),
        (
            Dict({"b": Discrete(2), "a": Dict({"x": Box(0, 9, (2,))})}),
            {"b": 0, "a": {"x": np.array([3.0, 4.0])}},
            [3, 4, 1, 0],  # Gymnasium sorts keys
        ),
    ],
)
def test_vectors(space, observation, vector):
    encoded = encode(space, observation)
    assert list(encoded) == ["vector"]
    assert encoded["vector"].dtype == np.float32
    np.testing.assert_array_equal(encoded["vector"], vector)


def test_vector_equals_gymnasium_flatten():
    space = Dict({"a": MultiDiscrete([3, 2]), "b": Tuple((Box(-1, 1, (2, 3)), Discrete(5)))})
    space.seed(0)
    observation = space.sample()
    np.testing.assert_array_equal(
        encode(space, observation)["vector"], gym.spaces.flatten(space, observation)
    )


@pytest.mark.parametrize("shape", [(5, 6, 3), (3, 5, 6)])
def test_image_becomes_channels_first(shape):
    space = Box(0, 255, shape, np.uint8)
    space.seed(0)
    image = space.sample()
    expected = np.moveaxis(image, -1, 0) if shape[-1] == 3 else image
    encoded = encode(space, image)
    assert encoded["image"].dtype == np.uint8
    np.testing.assert_array_equal(encoded["image"], expected)


def test_stacked_colour_frames_keep_frames_together():
    frames = np.arange(2 * 5 * 6 * 3, dtype=np.uint8).reshape(2, 5, 6, 3)
    encoded = encode(Box(0, 255, frames.shape, np.uint8), frames)["image"]
    assert encoded.shape == (6, 5, 6)
    np.testing.assert_array_equal(encoded[4], frames[1, :, :, 1])


def test_images_and_vectors_in_one_dict():
    space = Dict(
        {
            "depth": Box(0, 255, (4, 5, 1), np.uint8),
            "rgb": Box(0, 255, (4, 5, 3), np.uint8),
            "speed": Box(-1, 1, (2,)),
        }
    )
    space.seed(0)
    observation = space.sample()
    encoded = encode(space, observation)
    assert set(encoded) == {"vector", "image"}
    np.testing.assert_array_equal(encoded["image"][0], observation["depth"][:, :, 0])
    np.testing.assert_array_equal(encoded["image"][2], observation["rgb"][:, :, 1])
    np.testing.assert_array_equal(encoded["vector"], observation["speed"])


def test_refuses_images_of_different_sizes():
    space = Dict({"a": Box(0, 255, (4, 5, 3), np.uint8), "b": Box(0, 255, (6, 5, 3), np.uint8)})
    with pytest.raises(RgpoError, match="4 x 5, 6 x 5"):
        ObservationEncoder(space)


@pytest.mark.parametrize(
    "space", [Text(5), Graph(Box(0, 1, (2,)), None), gym.spaces.Sequence(Discrete(2))]
)
def test_refuses_other_spaces_and_says_where(space):
    with pytest.raises(RgpoError, match=r"space\['mission'\] .* is not supported"):
        ObservationEncoder(Dict({"mission": space}))
