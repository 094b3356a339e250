"""The kernels, one backend each; ``fastattn.dispatch`` chooses among them."""
