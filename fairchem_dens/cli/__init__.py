"""The `fairchem-dens` command: one module per subcommand, dispatched by `main`."""
