"""The bits behind masks and noise: pure functions of uint32 arrays, which run anywhere, Pallas kernels included."""
