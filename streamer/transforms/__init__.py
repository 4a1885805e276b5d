"""
What a sample goes through on the streamer's processors before it is sent: see ``docs/transforms.md``.

Everything from the random numbers to the last pixel is whole numbers, or single IEEE operations on doubles, which
round alike on every machine: the bytes of a sample depend on its pixels and on (seed, epoch, index), never on the
batch, the replica, its processor or its libraries.
"""
