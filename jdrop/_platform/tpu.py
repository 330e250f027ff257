"""The forms that XLA for TPUs wants: so far the plain ones. A form comes here with a measurement, as in ``cpu.py``."""

from jdrop._platform import generic


class Tpu(generic.Platform):
    """Operations as XLA for TPUs wants them."""
