"""What `fairchem-dens demo` does: plan the runs, run them, collect what came out, and draw and write it down."""
