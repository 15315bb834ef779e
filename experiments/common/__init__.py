"""What the experiments share: running fairchem, collecting and drawing what it measured."""
