"""Layers for other JAX libraries. Import one by its full path: ``linen``, ``nnx``, ``equinox``, or ``haiku``."""
