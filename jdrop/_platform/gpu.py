"""Forms for XLA on GPUs: so far the plain ones. A new form needs a measurement, as in ``cpu.py``."""

from jdrop._platform import generic


class Gpu(generic.Platform):
    """Operations in the best forms for XLA on GPUs."""
