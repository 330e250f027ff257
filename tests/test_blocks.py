"""drop_block: exact masks from seeds, the paper's seed rate, the drop fraction, the scale per example."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jdrop
from jdrop._family import blocks

KEY = jax.random.key(8)


def slow_mask(seeds, block):
    """Return the keep mask by definition: every seed starts a box of zeros."""
    mask = np.ones([n + b - 1 for n, b in zip(seeds.shape, block)], bool)
    for start in itertools.product(*map(range, seeds.shape)):
        if seeds[start]:
            mask[tuple(slice(s, s + b) for s, b in zip(start, block))] = False
    return mask


@pytest.mark.parametrize(
    "shape,block",
    [
        ((9,), 4),
        ((9,), 3),
        ((7, 11), 3),
        ((8, 6), 4),
        ((10, 12), (5, 2)),
        ((5, 6, 7), (2, 3, 4)),
        ((4, 4), 1),
        ((3, 5), (3, 5)),
    ],
)
def test_masks_from_seeds(shape, block):
    sizes = (block,) * len(shape) if isinstance(block, int) else block
    free = [n - b + 1 for n, b in zip(shape, sizes)]
    for density in (0.05, 0.3):
        seeds = np.random.default_rng(0).random(free) < density
        mask = jdrop.drop_block_mask(jnp.asarray(seeds), block)
        assert mask.shape == shape and mask.dtype == bool
        np.testing.assert_array_equal(mask, slow_mask(seeds, sizes))
    np.testing.assert_array_equal(jdrop.drop_block_mask(np.zeros(free, bool), block), np.ones(shape, bool))


def test_overlapping_and_touching_blocks_by_hand():
    seeds = jnp.zeros((3, 4), bool).at[0, 0].set(True).at[1, 1].set(True).at[2, 3].set(True)
    mask = jdrop.drop_block_mask(seeds, 2)
    assert mask.shape == (4, 5)
    rows = ["".join("1" if kept else "0" for kept in row) for row in np.asarray(mask)]
    assert rows == ["00111", "00011", "10000", "11100"]


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize(
    "shape,options,block",
    [
        ((3, 12, 9, 5), {"spatial_axes": (1, 2)}, (4, 3)),
        ((3, 12, 9, 5), {"spatial_axes": (2, 1)}, (3, 4)),
        ((3, 5, 12, 9), {"spatial_axes": (2, 3), "channel_axis": 1}, (4, 3)),
        ((3, 20, 5), {"spatial_axes": 1}, 4),
        ((2, 6, 7, 8, 3), {"spatial_axes": (1, 2, 3)}, (2, 3, 2)),
        ((12, 9, 5), {"spatial_axes": (0, 1), "batch_axes": ()}, (4, 3)),
    ],
)
def test_the_mask_follows_from_the_mask_of_its_seeds(shape, options, block, coupled):
    """The mask is that of drop_block_mask on seeds that dropout_mask draws at rate gamma."""
    rate = 0.3
    y = jdrop.drop_block(KEY, jnp.ones(shape), rate, block, train=True, couple_channels=coupled, **options)
    space = np.atleast_1d(options["spatial_axes"])
    channel = options.get("channel_axis", -1) % len(shape)
    block = (block,) * len(space) if isinstance(block, int) else block
    n = np.array([shape[a] for a in space])
    gamma = rate / np.prod(block) * np.prod(n) / np.prod(n - np.array(block) + 1)
    starts = list(shape)
    for axis, b in zip(space, block):
        starts[axis] -= b - 1
    shared = (channel,) if coupled else ()
    seeds = ~jdrop.dropout_mask(KEY, starts, gamma, shared_axes=shared)
    order = [a for a in range(len(shape)) if a not in space] + list(space)
    moved = np.transpose(np.asarray(seeds), order)
    flat = moved.reshape(-1, *moved.shape[-len(space) :])
    kept = np.stack([slow_mask(s, block) for s in flat]).reshape(*moved.shape[: -len(space)], *n)
    kept = np.transpose(kept, np.argsort(order))
    example = tuple(a for a in range(len(shape)) if a == channel or a in space)
    scale = np.float32(np.prod([shape[a] for a in example])) / kept.sum(example, keepdims=True).astype(np.float32)
    np.testing.assert_array_equal(y, np.where(kept, scale, np.float32(0)))
    if coupled:
        assert bool(jnp.all((y == 0) == (jnp.take(y, jnp.array([0]), axis=channel) == 0)))


@pytest.mark.parametrize("rate", [0.1, 0.3])
@pytest.mark.parametrize("shape,block", [((56, 56), 7), ((10, 16), (3, 4)), ((12,), 5)])
def test_the_drop_fraction_is_exact(rate, shape, block):
    """A position that k blocks cover is dropped with probability 1 - (1 - gamma)^k. Maps are independent, so their mean
    is within 5 standard errors; the variance of the mean of a map is estimated over the maps."""
    count = 2000
    x = jnp.ones((count, *shape, 1))
    y = jdrop.drop_block(KEY, x, rate, block, train=True, spatial_axes=tuple(range(1, 1 + len(shape))))
    fractions = np.asarray((y == 0).reshape(count, -1).mean(1), np.float64)
    sizes = (block,) * len(shape) if isinstance(block, int) else block
    covers = np.ones(())
    for n, b in zip(shape, sizes):
        covers = np.multiply.outer(covers, np.convolve(np.ones(n - b + 1), np.ones(b)))
    gamma = rate * np.prod(shape) / np.prod(sizes) / np.prod([n - b + 1 for n, b in zip(shape, sizes)])
    exact = np.mean(1 - (1 - gamma) ** covers)
    assert abs(fractions.mean() - exact) < 5 * fractions.std() / np.sqrt(count)
    assert exact < rate
    if (rate, shape, block) == (0.1, (56, 56), 7):
        assert round(exact, 4) == 0.0946


def test_each_example_has_its_own_scale():
    x = jnp.ones((6, 10, 10, 4))
    y = jdrop.drop_block(KEY, x, jnp.linspace(0.0, 1.0, 6)[:, None, None, None], 3, train=True, spatial_axes=(1, 2))
    means = np.asarray(y, np.float64).mean((1, 2, 3))
    np.testing.assert_allclose(means, [1, 1, 1, 1, 1, 0], rtol=2**-23)  # the scale is rounded to float32
    scales = [np.unique(np.asarray(v)[np.asarray(v) > 0]).tolist() for v in y]
    assert [len(s) for s in scales] == [1, 1, 1, 1, 1, 0] and len({s[0] for s in scales[:5]}) == 5


def test_rate_one_drops_everything_and_gradients_stay_finite():
    x = jnp.full((2, 5, 5, 3), jnp.inf)
    for rate in (1.0, jnp.float32(1.5)):
        y, pull = jax.vjp(lambda x, r=rate: jdrop.drop_block(KEY, x, r, 2, train=True, spatial_axes=(1, 2)), x)
        np.testing.assert_array_equal(y, np.zeros(x.shape))
        np.testing.assert_array_equal(pull(x)[0], np.zeros(x.shape))


def test_all_dropped_by_chance_gives_zeros():
    """A 2 x 2 map has one place for a block of size 2: at gamma 0.5, about half of the examples lose everything."""
    y = jdrop.drop_block(KEY, jnp.ones((64, 2, 2, 1)), 0.5, 2, train=True, spatial_axes=(1, 2))
    assert set(np.unique(y)) == {0.0, 1.0}


def test_a_longer_batch_keeps_its_masks():
    x = jnp.ones((4, 12, 12, 8))
    more = jnp.ones((9, 12, 12, 8))
    y, z = (jdrop.drop_block(KEY, v, 0.3, 3, train=True, spatial_axes=(1, 2)) for v in (x, more))
    np.testing.assert_array_equal(y, z[:4])


def test_errors_name_the_function_and_the_argument():
    x = jnp.ones((2, 6, 6, 3))
    f = lambda block=2, **o: jdrop.drop_block(KEY, x, 0.1, block, train=True, **{"spatial_axes": (1, 2)} | o)
    for call, error, text in [
        (
            lambda: f(7),
            ValueError,
            r"drop_block: block_size must fit into the map of 6x6, got 7; make the block smaller",
        ),
        (lambda: f((2, 7)), ValueError, "must fit into the map"),
        (lambda: f((2,)), ValueError, "drop_block: block_size must be an int or 2 of them"),
        (lambda: f(0), ValueError, "drop_block: block_size must be at least 1"),
        (lambda: f(2.0), TypeError, "drop_block: block_size must be an integer"),
        (lambda: f(spatial_axes=()), ValueError, "drop_block: spatial_axes must be 1 to 3 axes"),
        (lambda: f(spatial_axes=(1, 3)), ValueError, "drop_block: channel_axis must be none of spatial_axes"),
        (lambda: f(spatial_axes=1), ValueError, "drop_block: batch_axes must name each of the 4 axes"),
        (lambda: f(spatial_axes=(1, 9)), ValueError, "drop_block: spatial_axes must be axes of an array with 4 axes"),
        (lambda: f(channel_axis=()), TypeError, r"drop_block: channel_axis must be an axis, got \(\)"),
        (lambda: f(couple_channels=1), TypeError, "drop_block: couple_channels must be a bool"),
        (lambda: jdrop.drop_block_mask(jnp.ones(3), 2), TypeError, "drop_block_mask: seeds must be a bool array"),
        (lambda: jdrop.drop_block_mask(jnp.ones((), bool), 2), ValueError, "drop_block_mask: seeds must have 1 to 3"),
    ]:
        with pytest.raises(error, match=text):
            call()


def test_gamma_is_formed_in_float32_for_narrow_rates():
    wide, narrow = (blocks._gamma(jnp.asarray(0.25, d), 1 / 7) for d in ("float32", "bfloat16"))
    assert wide == narrow and narrow.dtype == jnp.float32


def test_a_nan_rate_affects_only_its_own_example():
    x = jnp.ones((3, 6, 6, 2))
    rate = jnp.array([0.3, jnp.nan, 0.3])[:, None, None, None]
    f = lambda x, r: jdrop.drop_block(KEY, x, r, 2, train=True, spatial_axes=(1, 2))
    y, pull = jax.vjp(lambda x: f(x, rate), x)
    whole = f(x, 0.3)
    for z in (y, pull(x)[0]):
        np.testing.assert_array_equal(z[::2], whole[::2])
        assert bool(jnp.isnan(z[1]).all())
    some = jnp.full((1, 5, 5, 1), 0.9).at[0, 0, 0, 0].set(jnp.nan)
    assert bool(jnp.isnan(f(x, some)).all()), "an example is rescaled as a whole"


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_shard_may_split_batch_axes_only(axis):
    spec = P(*[None] * axis, "d")
    f = jax.shard_map(
        lambda k, x: jdrop.drop_block(k, x, 0.3, 1, train=True, spatial_axes=(1, 2), shard=spec),
        mesh=jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), spec),
        out_specs=spec,
    )
    with pytest.raises(NotImplementedError, match="drop_block: shard must split batch axes only"):
        f(KEY, jnp.ones((8, 8, 8, 8)))
