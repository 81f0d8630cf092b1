"""A linear layer that computes in FP8, as an edition means it.

The input is divided by its scale, clamped and rounded to E4M3; the product is of E4M3 numbers; the
result is rescaled. On a GPU with FP8 tensor cores that is ``torch._scaled_mm``. Elsewhere the same
numbers take another way: every E4M3 number is a BF16 number, so decoded weights and rounded inputs
go through PyTorch's BF16 product, which accumulates in float32 like the tensor cores do and applies
the scale there, before it rounds to BF16 once.

With a scale for each block of a weight, and for each group of an input, no product of codes alone can
be rescaled afterwards: both are dequantized and multiplied in float32.
"""

from __future__ import annotations

import copy
import threading
from typing import NamedTuple

import torch
from torch import Tensor, nn

from octavo import fp8, kernels
from octavo.scheme import BLOCK, Inputs

# Elements of a tile of decoded weights: 32 MB of BF16, reused by all layers a thread runs.
_TILE = 1 << 24
_tiles = threading.local()


class Rounded(NamedTuple):
    """An input as FP8 sees it.

    Attributes:
        values: E4M3 numbers, ``[rows, in]``: as ``float8_e4m3fn`` where the product takes that, else
            in the dtype the product is computed in.
        scale: float32, a scalar (static) or ``[rows, 1]`` (dynamic, per token).
    """

    values: Tensor
    scale: Tensor


class Fp8Linear(nn.Module):
    """``y = x Wᵀ + b`` in E4M3.

    Attributes:
        weight: ``float8_e4m3fn`` ``[out, in]``, or the same numbers in the dtype the layer computes in.
        weight_scale: float32, a scalar, ``[out, 1]``, or one for each block.
        input_scale: float32 scalar; absent (None) where inputs are scaled per token as they come.
        bias: the model's dtype, ``[out]``, or None.
        fast_accumulation: whether Hopper's tensor cores may keep sums in fewer bits than float32 has, as the
            engines that serve let them; without, they add to float32 sums every few products, and take longer.
    """

    fast_accumulation = False

    def __init__(self, like: nn.Linear, inputs: Inputs, scale_shape: tuple[int, ...]) -> None:
        """On the meta device, to be filled.

        Args:
            like: the layer it takes the place of.
            inputs: whether they have a scale of their own (``static``).
            scale_shape: of the weight's scale: ``()``, ``[out, 1]``, or that of blocks.
        """
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self._blocks = len(scale_shape) == 2 and scale_shape != (self.out_features, 1)

        def scale(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device="meta")

        self.register_buffer("weight", torch.empty_like(like.weight, dtype=fp8.E4M3, device="meta"))
        self.register_buffer("weight_scale", scale(*scale_shape))
        self.register_buffer("input_scale", scale() if inputs == "static" else None)
        self.register_parameter("bias", like.bias)

    @classmethod
    def of(
        cls, linear: nn.Linear, weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None
    ) -> Fp8Linear:
        """In the place of a linear layer, with its bias and tensors of the attributes' shapes.

        On a CPU codes are decoded now rather than at each call: twice the memory of codes, and faster.
        """
        inputs: Inputs = "dynamic" if input_scale is None else "static"
        made = cls(linear, inputs, tuple(weight_scale.shape))
        made.weight_scale, made.input_scale = weight_scale, input_scale
        made.weight = weight
        if (
            linear.weight.dtype == torch.bfloat16
            and weight.device.type == "cpu"
            and not made._blocks
        ):
            made.weight = fp8.numbers(weight)
        return made

    def with_dynamic_inputs(self) -> Fp8Linear:
        """The same codes and scales of the weight, with inputs scaled per token."""
        other = copy.copy(self)
        other._buffers = {**self._buffers, "input_scale": None}
        return other

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    bias: nn.Parameter | None

    def extra_repr(self) -> str:
        """The shape and how inputs are scaled, as ``print(model)`` shows it."""
        inputs = "dynamic" if self.input_scale is None else "static"
        return f"in_features={self.in_features}, out_features={self.out_features}, inputs={inputs}"

    def forward(self, x: Tensor) -> Tensor:
        """Args: x, any floating dtype, ``[..., in]``. Returns ``[..., out]`` in its dtype."""
        if self._blocks:
            result = self._block_product(x)
        elif _has_tensor_cores(self.weight):
            result = self._scaled_product(_quantize(x, self.input_scale), x.dtype)
        else:
            result = self._tiled_product(_round(x, self.input_scale))
        return result.to(x.dtype).view(*x.shape[:-1], self.out_features)

    @property
    def waits(self) -> bool:
        """Whether a product looks at scales before it goes on, which a GPU has to be waited for then."""
        return not self._blocks and not _has_tensor_cores(self.weight)

    def multiply(self, codes: Tensor) -> Tensor:
        """The product with inputs that are rounded already, of a layer whose inputs have a scale of their own.

        Args:
            codes: ``float8_e4m3fn`` ``[rows, in]``, of inputs divided by ``input_scale``.

        Returns:
            BF16 ``[rows, out]``.
        """
        assert self.input_scale is not None
        if _has_tensor_cores(self.weight):
            return self._scaled_product(Rounded(codes, self.input_scale), torch.bfloat16)
        return self._tiled_product(Rounded(codes.bfloat16(), self.input_scale))

    def rounded_input(self, x: Tensor) -> Tensor:
        """What the layer sees of ``x`` ``[rows, in]``, any floating dtype: float32, on the scale of ``x``."""
        rounded = self.rounded(x)
        return rounded.values.float().mul(rounded.scale)

    def rounded(self, x: Tensor) -> Rounded:
        """``x``, any floating dtype, ``[..., in]``, as rows that the layer sees, in BF16 or float32."""
        if self._blocks:
            return Rounded(_through_groups(x.reshape(-1, self.in_features)), torch.ones(()))
        return _round(x, self.input_scale)

    def _scaled_product(self, x: Rounded, dtype: torch.dtype) -> Tensor:
        row_wise = x.scale.ndim or self.weight_scale.ndim
        scales = (x.scale, self.weight_scale.t())
        if row_wise:
            # The row-wise product wants a scale for each row and each column.
            rows, columns = len(x.values), self.out_features
            scales = (
                scales[0].expand(rows, 1).contiguous(),
                scales[1].expand(1, columns).contiguous(),
            )
        # The row-wise product gives BF16 alone; it takes the bias in the dtype it gives.
        out = torch.bfloat16 if row_wise or dtype == torch.float32 else dtype
        return torch._scaled_mm(
            x.values,
            self.weight.t(),
            *scales,
            bias=None if self.bias is None else self.bias.to(out),
            out_dtype=out,
            use_fast_accum=self.fast_accumulation,
        )

    def _tiled_product(self, x: Rounded) -> Tensor:
        """``[rows, out]``, some output channels at a time."""
        step = max(1, _TILE // self.in_features)
        parts = []
        for start in range(0, self.out_features, step):
            channels = slice(start, start + step)
            weight = _decode(self.weight[channels], x.values.dtype)
            scale = self.weight_scale[channels] if self.weight_scale.ndim else self.weight_scale
            bias = None if self.bias is None else self.bias[channels]
            parts.append(_product(x, weight, scale, bias))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _block_product(self, x: Tensor) -> Tensor:
        """``[rows, out]`` in float32, some output channels at a time."""
        inputs = _through_groups(x.reshape(-1, self.in_features))
        step = max(_TILE // self.in_features // BLOCK, 1) * BLOCK
        parts = []
        for start in range(0, self.out_features, step):
            scale = self.weight_scale[start // BLOCK : -(-(start + step) // BLOCK)]
            weight = fp8.dequantize(self.weight[start : start + step], scale)
            parts.append(inputs @ weight.t())
        product = torch.cat(parts, dim=1)
        return product if self.bias is None else product.add_(self.bias)


def _product(x: Rounded, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """``[rows, channels]``, scaled, in the dtype of ``weight``."""
    if not x.scale.ndim and not weight_scale.ndim:
        # One scale: applied to the float32 accumulators.
        alpha = (x.scale * weight_scale).item()
        added = weight.new_zeros(()) if bias is None else bias.to(weight.dtype)
        return torch.addmm(added, x.values, weight.t(), beta=bias is not None, alpha=alpha)
    # One for each row and column: applied to the product as PyTorch rounds it.
    product = (x.values @ weight.t()).float().mul_(x.scale).mul_(weight_scale.reshape(1, -1))
    if bias is not None:
        product += bias
    return product.to(weight.dtype)


def _decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """E4M3 numbers ``[channels, in]`` in ``dtype``, valid until the thread decodes the next."""
    if dtype != torch.bfloat16 or codes.device.type != "cpu" or codes.dtype == dtype:
        return codes.to(dtype)
    if not hasattr(_tiles, "buffer") or len(_tiles.buffer) < codes.numel():
        _tiles.buffer = torch.empty(codes.numel(), dtype=dtype)
    decoded: Tensor = _tiles.buffer[: codes.numel()]
    kernels.from_e4m3(codes.reshape(-1), decoded)
    return decoded.view(codes.shape)


def _through_groups(rows: Tensor) -> Tensor:
    """``rows`` ``[rows, in]`` in float32, after rounding with a scale for each 128 elements."""
    width = rows.shape[1]
    groups = nn.functional.pad(rows.float(), (0, -width % BLOCK)).view(len(rows), -1, BLOCK)
    scale = fp8.scale_from_amax(groups.abs().amax(dim=-1, keepdim=True))
    codes = (groups / scale).clamp_(-fp8.E4M3_MAX, fp8.E4M3_MAX).to(fp8.E4M3)
    return codes.float().mul_(scale).view(len(rows), -1)[:, :width]


def _scale_of(x: Tensor, static: Tensor | None) -> Tensor:
    if static is not None:
        return static
    return fp8.scale_from_amax(x.abs().amax(dim=-1, keepdim=True).float())


def _quantize(x: Tensor, static: Tensor | None) -> Rounded:
    """``x`` as E4M3 codes."""
    rows = x.reshape(-1, x.shape[-1])
    scale = _scale_of(rows, static)
    limit = fp8.E4M3_MAX
    return Rounded((rows.float() / scale).clamp_(-limit, limit).to(fp8.E4M3), scale)


def _round(x: Tensor, static: Tensor | None) -> Rounded:
    """``x`` rounded to E4M3 numbers, in BF16 if it is BF16 and in float32 otherwise.

    Kept on the tensor: projections that share their input share its rounding too.
    """
    known: dict[float | None, Rounded] = getattr(x, "octavo_rounded", {})
    key = None if static is None else static.item()
    if key not in known:
        if static is not None and x.dtype == torch.bfloat16 and x.device.type == "cpu":
            values = torch.empty(x.shape, dtype=x.dtype).view(-1, x.shape[-1])
            kernels.round_to_e4m3(x.reshape(-1), static.item(), values.view(-1))
            known[key] = Rounded(values, static)
        else:
            codes = _quantize(x, static)
            dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
            known[key] = Rounded(codes.values.to(dtype), codes.scale)
        # An attribute of our own, which the type of a tensor does not list.
        x.octavo_rounded = known  # type: ignore[attr-defined]
    return known[key]


def _has_tensor_cores(weight: Tensor) -> bool:
    """Whether the GPU multiplies FP8 (Ada, Hopper and later) and takes a matrix of this shape."""
    if weight.device.type != "cuda" or any(size % 16 for size in weight.shape):
        return False
    return torch.cuda.get_device_capability(weight.device) >= (8, 9)
