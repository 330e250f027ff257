"""Every member of the family on one array, for the tests that walk the whole API."""

import jax.numpy as jnp

import jdrop

SHAPE = (8, 6, 10, 40)  # [batch, height, width, channel]
# As the compiled text has them.
COLLECTIVES = r"(all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter)"


def ids_like(x):
    return jnp.arange(x.size, dtype=jnp.int32).reshape(x.shape)


def words(x):
    """Ids for embeddings [batch, height, width, channel] that name some words more than once."""
    return jnp.arange(x.shape[0] * x.shape[1], dtype=jnp.int32).reshape(x.shape[:2]) % 17


def bias_dropout_add(key, x, rate, **options):
    bias = jnp.linspace(0, 1, x.shape[-1]).astype(x.dtype)
    return jdrop.bias_dropout_add(key, x, rate, bias, jnp.full_like(x, 2), **options)


def attention(key, x, rate, **options):
    """x as [batch, time, heads, width]: queries, keys and values at once."""
    return jdrop.dot_product_attention(key, x, jnp.cos(x), x, rate, **options)


MEMBERS = {
    "dropout": jdrop.dropout,
    "alpha_dropout": jdrop.alpha_dropout,
    "gaussian_dropout": jdrop.gaussian_dropout,
    "gaussian_noise": jdrop.gaussian_noise,
    "channel_dropout": jdrop.channel_dropout,
    "drop_block": lambda key, x, rate, **o: jdrop.drop_block(key, x, rate, (3, 2), spatial_axes=(1, 2), **o),
    "drop_path": jdrop.drop_path,
    "stochastic_depth": lambda key, x, rate, **o: jdrop.stochastic_depth(key, x, rate, lambda v: v * v, **o),
    "drop_connect": lambda key, x, rate, **o: jdrop.drop_connect(key, {"w": x}, rate, **o)["w"],
    "embedding_dropout": jdrop.embedding_dropout,
    "embedding_dropout of ids": lambda key, x, rate, **o: jdrop.embedding_dropout(key, x, rate, ids=words(x), **o),
    "token_dropout": lambda key, x, rate, **o: jdrop.token_dropout(key, ids_like(x), rate, -1, **o),
    "patch_dropout": lambda key, x, rate, **o: jdrop.patch_dropout(key, x, rate, token_axis=1, num_prefix=1, **o)[0],
    "locked_dropout": lambda key, x, rate, **o: jdrop.locked_dropout(key, x, rate, time_axis=1, **o),
    "zoneout": lambda key, x, rate, **o: jdrop.zoneout(key, x, rate, jnp.full_like(x, 3), **o),
    "multi_sample_dropout": lambda key, x, rate, **o: jdrop.multi_sample_dropout(key, x, rate, lambda h: h, 3, **o),
    "bias_dropout_add": bias_dropout_add,
    "dot_product_attention": attention,
}
UNBATCHED = {  # the same members for one example, [height, width, channel]
    "channel_dropout": lambda key, x, rate, **o: jdrop.channel_dropout(key, x, rate, batch_axes=(), **o),
    "drop_block": lambda key, x, rate, **o: jdrop.drop_block(
        key, x, rate, (3, 2), spatial_axes=(0, 1), batch_axes=(), **o
    ),
    "drop_path": lambda key, x, rate, **o: jdrop.drop_path(key, x, rate, batch_axes=(), **o),
    "locked_dropout": lambda key, x, rate, **o: jdrop.locked_dropout(key, x, rate, time_axis=0, **o),
    "patch_dropout": lambda key, x, rate, **o: jdrop.patch_dropout(key, x, rate, token_axis=0, num_prefix=1, **o)[0],
}
