"""The train steps that ``scripts/_examples.py`` records for compilers."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1] / "scripts"))
import _examples

EXAMPLE = """
import argparse, functools, pathlib
import jax, jax.numpy as jnp

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--out", type=pathlib.Path)
args = parser.parse_args()

@functools.partial(jax.jit, static_argnames="mode", donate_argnums=0)
def train_step(w, key, *, mode):
    return w - 1

evaluate = jax.jit(lambda w: w.sum())
w = jnp.ones((2, 3))
for mode in ("a", "b"):
    for _ in range(args.steps + 1):
        w = train_step(w, jax.random.key(0), mode=mode)
print(evaluate(w))
(args.out / "plot.png").write_text("")
raise SystemExit(0)
"""


def test_each_different_step_is_recorded_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "fake.py").write_text(EXAMPLE)
    monkeypatch.setattr(_examples, "FOLDER", tmp_path)
    argv, jit = sys.argv, jax.jit
    steps = _examples.train_steps("fake")
    assert [step.keywords for step in steps] == [{"mode": "a"}, {"mode": "b"}]
    w, key = steps[0].arguments
    assert (w.shape, w.dtype) == ((2, 3), jnp.float32) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    assert steps[0].options == {"static_argnames": "mode", "donate_argnums": 0}
    assert sys.argv is argv and jax.jit is jit and capsys.readouterr() == ("", "")


def test_an_example_without_a_step_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(EXAMPLE.replace("train_step", "update"))
    monkeypatch.setattr(_examples, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="fake compiles no function whose name contains 'step'"):
        _examples.train_steps("fake")
