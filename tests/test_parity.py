"""The same functions in PyTorch, timm, and Keras: their formula or distribution compared with jdrop's.

Kept values have the same factor, and both drop fractions are within 5 standard errors of the rate. Where jdrop differs
on purpose, the test checks the difference.
"""

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest

import jdrop

KEY = jax.random.key(91)
RATE = 0.3
X = np.random.default_rng(0).standard_normal((400, 6, 5, 32)).astype(np.float32) + 3  # [batch, height, width, channel]
NCHW = np.moveaxis(X, -1, 1)


@pytest.fixture
def torch(need):
    need("torch")
    import torch

    torch.manual_seed(0)
    return torch


@pytest.fixture
def timm(torch):
    """Return a function that imports a file of timm's layers by name."""
    return lambda file: peers.require_file("timm", f"layers/{file}.py")


@pytest.fixture
def keras(need):
    need("keras")
    import keras

    assert keras.backend.backend() == "jax"
    return keras.layers


def factors(y, x, groups):
    """Return the factor of each group of elements, which must be the same for all its elements."""
    ratio = np.asarray(y, np.float64) / x
    axes = tuple(a for a in range(x.ndim) if a not in groups)
    np.testing.assert_allclose(ratio.max(axes), ratio.min(axes), rtol=1e-6)
    return ratio.max(axes).ravel()


def agree(theirs, ours, n):
    """Require the same two factors, and drop fractions within 5 standard errors of the rate."""
    np.testing.assert_allclose(np.unique(theirs.round(5)), np.unique(ours.round(5)), rtol=2e-5)
    for f in (theirs, ours):
        assert len(f) == n and abs((f == 0).mean() - RATE) < 5 * np.sqrt(RATE * (1 - RATE) / n)


def test_dropout_and_whole_maps_in_torch(torch):
    f, t = torch.nn.functional, torch.from_numpy(NCHW.copy())
    ours = jdrop.dropout(KEY, NCHW, RATE, train=True)
    agree(factors(f.dropout(t, RATE), NCHW, (0, 1, 2, 3)), factors(ours, NCHW, (0, 1, 2, 3)), X.size)
    ours = jdrop.channel_dropout(KEY, NCHW, RATE, train=True, channel_axis=1)
    agree(factors(f.dropout2d(t, RATE), NCHW, (0, 1)), factors(ours, NCHW, (0, 1)), 400 * 32)
    line = NCHW.reshape(400, 32, 30)
    ours = jdrop.channel_dropout(KEY, line, RATE, train=True, channel_axis=1)
    agree(factors(f.dropout1d(torch.from_numpy(line), RATE), line, (0, 1)), factors(ours, line, (0, 1)), 400 * 32)
    single = line[0]  # an unbatched [channel, time]
    ours = jdrop.channel_dropout(KEY, single, RATE, train=True, channel_axis=0, batch_axes=())
    np.testing.assert_array_equal(
        *(np.ptp(np.asarray(y) / single, axis=1) < 1e-6 for y in (ours, f.dropout1d(torch.from_numpy(single), RATE)))
    )


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_alpha_dropout_in_torch(torch, rate):
    """The affine maps of kept and dropped values are equal. PyTorch's functional form needs training=True."""
    t = torch.from_numpy(NCHW.copy())
    for theirs, shared in (
        (torch.nn.functional.alpha_dropout, ()),
        (torch.nn.functional.feature_alpha_dropout, (2, 3)),
    ):
        y = np.asarray(theirs(t, rate, training=True))
        ours = np.asarray(jdrop.alpha_dropout(KEY, NCHW, rate, train=True, shared_axes=shared))
        low = ours.min()
        assert abs(y.min() - low) < 1e-5
        kept_y, kept = y > y.min() + 1e-3, ours > low + 1e-3
        a, b = np.polyfit(NCHW[kept].astype(float), ours[kept].astype(float), 1)
        np.testing.assert_allclose(y[kept_y], a * NCHW[kept_y] + b, atol=1e-4)
        decisions = NCHW.size if not shared else 400 * 32
        for k in (kept_y, kept):
            assert abs(k.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / decisions)


@pytest.mark.parametrize("block", [2, 5, (3, 4)])
def test_blocks_as_max_pooling_in_torch(torch, block):
    """timm and torchvision implement DropBlock by max pooling: the same seeds give the same mask."""
    seeds = np.random.default_rng(1).random((30, 16, 14)) < 0.05
    high, wide = (block, block) if isinstance(block, int) else block
    padded = torch.nn.functional.pad(torch.from_numpy(seeds).float(), (wide - 1, wide - 1, high - 1, high - 1))
    theirs = 1 - torch.nn.functional.max_pool2d(padded, (high, wide), stride=1)
    ours = jax.vmap(lambda s: jdrop.drop_block_mask(s, block))(jnp.asarray(seeds))
    np.testing.assert_array_equal(ours, theirs.numpy() == 1)


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("block", [1, 2, 5])
def test_drop_block_in_timm(torch, timm, monkeypatch, block, coupled):
    """The same mask from the same starts, at the same rate, with rescaling over another set.

    timm also starts blocks beyond the border, so its mask is a window of the mask of a larger map, and it rescales all
    examples by one factor.
    """
    draws, bernoulli = [], torch.Tensor.bernoulli_
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda t, p: draws.append((p, bernoulli(t, p).clone())) or t)
    y = timm("drop").drop_block_2d(torch.ones(3000, 2, 16, 14), RATE, block, couple_channels=coupled).numpy()
    (gamma, starts), every = draws[0], jax.vmap(jax.vmap(lambda s: jdrop.drop_block_mask(s, block)))
    kept = np.asarray(every(jnp.asarray(starts.numpy() == 1)))[..., block // 2 :, block // 2 :][..., :16, :14]
    np.testing.assert_allclose(y, np.broadcast_to(kept / kept.mean(), y.shape), rtol=1e-6)

    x = jnp.ones([3000, 2, 16, 14])
    options = {"train": True, "spatial_axes": (2, 3), "channel_axis": 1, "couple_channels": coupled}
    ours = np.asarray(jdrop.drop_block(KEY, x, RATE, block, **options))
    kept = ours != 0
    np.testing.assert_allclose(ours, kept / kept.mean((1, 2, 3), keepdims=True), rtol=1e-6)
    corners = kept[:, : 1 if coupled else 2, ::15, ::13]  # only one block covers a corner
    for f in corners, starts.numpy() == 0:
        assert abs(1 - f.mean() - gamma) < 5 * np.sqrt(gamma * (1 - gamma) / f.size)


def test_drop_path_in_timm(torch, timm):
    theirs = timm("drop").drop_path(torch.from_numpy(X.copy()), RATE, training=True)
    agree(factors(theirs, X, (0,)), factors(jdrop.drop_path(KEY, X, RATE, train=True), X, (0,)), 400)


@pytest.mark.parametrize("depth", [1, 2, 12])
def test_depth_rates_in_timm(timm, depth):
    ours = jdrop.schedules.depth_rates(RATE, depth, "i/(n-1)")
    np.testing.assert_allclose(ours, timm("drop").calculate_drop_path_rates(RATE, depth), rtol=1e-6)


@pytest.mark.parametrize("tokens, rate, theirs, ours", [(16, 0.25, 12, 12), (17, 0.5, 8, 9), (5, 0.9, 1, 1)])
def test_patch_dropout_in_timm(torch, timm, tokens, rate, theirs, ours):
    """Prefix and order are kept, and each token is equally frequent within 5 standard errors. timm rounds down."""
    x = np.broadcast_to(np.arange(tokens + 2, dtype=np.float32)[:, None], (2000, tokens + 2, 3))
    y, _ = timm("patch_dropout").patch_dropout_forward(torch.from_numpy(x.copy()), rate, 2, ordered=True, training=True)
    draw = jax.vmap(lambda k, x: jdrop.patch_dropout(k, x, rate, train=True, num_prefix=2)[0])
    for result, kept in ((np.asarray(y), theirs), (np.asarray(draw(jax.random.split(KEY, 2000), x)), ours)):
        assert result.shape == (2000, 2 + kept, 3) and (np.diff(result[..., 0]) > 0).all()
        assert (result[:, :2, 0] == [0, 1]).all()
        often = np.bincount(result[:, 2:, 0].astype(int).ravel(), minlength=tokens + 2)[2:] / 2000
        share = kept / tokens
        assert (abs(often - share) < 5 * np.sqrt(share * (1 - share) / 2000)).all()


def test_whole_maps_and_steps_in_keras(keras):
    layers = {
        "SpatialDropout2D": (keras.SpatialDropout2D(RATE, seed=1), X, (0, 3)),
        "SpatialDropout1D": (keras.SpatialDropout1D(RATE, seed=1), X.reshape(400, 30, 32), (0, 2)),
        "Dropout with noise_shape": (keras.Dropout(RATE, noise_shape=(400, 1, 1, 32), seed=1), X, (0, 3)),
    }
    for layer, x, groups in layers.values():
        ours = jdrop.channel_dropout(KEY, x, RATE, train=True)
        agree(factors(layer(x, training=True), x, groups), factors(ours, x, groups), 400 * 32)


def test_noise_in_keras(keras):
    """Mean and standard deviation of both within 5 standard errors of the formula."""
    ones = np.ones((1000, 1000), np.float32)
    for layer, ours, deviation in (
        (
            keras.GaussianDropout(RATE, seed=1),
            jdrop.gaussian_dropout(KEY, ones, RATE, train=True),
            np.sqrt(RATE / (1 - RATE)),
        ),
        (keras.GaussianNoise(RATE, seed=1), jdrop.gaussian_noise(KEY, ones, RATE, train=True), RATE),
    ):
        for y in (layer(ones, training=True), ours):
            y = np.asarray(y, np.float64)
            assert abs(y.mean() - 1) < 5 * deviation / 1000
            assert abs(y.std() / deviation - 1) < 5 * np.sqrt(0.5) / 1000


def test_alpha_dropout_in_keras(keras):
    theirs = np.asarray(keras.AlphaDropout(RATE, seed=1)(X, training=True))
    ours = np.asarray(jdrop.alpha_dropout(KEY, X, RATE, train=True))
    low = ours.min()
    assert abs(theirs.min() - low) < 1e-5
    kept = ours > low + 1e-3
    a, b = np.polyfit(X[kept].astype(float), ours[kept].astype(float), 1)
    other = theirs > low + 1e-3
    np.testing.assert_allclose(theirs[other], a * X[other] + b, atol=1e-4)
    assert abs(1 - other.mean() - RATE) < 5 * np.sqrt(RATE * (1 - RATE) / X.size)


def test_where_jdrop_differs_on_purpose(torch, keras):
    """A dropped NaN remains NaN in PyTorch on CPU; Keras divides by zero at rate 1."""
    bad = np.full(1000, np.nan, np.float32)
    assert np.isnan(np.asarray(torch.nn.functional.dropout(torch.from_numpy(bad), 0.5))).all()
    assert (np.asarray(jdrop.dropout(KEY, bad, 0.5, train=True)) == 0).any()
    np.testing.assert_array_equal(jdrop.alpha_dropout(KEY, X, 1.0, train=True), np.zeros_like(X))
    with pytest.raises(ZeroDivisionError):
        keras.AlphaDropout(1.0, seed=1)(X, training=True)
    assert jnp.isfinite(jdrop.gaussian_dropout(KEY, X, jnp.float32(1), train=True)).all()
