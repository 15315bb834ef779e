"""From files that ASE reads to train, val and test LMDBs.

The way of a frame: `sources` finds and reads files; `labels` takes energy, forces, fixed atoms and tags from
a frame; `parts` does both for one file, in a process of its own, and keeps the result on disk. Then `plan`
decides on all frames: `systems` what belongs together and to which split, `filters` what is left out,
`energies` what is learned. `convert` runs all this and writes, `report` says what happened.
"""
