"""Normalisation that clips some numbers alone, and numbers seen as sine and cosine."""

import numpy as np

from triune.data.transforms import Affine, Angles


def test_each_number_clips_for_itself() -> None:
    affine = Affine(shift=(1.0, 1.0), scale=(2.0, 2.0), clip=(True, False))
    np.testing.assert_allclose(affine.normalise(np.array([[9.0, 9.0], [0.0, 0.0]])), [[1, 4], [-0.5, -0.5]])
    np.testing.assert_allclose(affine.unnormalise(np.array([[-3.0, -3.0]])), [[-1, -5]])


def test_angles_stand_where_their_numbers_stood() -> None:
    state = np.arange(10.0).reshape(2, 5)
    angles = Angles(groups=((1, 3), (4, 5)))
    x, (a, b), y, c = state[:, :1], state[:, 1:3].T, state[:, 3:4], state[:, 4:]
    seen = np.concatenate([x, np.stack([np.sin(a), np.sin(b), np.cos(a), np.cos(b)], 1), y, np.sin(c), np.cos(c)], 1)
    np.testing.assert_array_equal(angles.apply(state), seen)
    assert angles.added == 3
