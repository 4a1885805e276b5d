"""How long batches take, learned while serving."""

# Weight that an observation keeps with each that follows: some fifty batches are remembered.
_MEMORY = 0.98
# An observation this many times the expected one is taken for a hiccup, and for that much only.
_HICCUP = 4.0


class Pace:
    """
    Seconds of a batch of ``n`` images as ``per_image * n + per_batch``: least squares over the latest batches.

    The fit of BentoML's dispatcher (bentoml/_internal/marshal/dispatcher.py), with weights that fade in place of a
    window, so that nothing is kept but five sums.
    """

    def __init__(self) -> None:
        self._weight = self._n = self._t = self._nn = self._nt = 0.0

    @property
    def is_known(self) -> bool:
        """Whether a batch was observed yet."""
        return self._weight > 0

    def observe(self, num_images: int, seconds: float) -> None:
        """Take in how long a batch of so many images took."""
        if self.is_known:
            seconds = min(seconds, _HICCUP * max(self.seconds(num_images), 1e-4))
        self._weight = self._weight * _MEMORY + 1
        self._n = self._n * _MEMORY + num_images
        self._t = self._t * _MEMORY + seconds
        self._nn = self._nn * _MEMORY + num_images * num_images
        self._nt = self._nt * _MEMORY + num_images * seconds

    def seconds(self, num_images: int) -> float:
        """Return what a batch of so many images is expected to take; 0 where nothing was observed."""
        per_image, per_batch = self.coefficients()
        return per_image * num_images + per_batch

    def coefficients(self) -> tuple[float, float]:
        """Return seconds per image and per batch, neither below 0."""
        if not self.is_known:
            return 0.0, 0.0
        spread = self._weight * self._nn - self._n * self._n
        # Batches of one size alone do not tell the two apart: all is put on the images.
        if spread <= 1e-6 * self._weight * self._nn:
            return self._t / self._n, 0.0
        per_image = max((self._weight * self._nt - self._n * self._t) / spread, 0.0)
        per_batch = (self._t - per_image * self._n) / self._weight
        if per_batch < 0:
            return self._nt / self._nn, 0.0
        return per_image, per_batch
