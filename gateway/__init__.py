"""ImageService, the asyncio front of Triton: raw images in, classes with probabilities out."""
