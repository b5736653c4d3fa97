"""Pure orders of samples: permutation, interleaving, packing."""
