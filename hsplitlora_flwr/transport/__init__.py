"""The data plane: cut activations up, their gradients down."""
