"""Denoising itself: how well the noise can be told, with and without the forces."""
