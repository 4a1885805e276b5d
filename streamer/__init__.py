"""Samples as a network stream: MnistService, SampleService, and the client that training reads with."""
