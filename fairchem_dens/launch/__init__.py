"""How runs start: what is mended in fairchem's launcher, workers of local ranks, and jobs before they run.

`mends` is active in every process that imports fairchem; the others serve the trainer (`workers`) and the
command ``fairchem-dens submit`` (`world`, `job_script`, `partitions`).
"""
