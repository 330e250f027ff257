"""Claim: a mask depends only on the key and the index, on every device and under every transformation.

Runs on the devices that JAX finds: ``python scripts/check_reproducibility.py``; prints a table, exit code 0 or 1. The
known answers are in this file, and comparisons are bit for bit. Masks of different keys must be uncorrelated: the
correlation of each pair must lie within 6 standard errors, 6 / sqrt(elements). By chance, the 528 pairs of a check
exceed this bound for one key in a million; the keys are fixed.
"""

import argparse
import functools
import hashlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jdrop
from jdrop import keys

BOUND = 6  # standard errors
CHILDREN = 32
ELEMENTS = (64, 1024)  # shape of the masks in tests of correlation
SHAPE, RATE = (32, 300), 0.3  # the array for tests of equality

KEY_WORDS = {
    "threefry2x32": (0, 42),
    "rbg": (0, 42, 0, 42),
    "unsafe_rbg": (1, 2, 3, 4),
    "threefry4x32": (0xFFFFFFFF, 0, 0x80000000, 7),
    "philox2x32": (2193621824,),
    "philox4x32": (1801635674, 389949022),
}
FROZEN = "614cc08dc738c19950a0c7d2f3249c44be8feab06ce4f22e609ad29b19833840"
"""SHA-256 of ``frozen_parts()``, which equals that of the NumPy reference in the tests."""


class Row(NamedTuple):
    """A row of the table; ``ok`` is None for a check that cannot run here."""

    name: str
    ok: bool | None
    detail: str


def same(name: str, pairs: Sequence[tuple[Any, Any]], detail: str) -> Row:
    """Check that all pairs of arrays are equal, bit for bit."""
    differing = 0
    for a, b in pairs:
        a, b = np.asarray(a), np.asarray(b)
        differing += a.shape != b.shape or a.dtype != b.dtype or a.tobytes() != b.tobytes()
    return Row(name, not differing, f"{detail}: {len(pairs) - differing} of {len(pairs)} equal")


def array() -> Array:
    """Return an array without zeros, so that zeros in the output mark dropped elements."""
    return jnp.asarray(np.random.default_rng(0).uniform(1, 2, SHAPE), jnp.float32)


def drop(key: Array, x: Array, rate: float | Array = RATE, **options: Any) -> Array:
    """Apply dropout in training mode."""
    return jdrop.dropout(key, x, rate, train=True, **options)


# ---------------------------------------------------------------------------------- the same everywhere


@functools.cache
def frozen_parts() -> list[np.ndarray]:
    """Return masks and derived keys that no release, device, or process may change."""
    parts: list[Any] = []
    for impl, words in KEY_WORDS.items():
        key = jax.random.wrap_key_data(jnp.asarray(np.array(words, np.uint32)), impl=impl)
        parts += [jdrop.dropout_mask(key, (7, 3, 50), rate) for rate in (0.1, 0.5, 0.9)]
        parts.append(jax.random.key_data(keys.derive(key, "encoder", 3, np.int32(-1))))
    key = jax.random.wrap_key_data(jnp.asarray(np.array((0, 42), np.uint32)), impl="threefry2x32")
    parts += [jdrop.dropout_mask(key, shape, 0.5) for shape in [(), (5,), (200, 1), (2, 5, 7, 3), (300, 1000)]]
    parts.append(jdrop.dropout_mask(key, (2**40, 256), 0.5, window=((2**32 - 1, 2), (100, 64))))
    parts.append(jdrop.dropout_mask(key, (2**33,), 0.5, window=((2**32 - 64, 128),)))
    return [np.asarray(part) for part in parts]


def digest(parts: Sequence[np.ndarray]) -> str:
    """Return the SHA-256 of arrays: bits packed, the first lowest; words little-endian."""
    total = hashlib.sha256()
    for part in parts:
        packed = np.packbits(part.ravel(), bitorder="little") if part.dtype == np.bool_ else part.astype("<u4")
        total.update(packed.tobytes())
    return total.hexdigest()


def known_answers() -> Row:
    """Check masks and derived keys of mask version 1."""
    parts = frozen_parts()
    sha = digest(parts)
    return Row("known answers", sha == FROZEN, f"{len(parts)} masks and keys, SHA-256 {sha[:12]}")


def fresh_process() -> Row:
    """Check that a new process, on CPU and with another hash seed, gives the same bits as this one."""
    root = str(pathlib.Path(jdrop.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "123", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--digest"]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    here, there = digest(frozen_parts()), child.stdout.strip()
    reason = f"SHA-256 {there[:12]}" if not child.returncode else child.stderr.strip()[-100:]
    return Row("fresh process", here == there, f"on CPU, {reason} for {here[:12]}")


def same_key() -> Row:
    """Check that a key of any implementation gives one mask: in dropout and dropout_mask, typed and legacy."""
    pairs = []
    for impl in KEY_WORDS:
        key = jax.random.key(5, impl=impl)
        pairs.append((jdrop.dropout_mask(key, SHAPE, RATE), jdrop.dropout_mask(jax.random.clone(key), SHAPE, RATE)))
        pairs.append((jdrop.dropout_mask(key, SHAPE, RATE), drop(key, array()) != 0))
        pairs.append((jdrop.dropout_mask(key, SHAPE, RATE), jdrop.dropout_mask(jax.random.key_data(key), SHAPE, RATE)))
    return same("same key, same mask", pairs, "mask twice, typed and legacy keys, mask of dropout")


def dtypes() -> Row:
    """Check that the mask does not depend on the dtype of x, on x64, or on whether the rate is traced."""
    key = jax.random.key(5)
    mask = np.asarray(jdrop.dropout_mask(key, SHAPE, RATE))
    pairs = [(mask, drop(key, array().astype(d)) != 0) for d in ("float16", "bfloat16", "float32", "complex64")]
    pairs.append((mask, drop(key, array(), jnp.float32(RATE)) != 0))
    pairs.append((mask, jax.jit(lambda rate: jdrop.dropout_mask(key, SHAPE, rate))(RATE)))
    with jax.enable_x64(True):
        pairs.append((mask, jdrop.dropout_mask(key, SHAPE, RATE)))
        pairs.append((mask, drop(key, array().astype("float64"), jnp.float64(RATE)) != 0))
    return same("dtypes, x64, traced rate", pairs, "mask")


def longer_batch() -> Row:
    """Check that adding examples does not change the masks of the first ones."""
    key, (n, *features) = jax.random.key(5), SHAPE
    whole = jdrop.dropout_mask(key, (3 * n, *features), RATE)
    return same("longer batch", [(whole[:m], jdrop.dropout_mask(key, (m, *features), RATE)) for m in (1, n)], "prefix")


def windows() -> Row:
    """Check that a window is a slice of the mask, also with traced starts and in arrays with more than 2**32 rows."""
    key = jax.random.key(5)
    whole = np.asarray(jdrop.dropout_mask(key, (20, 7, 300), RATE))
    pairs = []
    for at in [((0, 20), (0, 7), (0, 300)), ((3, 5), (2, 4), (17, 200)), ((19, 1), (6, 1), (299, 1))]:
        part = whole[tuple(slice(start, start + size) for start, size in at)]
        pairs.append((part, jdrop.dropout_mask(key, whole.shape, RATE, window=at)))
        sizes = [size for _, size in at]

        def traced(starts: Array, sizes: list[int] = sizes) -> Array:
            return jdrop.dropout_mask(key, (20, 7, 300), RATE, window=[*zip(starts, sizes, strict=True)])

        pairs.append((part, jax.jit(traced)(jnp.array([start for start, _ in at]))))
    for shape, start in [((2**40, 128), 2**32 - 8), ((2**34,), 2**32 - 8), ((2**36, 100), 2**32 - 8)]:
        rest = [(0, n) for n in shape[1:]]
        large = jdrop.dropout_mask(key, shape, RATE, window=[(start, 16), *rest])
        pairs.append((large[8:], jdrop.dropout_mask(key, shape, RATE, window=[(start + 8, 8), *rest])))
    row = same("window", pairs, "slices of the whole")
    ends = [jdrop.dropout_mask(key, (2**34,), RATE, window=[(i * 2**32, 512)]) for i in range(4)]
    distinct = len({np.asarray(end).tobytes() for end in ends})  # an axis beyond 2**32 must not repeat
    return Row(
        row.name, row.ok and distinct == len(ends), f"{row.detail}; {distinct} of {len(ends)} distinct at i * 2**32"
    )


def transformed_jit() -> Row:
    """Check that jit does not change the bits."""
    key, x = jax.random.key(5), array()
    y, mask = drop(key, x), jdrop.dropout_mask(key, SHAPE, RATE)
    compiled = jax.jit(lambda key, x, rate: drop(key, x, rate))
    pairs = [(y, compiled(key, x, RATE)), (mask, jax.jit(lambda key: jdrop.dropout_mask(key, SHAPE, RATE))(key))]

    def fused(key: Array, x: Array) -> Array:
        return jnp.where(drop(key, jnp.cos(x) + 2) == 0, jnp.zeros_like(x), jnp.sin(x))  # sin > 0 on [1, 2]

    pairs.append((mask, jax.jit(fused)(key, x) != 0))
    return same("jit", pairs, "dropout and mask")


def transformed_vmap() -> Row:
    """Compare vmap over keys, arrays, or both, also nested, with a loop."""
    key, xs = jax.random.key(5), jnp.stack([array(), array() + 1, array() + 2])
    many = jax.random.split(key, 3)
    loop = jnp.stack([drop(k, x) for k, x in zip(many, xs, strict=True)])
    shared = jnp.stack([drop(key, x) for x in xs])
    one_x = jnp.stack([drop(k, xs[0]) for k in many])
    pairs = [(loop, jax.vmap(drop)(many, xs)), (shared, jax.vmap(drop, (None, 0))(key, xs))]
    pairs.append((one_x, jax.vmap(drop, (0, None))(many, xs[0])))
    nested = jax.vmap(jax.vmap(drop, (None, 0)), (0, None))(many, xs)
    pairs += [(jnp.stack([drop(k, x) for x in xs]), part) for k, part in zip(many, nested, strict=True)]
    pairs.append((loop, jax.jit(jax.vmap(drop))(many, xs)))
    return same("vmap", pairs, "keys, arrays, both, nested")


def transformed_scan() -> Row:
    """Check that a scan over steps, and its gradient, use the masks of a Python loop."""
    key, x, steps = jax.random.key(5), array(), 4
    loop = jnp.stack([drop(keys.derive(key, "drop", step), x) for step in range(steps)])

    def one(x: Array, step: Array) -> tuple[Array, Array]:
        return x, drop(keys.derive(key, "drop", step), x)

    def total(x: Array) -> Array:
        return jax.lax.scan(lambda y, step: (drop(keys.derive(key, "drop", step), y), None), x, jnp.arange(steps))[
            0
        ].sum()

    expected = x
    for step in range(steps):
        expected = drop(keys.derive(key, "drop", step), expected)
    pairs = [(loop, jax.lax.scan(one, x, jnp.arange(steps))[1]), (expected != 0, jax.jit(jax.grad(total))(x) != 0)]
    return same("scan", pairs, "steps against a loop")


def transformed_checkpoint() -> Row:
    """Check that a rematerialized forward pass uses the same mask again."""
    key, x, w = jax.random.key(5), array(), array() + 1

    def loss(x: Array) -> Array:
        return (drop(key, x) * w).sum()

    pairs = [(drop(key, w), jax.jit(jax.grad(jax.checkpoint(loss)))(x))]

    def deep(x: Array) -> Array:
        for layer in range(3):
            x = jax.checkpoint(lambda x, layer=layer: jnp.sin(drop(keys.derive(key, layer), x)) + x)(x)
        return x.sum()

    def plain(x: Array) -> Array:
        for layer in range(3):
            x = jnp.sin(drop(keys.derive(key, layer), x)) + x
        return x.sum()

    close = np.allclose(jax.jit(jax.grad(deep))(x), jax.jit(jax.grad(plain))(x), rtol=1e-5, atol=1e-5)
    row = same("checkpoint", pairs, "gradient of one layer")
    return Row(row.name, row.ok and close, f"{row.detail}; of three layers within 1e-5: {close}")


def transformed_grad() -> Row:
    """Check that all derivatives apply the mask of the forward pass: dropout is its own transpose."""
    key, x, w = jax.random.key(5), array(), array() + 1
    expected = drop(key, w)

    def loss(x: Array) -> Array:
        return (drop(key, x) * w).sum()

    pairs = [(expected, jax.grad(loss)(x)), (expected, jax.jit(jax.grad(loss))(x))]
    pairs.append((expected, jax.jvp(lambda x: drop(key, x), (x,), (w,))[1]))
    pairs.append((expected, jax.linear_transpose(lambda x: drop(key, x), x)(w)[0]))
    pairs.append((expected, jax.vjp(lambda x: drop(key, x), x)[1](w)[0]))
    curvature = jax.grad(lambda x: (jax.grad(lambda x: (drop(key, x) ** 2).sum())(x) * w).sum())(x)
    pairs.append((expected != 0, curvature != 0))
    return same("grad", pairs, "grad, jvp, transpose, grad of grad")


def shards() -> Row:
    """Compare tiles in ``shard_map``, and arrays sharded over automatic and explicit meshes, with one device."""
    count = len(jax.devices())
    if count == 1:
        return Row("shard", None, "one device: not run")
    sizes = (count // 2, 2) if count % 2 == 0 else (count, 1)
    key, x = jax.random.key(5), jnp.asarray(np.random.default_rng(1).uniform(1, 2, (4 * count, 256)), jnp.float32)
    y, mask = drop(key, x), jdrop.dropout_mask(key, x.shape, RATE)
    pairs = []
    for spec in [PartitionSpec("a", "b"), PartitionSpec(("b", "a"), None)]:
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh(sizes, ("a", "b"), axis_types=(kind, kind))
            sharded = jax.device_put(x, NamedSharding(mesh, spec))
            with jax.set_mesh(mesh):
                tiles = jax.shard_map(
                    lambda key, x, spec=spec: drop(key, x, shard=spec), in_specs=(PartitionSpec(), spec), out_specs=spec
                )
                pairs += [(y, jax.jit(tiles)(key, sharded)), (y, jax.jit(drop)(key, sharded)), (y, drop(key, sharded))]
                gradient = jax.jit(jax.grad(lambda x, key=key, tiles=tiles: tiles(key, x).sum()))(sharded)
                pairs.append((drop(key, jnp.ones_like(x)), gradient))
                pairs.append((mask, jdrop.dropout_mask(key, x.shape, RATE, out_sharding=spec)))
    return same("shard", pairs, f"{count} devices, 2 layouts, automatic and explicit meshes")


# ---------------------------------------------------------------------------------- different where it should


def uncorrelated(name: str, many: Sequence[Array], detail: str) -> Row:
    """Check that the masks of all keys differ and are pairwise uncorrelated."""
    draw = jax.jit(jax.vmap(lambda key: jdrop.dropout_mask(key, ELEMENTS, 0.5)))
    masks = np.asarray(draw(jnp.stack(many))).reshape(len(many), -1)
    signs = masks.astype(np.float32) * 2 - 1  # mean 0, variance 1 at rate 0.5: sums of fair signs, exact in float32
    sums = np.asarray(jnp.matmul(signs, signs.T, precision="highest"))
    z = np.abs(sums[np.triu_indices(len(many), 1)]).max() / np.sqrt(masks.shape[1])
    distinct = len({mask.tobytes() for mask in masks})
    pairs = len(many) * (len(many) - 1) // 2
    ok = distinct == len(many) and bool(z < BOUND)
    return Row(name, ok, f"{detail}: {distinct} of {len(many)} distinct, {pairs} pairs within {z:.1f} of {BOUND} s.e.")


def split_keys() -> Row:
    """Check a key and its split children."""
    key = jax.random.key(5)
    return uncorrelated("split", [key, *jax.random.split(key, CHILDREN)], "key and children")


def folded_keys() -> Row:
    """Check a key and its fold_in children."""
    key = jax.random.key(5)
    return uncorrelated("fold_in", [key, *(jax.random.fold_in(key, i) for i in range(CHILDREN))], "key and children")


def derived_keys() -> Row:
    """Check a key and keys derived from it by neighboring, similar, or reordered paths."""
    key = jax.random.key(5)
    paths: list[tuple[str | int, ...]] = [(i,) for i in range(8)] + [("layer", i) for i in range(8)]
    paths += [(f"layer{i}",) for i in range(8)] + [(str(i),) for i in range(3)]
    paths += [(1, 2), (2, 1), ("a", "b"), ("ab",), ("b", "a")]
    return uncorrelated("derive", [key, *(keys.derive(key, *path) for path in paths)], "key and paths")


def example_keys() -> Row:
    """Check a key and its keys for examples with neighboring, distant, and negative ids."""
    key = jax.random.key(5)
    ids = np.array([*range(16), *(2**i for i in range(4, 30, 2)), -1, -2, 2**31 - 1])
    return uncorrelated("per_example", [key, *keys.per_example(key, ids)], "key and examples")


def key_families() -> Row:
    """Check that families of keys do not coincide: seeds, split, and derive by name, by number, and in two stages."""
    key = jax.random.key(5)
    many = [key, *(jax.random.key(seed) for seed in (0, 1, 2, 3, 4, 6)), *jax.random.split(key, 8)]
    many += [keys.derive(key, i) for i in range(6)] + [keys.derive(key, name) for name in ("a", "b", "0", "1")]
    many += [*keys.per_example(keys.derive(key, "a"), jnp.arange(4)), keys.derive(key, "a", "b")]
    return uncorrelated("families of keys", many, "seeds, split, derive, nested")


def draws() -> Row:
    """Check that a mask is uncorrelated with the numbers of jax.random from the same key."""
    key = jax.random.key(5)
    n = int(np.prod(ELEMENTS))
    mask = np.asarray(jdrop.dropout_mask(key, ELEMENTS, 0.5)) * 2.0 - 1
    flips = [np.asarray(jax.random.bernoulli(jax.random.clone(key), 0.5, ELEMENTS)) * 2.0 - 1]
    flips += [(np.asarray(jax.random.bits(jax.random.clone(key), ELEMENTS)) >> b & 1) * 2.0 - 1 for b in range(32)]
    z = max(abs(float((mask * flip).sum())) for flip in flips) / np.sqrt(n)
    return Row("draws of jax.random", z < BOUND, f"bernoulli and 32 bits of one key: within {z:.1f} of {BOUND} s.e.")


def jax_generator() -> Row:
    """Check that ``generator="jax"`` draws the mask of ``jax.random.bernoulli``, bit for bit."""
    pairs = []
    for impl in ("threefry2x32", "rbg", "philox4x32"):
        key = jax.random.key(5, impl=impl)
        expected = jax.random.bernoulli(jax.random.clone(key), 1 - RATE, SHAPE)
        pairs.append((expected, jdrop.dropout_mask(key, SHAPE, RATE, generator="jax")))
        pairs.append((expected, drop(jax.random.clone(key), array(), generator="jax") != 0))
    return same('generator="jax"', pairs, "jax.random.bernoulli")


CHECKS: tuple[Callable[[], Row], ...] = (
    known_answers,
    fresh_process,
    same_key,
    dtypes,
    longer_batch,
    windows,
    transformed_jit,
    transformed_vmap,
    transformed_scan,
    transformed_checkpoint,
    transformed_grad,
    shards,
    split_keys,
    folded_keys,
    derived_keys,
    example_keys,
    key_families,
    draws,
    jax_generator,
)


def run(check: Callable[[], Row]) -> Row:
    """Run a check and return its row; an exception is a failure."""
    try:
        return check()
    except Exception as error:  # the table must be complete
        return Row(check.__name__, False, f"{type(error).__name__}: {' '.join(str(error).split())[:100]}")


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digest", action="store_true", help="print the SHA-256 of the known answers, and no table")
    if parser.parse_args().digest:
        print(digest(frozen_parts()))
        return 0
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {len(jax.devices())} x {device.device_kind} ({device.platform}), ", end="")
    print(f"mask version {jdrop.MASK_VERSION}")
    rows = []
    for check in CHECKS:
        rows.append(run(check))
        verdict = {True: "ok", False: "FAILED", None: "-"}[rows[-1].ok]
        print(f"{rows[-1].name:26} {verdict:7} {rows[-1].detail}", flush=True)
    failed = sum(row.ok is False for row in rows)
    print(f"{failed} FAILED" if failed else "all agree")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
