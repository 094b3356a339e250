"""Other packages' attention functions, argument for argument, on fastattn's kernels."""
