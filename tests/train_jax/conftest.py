"""The runtime's tests run on 8 fake CPU devices."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
