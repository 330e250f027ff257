"""The forms that XLA for GPUs wants: so far the plain ones. A form comes here with a measurement, as in ``cpu.py``."""

from jdrop._platform import generic


class Gpu(generic.Platform):
    """Operations as XLA for GPUs wants them."""
