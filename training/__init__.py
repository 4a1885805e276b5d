"""Train the network from a stream of samples, evaluate, export to TorchScript and publish for Triton."""
