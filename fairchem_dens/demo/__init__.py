"""What `fairchem-dens demo` does: plan the runs, run them, collect the results, draw and write them down."""
