"""Dynamic loss scaling: a float16 run takes the gradient of a scaled loss, so that few of its entries round to zero."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

FIRST, LEAST, MOST = 2.0**16, 1.0, 2.0**24
PATIENCE = 2000  # steps without an overflow after which the scale doubles


class LossScale(NamedTuple):
    """The power of two that multiplies the loss before differentiation and divides its gradient afterwards.

    Sources: "Mixed Precision Training" (Micikevicius et al., 2018), section 3.2; the constants are those of PyTorch's
    GradScaler.
    """

    loss_scale: Float[Array, ""]
    good_steps: Int[Array, ""]  # since the scale changed

    @staticmethod
    def first() -> "LossScale":
        """The scale of the first step."""
        return LossScale(jnp.float32(FIRST), jnp.int32(0))

    def after(self, loss_finite: Bool[Array, ""], gradient_finite: Bool[Array, ""]) -> "LossScale":
        """The next step's: half after a gradient that overflowed, twice after PATIENCE gradients that did not.

        A loss that is not finite is not due to the scale and leaves it as it is.
        """
        finite, overflow = loss_finite & gradient_finite, loss_finite & ~gradient_finite
        grows = finite & (self.good_steps + 1 >= PATIENCE)
        halved, doubled = jnp.maximum(self.loss_scale / 2, LEAST), jnp.minimum(self.loss_scale * 2, MOST)
        scale = jnp.where(overflow, halved, jnp.where(grows, doubled, self.loss_scale))
        return LossScale(scale, jnp.where(overflow | grows, 0, self.good_steps + finite))


def is_overflow(loss_finite: bool, gradient_finite: bool, loss_scale: float) -> bool:
    """Whether an update was skipped for an overflow of the scaled gradient, rather than for divergence."""
    return loss_finite and not gradient_finite and loss_scale > LEAST
