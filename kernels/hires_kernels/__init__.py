"""Fused attention kernels for ultra-high-resolution diffusion. Imports nothing from hires."""
