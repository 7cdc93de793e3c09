"""What a loss is, and what a reweighting strategy: settings that say what a token costs, and how much a sample's loss
makes it count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

from torch import Tensor

from data_pipeline.settings import Settings


class LossSettings(Settings):
    """Base of the losses; each lives in a module of ``pretrain.objective.losses`` of its own."""

    kind: str
    """Which loss."""
    is_likelihood: ClassVar[bool] = False
    """Whether it is −log p of the label, p the softmax of the logits."""
    from_moments: ClassVar[bool] = False
    """Whether in training it takes the label's logit, and mean and variance of all, in place of the logits
    (:func:`pretrain.model.linear.head.logit_moments`)."""

    def of_tokens(self, output: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
        """The loss of every token.

        Args:
            output: of the model in training: logits [b, T, V], or [b, T, 3] with ``from_moments``.
            labels: [b, T] int64; where the mask is off any valid index.
            loss_mask: [b, T] bool.

        Returns:
            [b, T], at least fp32; 0 where the mask is off.
        """
        raise NotImplementedError

    def measures(self) -> Mapping[str, Callable[[Tensor, Tensor], Tensor]]:
        """What an evaluation tells of a loss that is no likelihood: a name to a function of logits [b, T, V] and labels
        [b, T] whose values [b, T] are averaged over the tokens. ``loss`` is the loss itself. None for a likelihood."""
        return {}


class StrategySettings(Settings):
    """Base of the strategies; each lives in a module of ``pretrain.objective.strategies`` of its own.

    A strategy of the paper's kind gives a score of where a loss lies in the range of its group (:meth:`score`). One of
    another kind gives the importances themselves (:meth:`log_importances`), which are then normalised alike.
    """

    kind: str
    """Which strategy."""
    has_temperature: ClassVar[bool] = True
    """Whether ``temperature`` has a meaning for it; where it has none, giving one is refused."""
    has_range: ClassVar[bool] = True
    """Whether the importance of a loss depends on the range of its group; where it does not, one pass over the global
    batch needs nothing of the step before, and is exact from the first step on."""

    @property
    def weighs_tokens(self) -> bool:
        """Each token has an importance of its own, by its own loss: :meth:`log_importances` is given losses of tokens.
        A sequence's importance is then the mean of its tokens', among which its weight is shared in proportion. Only
        without a range."""
        return False

    @property
    def neutral(self) -> bool:
        """Every sample counts the same: nothing is computed, and a loss that is not finite stops the run."""
        return False

    def score(self, h: Tensor) -> Tensor:
        """The score s in [0, 1] of losses at ``h`` in their range: -1 is its lower end, 1 its upper end. Same shape."""
        raise NotImplementedError

    def log_importances(self, losses: Tensor, lowest: Tensor, highest: Tensor, temperature: float) -> Tensor:
        """The logarithms of the samples' importances, up to a constant of the step; here s / r (Sow et al., eq. in
        section 3)::

            h = (2 l - (highest + lowest)) / max(highest - lowest, 1e-6)

        Losses outside the range, which there are only where it is another step's, count as its nearer end.

        Args:
            losses: float64, nats, of any shape: means over each sequence's labels, or of tokens; not finite for samples
                whose result is unused.
            lowest, highest: scalars, the range of the finite losses; without meaning where there is no range.
            temperature: r; without meaning where there is none.

        Returns:
            float64, of the shape of ``losses``; the larger, the more a sample counts. Finite where the loss is.
        """
        # the difference first: for nearly equal losses two quotients of the size of 1e6 would cancel
        h = (2.0 * losses - (highest + lowest)) / (highest - lowest).clamp(min=1e-6)
        return self.score(h.clamp(-1.0, 1.0)) / temperature


class ProbabilitySettings(StrategySettings):
    """Base of the strategies that weigh by p = exp(-loss) alone: without a range, and without a temperature."""

    of: Literal["sequence", "token"] = "sequence"
    """Whose p. ``sequence``: of the mean loss, so that p is the geometric mean of its tokens' probabilities and they
    all weigh the same. ``token``: each token's own; a sequence then weighs the mean of its tokens."""
    has_temperature: ClassVar[bool] = False
    has_range: ClassVar[bool] = False

    @property
    def weighs_tokens(self) -> bool:
        return self.of == "token"
