"""Training images distorted at random: affine maps and elastic deformations.

After Simard, Steinkraus and Platt, "Best Practices for Convolutional Neural Networks Applied to
Visual Document Analysis" (2003). Each image gets one field of shifts, of all distortions together,
and is interpolated once; a chain of Keras' layers would blur it at each. (Keras' own
`RandomElasticTransform` draws one field for both axes, and is a loop over the images.)
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from pipeline.config import AugmentationConfig
from pipeline.program import pad

Array = npt.NDArray[np.float32]

_PIXELS = 2**19  # at once: bounds the memory, and stays in the processor's cache
_WEAKEST = 0.01  # of the strongest; what is weaker is smoothed away


class Distortion:
    """Distorts images of one size; with an equal key, equally.

    Args:
        config: How much.
        size: Height and width in pixels.
    """

    def __init__(self, config: AugmentationConfig, size: Sequence[int]) -> None:
        self.config, self.size = config, np.array(size, np.float32)
        y, x = np.indices(size, np.float32) - (self.size[:, None, None] - 1) / 2
        modes = _smooth_modes(size, config.elastic_sigma)[: None if config.elastic else 0]
        self._modes = len(modes)
        self._basis = tf.constant(np.stack([*modes, y, x, np.ones_like(x)]))

    def __call__(self, images: tf.Tensor, key: Sequence[int]) -> tf.Tensor:
        """Distorts each image in its own way.

        What comes from outside is as the nearest pixel of the edge.

        Args:
            images: `[n, height, width]`, of any dtype.
            key: Whole numbers from 0 that decide the draw, of one length.

        Returns:
            Of the same shape and dtype; whole numbers are rounded.
        """
        seeds = np.random.SeedSequence(list(key)).generate_state(4) >> 1
        # Not by XLA, which draws slowly on a CPU.
        maps = self._affine_maps(tf.random.stateless_uniform([6, len(images)], seeds[:2], -1, 1))
        noise = tf.random.stateless_normal([len(images), 2, self._modes], seeds[2:])
        fields = noise * (self.config.elastic * self.size[:, None])
        weights = tf.concat([fields, maps], 2)
        block = max(1, _PIXELS // int(self.size.prod()))
        block = min(block, 1 << (len(images) - 1).bit_length())  # of few sizes: XLA compiles each
        missing = -len(images) % block
        images, weights = (pad(array, missing) for array in (images, weights))
        blocks = [slice(start, start + block) for start in range(0, len(images), block)]
        distorted = [_interpolate(images[each], self._sources(weights[each])) for each in blocks]
        return tf.concat(distorted, 0)[: len(images) - missing]

    def _sources(self, weights: tf.Tensor) -> tf.Tensor:
        """Row and column that each pixel comes from, `[n, 2, height, width]`."""
        return tf.tensordot(weights, self._basis, 1)

    def _affine_maps(self, draw: tf.Tensor) -> tf.Tensor:
        """Where the pixels come from: row and column by a row, a column and 1, `[n, 2, 3]`.

        Args:
            draw: `[6, n]`, uniform in [-1, 1].
        """
        config = self.config
        angle = draw[0] * math.radians(config.rotation)
        slope = tf.tan(draw[1] * math.radians(config.shear))
        shifts = tf.transpose(draw[2:4]) * config.shift * self.size + (self.size - 1) / 2
        scales = 1 / (1 + tf.transpose(draw[4:6]) * config.scale)
        sin, cos = tf.sin(angle), tf.cos(angle)
        turned = [[cos - sin * slope, -sin], [sin + cos * slope, cos]]
        linear = tf.transpose(turned, [2, 0, 1]) * scales[:, :, None]
        return tf.concat([linear, shifts[:, :, None]], 2)


def _smooth_modes(size: Sequence[int], sigma: float) -> Array:
    """Fields whose sum, each times normal noise, is distributed as white noise that is smoothed.

    Far fewer than pixels, as most of the noise is smoothed away.

    Args:
        size: Height and width in pixels.
        sigma: Of the Gaussian that smooths, as a fraction of the side; beyond the edges is nothing.

    Returns:
        `[modes, height, width]`; that sum has a mean square of 1.
    """
    axes = []
    for side in size:
        distance = np.subtract.outer(np.arange(side), np.arange(side)) / (sigma * side)
        strengths, vectors = np.linalg.eigh(np.exp(-0.5 * np.square(distance)))
        vectors *= np.where(vectors[0] < 0, -1, 1)  # the sign is the library's choice
        strong = strengths > _WEAKEST * strengths.max()
        axes.append((vectors * strengths)[:, strong].astype(np.float32))
    modes = np.einsum("ya,xb->abyx", *axes).reshape(-1, *size)
    strengths = np.linalg.norm(modes, axis=(1, 2))
    modes = modes[strengths > _WEAKEST * strengths.max()]
    return modes / np.sqrt(np.square(modes).sum(0).mean())  # type: ignore[no-any-return]


@tf.function(jit_compile=True, autograph=False)  # type: ignore[untyped-decorator]
def _interpolate(images: tf.Tensor, sources: tf.Tensor) -> tf.Tensor:
    """Images whose pixels come from elsewhere, bilinear between the four nearest.

    Args:
        images: `[n, height, width]`.
        sources: Row and column that each pixel comes from, `[n, 2, height, width]`.
    """
    count, height, width = images.shape
    pixels = tf.reshape(images, [-1])
    corners, parts = [], []
    for source, side in zip(tf.unstack(sources, axis=1), (height, width), strict=True):
        inside = tf.clip_by_value(source, 0.0, side - 1.0)
        low = tf.minimum(tf.cast(inside, tf.int32), max(side - 2, 0))
        corners.append((low, tf.minimum(low + 1, side - 1)))
        parts.append(inside - tf.cast(low, tf.float32))
    image = tf.range(count)[:, None, None] * (height * width)

    def row(y: tf.Tensor) -> tf.Tensor:
        left, right = (
            tf.cast(tf.gather(pixels, image + y * width + x), tf.float32) for x in corners[1]
        )
        return left + (right - left) * parts[1]

    top, bottom = map(row, corners[0])
    mixed = top + (bottom - top) * parts[0]
    return tf.cast(tf.round(mixed) if images.dtype.is_integer else mixed, images.dtype)
