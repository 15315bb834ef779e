"""What the experiments share: running fairchem on a list of settings, collecting and drawing what it measured."""
