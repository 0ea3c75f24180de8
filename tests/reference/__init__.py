"""Fixtures of the published implementations, and how closely they are met."""

# Largest relative error of a weight's gradient that went back through every layer of a network.
# Float32 loses more there than on the way forward, since the choice of a maximum or the side of a
# ReLU can tip: 2e-5 to 3e-4 with AVX-512 kernels, up to 5e-4 with AVX2, 1.5e-3 without either.
GRADIENT_TOLERANCE = 5e-3
