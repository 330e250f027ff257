"""Layers for other JAX libraries: import ``linen``, ``nnx``, ``equinox`` or ``haiku`` from here by its full path."""
