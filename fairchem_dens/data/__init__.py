"""Data sets: LMDBs that fairchem reads (`lmdb`) and a generated set to try things on (`emt`)."""
