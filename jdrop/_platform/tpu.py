"""Forms for XLA on TPUs: so far the plain ones. A new form needs a measurement, as in ``cpu.py``."""

from jdrop._platform import generic


class Tpu(generic.Platform):
    """Operations in the best forms for XLA on TPUs."""
