"""How a model runs: on which devices, from which memory, compiled, in 8 bits, on several GPUs."""
