"""Real OC20 trajectories, split by system: DeNS, its ablations, and the baseline given the same time."""
