"""XLA's flags for tests."""

import jax

DEVICES = "--xla_force_host_platform_device_count=8"
LEVEL = "--xla_backend_optimization_level"
QUICK = (f"{LEVEL}=0", "--xla_llvm_disable_expensive_passes=true", "--xla_cpu_parallel_codegen_split_count=1")
if jax.__version_info__ < (0, 11):  # the older emitters take half the time; jaxlib 0.12 has none
    QUICK += ("--xla_cpu_use_fusion_emitters=false",)
