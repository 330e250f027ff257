"""The checks of scripts/check_reproducibility.py, one by one, on eight host devices, and proof that they can fail."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
import reference

SCRIPT = pathlib.Path(__file__).parents[1] / "scripts" / "check_reproducibility.py"
spec = importlib.util.spec_from_file_location("check_reproducibility", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.mark.parametrize("check", script.CHECKS, ids=lambda check: check.__name__)
def test_check(check):
    row = check()
    if row.ok is None:
        pytest.skip(row.detail)
    assert row.ok, row.detail


def test_known_answers_are_those_of_the_reference():
    parts = []
    for words in script.KEY_WORDS.values():
        parts += [reference.mask(words, (7, 3, 50), rate) for rate in (0.1, 0.5, 0.9)]
        parts.append(np.array(reference.derive(words, "encoder", 3, -1), np.uint32))
    parts += [reference.mask((0, 42), shape, 0.5) for shape in [(), (5,), (200, 1), (2, 5, 7, 3), (300, 1000)]]
    parts.append(reference.mask((0, 42), (2**40, 256), 0.5, ((2**32 - 1, 2), (100, 64))))
    parts.append(reference.mask((0, 42), (2**33,), 0.5, ((2**32 - 64, 128),)))
    for expected, part in zip(parts, script.frozen_parts(), strict=True):
        np.testing.assert_array_equal(part, expected)
    assert script.digest(parts) == script.FROZEN


def test_a_changed_bit_fails(monkeypatch):
    parts = [part.copy() for part in script.frozen_parts()]
    parts[-1][3] ^= True
    monkeypatch.setattr(script, "frozen_parts", lambda: parts)
    assert script.known_answers().ok is False
    assert script.same("", [(parts[-1], parts[-1]), (parts[-1], script.jnp.zeros(128, bool))], "").ok is False
    assert script.same("", [(np.float32([0.0]), np.float32([-0.0]))], "").ok is False


def test_related_masks_fail(monkeypatch):
    key = jax.random.key(5)
    assert script.uncorrelated("", [key, jax.random.key(6)], "").ok is True
    assert script.uncorrelated("", [key, key], "").ok is False
    draw = script.jdrop.dropout_mask

    def related(key, shape, rate):  # 1 element in 16 is the same for all keys: the masks differ, with correlation 1/16
        mask, common = draw(key, shape, rate), draw(jax.random.key(0), shape, rate)
        return script.jnp.where(np.arange(shape[-1])[None, :] % 16 == 0, common, mask)

    monkeypatch.setattr(script.jdrop, "dropout_mask", related)
    assert script.uncorrelated("", [key, jax.random.key(6)], "").ok is False


def test_an_exception_is_a_failed_row():
    def broken():
        raise ValueError("no\nmask")

    assert script.run(broken) == script.Row("broken", False, "ValueError: no mask")
