"""What a quantised weight is, whoever quantised it: codes, scales, zeros, and the rule's name.

    codes = Codes("rtn-w4-g128-sym-absmax", 4, q, scales)   # q int8 [N, K], scales [N, K / 128]
    weight = codes.dequantise(torch.bfloat16)               # [N, K]

A rule (quantisation/rules.py) makes them from a weight, a format's reader from a file; a linear
layer keeps them packed (quantisation/linear.py). A block of several rows has its scale repeated
once a row, a whole row is one group, a whole tensor is one group a row: so one form holds all.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Codes:
    """w[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g], with g = groups[k] or k // (K / G).

    codes: int8, uint8 or float8_e4m3fn [N, K], one value an element; scales: floating [N, G] in
    the dtype of their file or rule; zeros: [N, G] integer or floating, None for none; groups: int
    [K], the group of each column where they do not lie in order (GPTQ's act-order), else None.
    added: zeros are minima instead, added once the code is scaled, as GGUF has them. `bits` is what
    a code costs in a file, and `rule` says how they were made.
    """

    rule: str
    bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    added: bool = False

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def _of_columns(self, values: torch.Tensor) -> torch.Tensor:
        """[N, G] -> [N, K]"""
        if self.groups is not None:
            return values[:, self.groups]
        return values.repeat_interleave(self.group_size, dim=1)

    def to(self, device: torch.device | str) -> "Codes":
        """The same on a device."""
        names = "codes", "scales", "zeros", "groups"
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{n: t.to(device) for n, t in tensors.items() if t is not None})

    def rows(self, order: torch.Tensor) -> "Codes":
        """Those rows, in that order."""
        codes = self.codes.view(torch.uint8)[order].view(self.codes.dtype)
        zeros = None if self.zeros is None else self.zeros[order]
        return replace(self, codes=codes, scales=self.scales[order], zeros=zeros)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[N, K], computed in float32 and rounded once."""
        weight = self.codes.float()
        zeros = None if self.zeros is None else self._of_columns(self.zeros.float())
        if zeros is not None and not self.added:
            weight = weight - zeros
        weight = weight * self._of_columns(self.scales.float())
        return (weight + zeros if zeros is not None and self.added else weight).to(dtype)
