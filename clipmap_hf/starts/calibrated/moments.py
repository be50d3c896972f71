"""Sums over tokens, from which linear layers are solved; their size does not depend on the number of tokens."""

from __future__ import annotations

import torch

from clipmap_hf.distributed import sum_over_processes


__all__ = ["Moments", "with_constant"]


class Moments:
    """
    Weighted first and second moments of inputs and targets, in fp64.

    Args:
        inputs: Width of the inputs.
        targets: Width of the targets.
        diagonal: Keep the inputs' variances only, not their covariances: all that is asked of many inputs.
        device: Where the sums lie.
    """

    def __init__(self, inputs: int, targets: int = 0, *, diagonal: bool = False, device: torch.device | str = "cpu"):
        self.diagonal = diagonal
        options = {"dtype": torch.float64, "device": device}
        self.weight, self.input, self.target = (torch.zeros(size, **options) for size in ((), inputs, targets))
        self.input_input = torch.zeros(inputs if diagonal else (inputs, inputs), **options)
        self.input_target = torch.zeros(inputs, targets, **options)

    def add(
        self, inputs: torch.Tensor, targets: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> None:
        """
        Adds tokens.

        Args:
            inputs: `(tokens, inputs)`.
            targets: `(tokens, targets)`; none, if only the inputs' moments are asked.
            weights: How much each token counts, `(tokens,)`; 1 by default.
        """
        inputs = inputs.double()
        targets = inputs.new_zeros(len(inputs), len(self.target)) if targets is None else targets.double()
        weights = inputs.new_ones(len(inputs)) if weights is None else weights.double()
        weighted = inputs * weights[:, None]
        self.weight += weights.sum()
        self.input += weighted.sum(dim=0)
        self.target += weights @ targets
        self.input_input += (weighted * inputs).sum(dim=0) if self.diagonal else weighted.T @ inputs
        self.input_target += weighted.T @ targets

    def read_by(self, weight: torch.Tensor) -> Moments:
        """
        The moments of the same inputs, with what a linear layer computes of them as targets, turned so that there are
        no more targets than inputs.

        Args:
            weight: `(outputs, inputs)`.
        """
        weight = torch.linalg.qr(weight.double(), mode="r").R
        found = Moments(len(self.input), len(weight), device=weight.device)
        found.weight, found.input, found.input_input = self.weight, self.input, self.input_input
        found.target, found.input_target = weight @ self.input, self.input_input @ weight.T
        return found

    def sum_over_processes(self) -> None:
        """Adds the sums of all processes."""
        sum_over_processes([self.weight, self.input, self.target, self.input_input, self.input_target])

    @property
    def mean(self) -> torch.Tensor:
        """The inputs' mean, `(inputs,)`."""
        return self.input / self.weight

    @property
    def second_moment(self) -> torch.Tensor:
        """The inputs' second moment, `(inputs, inputs)`; the mean is not subtracted."""
        return self.input_input / self.weight

    @property
    def covariance(self) -> torch.Tensor:
        """The inputs' covariance, `(inputs, inputs)`."""
        return self.second_moment - torch.outer(self.mean, self.mean)

    @property
    def variance(self) -> torch.Tensor:
        """The inputs' variance, `(inputs,)`."""
        squares = self.input_input if self.diagonal else self.input_input.diagonal()
        return squares / self.weight - self.mean**2

    @property
    def cross_covariance(self) -> torch.Tensor:
        """The covariance of inputs and targets, `(inputs, targets)`."""
        return self.input_target / self.weight - torch.outer(self.mean, self.target / self.weight)

    @property
    def with_constant(self) -> torch.Tensor:
        """The second moment of the inputs with a 1 behind them, `(inputs + 1, inputs + 1)`."""
        return with_constant(self.second_moment, self.mean)

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The linear layer that gives the targets from the inputs with the least squared error.

        Args:
            ridge: Penalty of the squared weights, relative to the mean variance of the inputs.

        Returns:
            Its weight `(targets, inputs)` and bias `(targets,)`, in fp32.

        Raises:
            ValueError: If no token was added, or the inputs do not vary.
        """
        if not self.weight > 0:
            raise ValueError("There are no tokens to solve a layer from.")
        mean, target = self.mean, self.target / self.weight
        covariance = self.covariance
        variance = covariance.diagonal().mean()
        if not variance > 0:
            raise ValueError(
                "The inputs of a layer are the same for all tokens; calibrate with more pairs, of different texts."
            )
        damped = covariance + ridge * variance * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        weight = torch.linalg.solve(damped, self.cross_covariance).T
        return weight.float(), (target - weight @ mean).float()


def with_constant(second_moment: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """The second moment of vectors with a 1 behind them, from the second moment and the mean of the vectors."""
    last = torch.cat([mean, torch.ones_like(mean[:1])])
    return torch.cat([torch.cat([second_moment, mean[:, None]], dim=1), last[None]])
