"""channel_dropout: whole maps, in any layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdrop

KEY = jax.random.key(31)


@pytest.mark.parametrize("space", [(), (7,), (4, 5), (2, 3, 4)])
def test_whole_maps_are_dropped_for_each_example(space):
    x = jnp.ones((64, *space, 100))
    y = jdrop.channel_dropout(KEY, x, 0.3, train=True)
    maps = y.reshape(64, -1, 100)
    np.testing.assert_array_equal(maps, jnp.broadcast_to(maps[:, :1], maps.shape))
    dropped = np.asarray(maps[:, 0] == 0, np.float64)
    assert abs(dropped.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / dropped.size)
    for axis, n in ((0, 64), (1, 100)):  # independent along both axes: means along one axis vary like binomials
        variance = dropped.mean(axis).var() * n
        assert abs(variance / 0.21 - 1) < 5 * np.sqrt(2 / dropped.shape[1 - axis])
    kept = np.asarray(y)[np.asarray(y) > 0]
    assert set(kept) == {np.float32(2**32) / np.float32(2**32 - round(float(np.float32(0.3)) * 2**32))}


def test_layouts_agree_with_shared_axes():
    x = jnp.ones((4, 6, 7, 3))
    same = np.testing.assert_array_equal
    same(
        jdrop.channel_dropout(KEY, x, 0.5, train=True),
        jdrop.dropout(KEY, x, 0.5, train=True, shared_axes=(1, 2)),
    )
    same(
        jdrop.channel_dropout(KEY, x, 0.5, train=True, channel_axis=1),
        jdrop.dropout(KEY, x, 0.5, train=True, shared_axes=(2, 3)),
    )
    same(
        jdrop.channel_dropout(KEY, x, 0.5, train=True, batch_axes=()),
        jdrop.dropout(KEY, x, 0.5, train=True, shared_axes=(0, 1, 2)),
    )
    same(
        jdrop.channel_dropout(KEY, x, 0.5, train=True, batch_axes=(0, 1)),
        jdrop.dropout(KEY, x, 0.5, train=True, shared_axes=(2,)),
    )


def test_a_rate_for_each_channel():
    x = jnp.ones((200, 5, 3))
    y = jdrop.channel_dropout(KEY, x, jnp.array([0.0, 0.5, 1.0]), train=True)
    np.testing.assert_array_equal(y[..., 0], x[..., 0])
    np.testing.assert_array_equal(y[..., 2], 0 * x[..., 2])
    assert 0 < int((y[:, 0, 1] == 0).sum()) < 200


def test_errors():
    x = jnp.ones((2, 3, 4))
    with pytest.raises(ValueError, match=r"channel_dropout: channel_axis must be none of batch_axes, got 0"):
        jdrop.channel_dropout(KEY, x, 0.5, train=True, channel_axis=-3)
    with pytest.raises(ValueError, match=r"channel_dropout: channel_axis must be axes of an array with 3 axes, got 3"):
        jdrop.channel_dropout(KEY, x, 0.5, train=True, channel_axis=3)
    with pytest.raises(ValueError, match=r"channel_dropout: rate must broadcast to the mask's shape \(2, 1, 4\)"):
        jdrop.channel_dropout(KEY, x, jnp.ones((2, 3, 4)), train=True)
    with pytest.raises(ValueError, match=r"channel_dropout: rate must lie in \[0, 1\]"):
        jdrop.channel_dropout(KEY, x, 1.5, train=False)
