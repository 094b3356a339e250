"""``MultiHeadAttention``: :class:`torch.nn.MultiheadAttention` on fastattn's kernels."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import Parameter

from fastattn.call import draw_dropout_seed
from fastattn.functional import attention
from fastattn.kv_cache import KVCache
from fastattn.masks import expand_attn_mask, expand_padding_mask, hidden_by_window, merge_masks, pad_keys
from fastattn.module_inputs import attend_nested, attend_to_cache
from fastattn.nested import is_nested
from fastattn.spec import Window, check_window
from fastattn.validate import check_flag
from fastattn.weights import attention_weights


class MultiHeadAttention(nn.MultiheadAttention):
    """A swap-in for :class:`torch.nn.MultiheadAttention`, with grouped key heads and without its traps.

    Constructor, ``forward``, state dict, initial values (the same numbers from the same seed) and results are torch's.
    With ``N`` the batch, ``L`` the queries, ``S`` the keys, ``E = embed_dim``, ``H = num_heads``,
    ``D = head_dim = E / H`` and ``E_kv = num_kv_heads * D``, the parameters are

    ==================  =================  =======================================================
    ``in_proj_weight``  (E + 2 E_kv, E)    rows of query, key, value; when kdim = vdim = E
    ``q_proj_weight``   (E, E)             these three in its place when kdim or vdim differs from E
    ``k_proj_weight``   (E_kv, kdim)
    ``v_proj_weight``   (E_kv, vdim)
    ``in_proj_bias``    (E + 2 E_kv)       when ``bias``
    ``out_proj``        Linear(E, E)
    ``bias_k, bias_v``  (1, 1, E_kv)       when ``add_bias_kv``
    ==================  =================  =======================================================

    so that with ``num_kv_heads == num_heads`` state dicts load both ways. Where it differs from torch:

    - The output comes from a fused kernel in every mode. ``need_weights=True`` (torch's default) computes the weights
      a second time from the log-sum-exp; they are differentiable.
    - ``is_causal=True`` needs no ``attn_mask``: it then hides keys ``j > i``. With an ``attn_mask``, ``is_causal`` is
      what it is in torch, a hint that the mask is causal; the mask is applied as it stands, the hint has no effect.
    - A query that may attend to nothing gets attention 0 (so the output is ``out_proj.bias``) and weights 0, never NaN.
    - ``attn_mask`` may be 4-D, broadcastable to ``(N, H, L, S)``; one mask may be boolean and the other additive.
    - ``_qkv_same_embed_dim`` is always False. torch's own fast paths (``nn.TransformerEncoderLayer`` in eval mode, and
      ``nn.TransformerEncoder`` when it is built) read it as "the weights may be used without calling ``forward``".
    - Bad arguments raise ``ValueError`` or ``TypeError``.
    - NestedTensors are taken in jagged layout, ``(N, seq*, E)`` with ``batch_first``, without masks and weights, and
      with gradients; in torch's older strided layout they are refused.

    Args:
        embed_dim: features of query and output.
        num_heads: query heads; divides ``embed_dim``.
        dropout: probability of dropping an attention weight in training, in [0, 1].
        bias: whether the projections have a bias.
        add_bias_kv: append a learned key and value, visible to every query.
        add_zero_attn: append a key and value of zeros, visible to every query.
        kdim, vdim: features of key and value; None: ``embed_dim``.
        batch_first: inputs and output are ``(N, seq, E)`` instead of ``(seq, N, E)``.
        device, dtype: of the parameters.
        num_kv_heads: key and value heads (keyword only); divides ``num_heads``, query head ``h`` reads key head
            ``h // (num_heads // num_kv_heads)``. None: ``num_heads``.

    Example::

        >>> mha = fastattn.MultiHeadAttention(512, 8, num_kv_heads=2, batch_first=True)
        >>> x = torch.randn(4, 100, 512)
        >>> out, _ = mha(x, x, x, need_weights=False, is_causal=True)
    """

    head_dim: int
    num_kv_heads: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_constructor(embed_dim, num_heads, num_kv_heads, dropout, kdim, vdim)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be None or a floating-point torch.dtype, got {dtype}")
        # Not nn.MultiheadAttention's: it knows no num_kv_heads.
        nn.Module.__init__(self)
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn
        self._qkv_same_embed_dim = False

        def parameter(*shape: int, when: bool = True) -> Parameter | None:
            return Parameter(torch.empty(shape, device=device, dtype=dtype)) if when else None

        packed = self.kdim == self.vdim == embed_dim
        kv_dim = num_kv_heads * self.head_dim
        self.register_parameter("in_proj_weight", parameter(embed_dim + 2 * kv_dim, embed_dim, when=packed))
        self.register_parameter("q_proj_weight", parameter(embed_dim, embed_dim, when=not packed))
        self.register_parameter("k_proj_weight", parameter(kv_dim, self.kdim, when=not packed))
        self.register_parameter("v_proj_weight", parameter(kv_dim, self.vdim, when=not packed))
        self.register_parameter("in_proj_bias", parameter(embed_dim + 2 * kv_dim, when=bias))
        self.out_proj = NonDynamicallyQuantizableLinear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.register_parameter("bias_k", parameter(1, 1, kv_dim, when=add_bias_kv))
        self.register_parameter("bias_v", parameter(1, 1, kv_dim, when=add_bias_kv))
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for row in (self.bias_k, self.bias_v):
            if row is not None:
                nn.init.xavier_normal_(row)

    @staticmethod
    def from_torch(module: nn.MultiheadAttention) -> MultiHeadAttention:
        """A :class:`MultiHeadAttention` that shares the parameters of ``module``: training one trains the other.

        Training mode, hooks and ``requires_grad`` are taken over. To change a whole model, see
        :func:`fastattn.swap_attention`.

        Raises:
            TypeError: ``module`` is no ``nn.MultiheadAttention``, or of a subclass that defines more than a
                constructor (quantizable, parametrized, another ``forward``): that behaviour would be lost.
        """
        check_swappable(module)
        new = copy.copy(module)
        for name, value in vars(module).items():
            if isinstance(value, (dict, set)):  # of parameters, buffers, submodules, hooks: the contents are shared
                new.__dict__[name] = copy.copy(value)
        return adopt(new)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        window: Window | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``.

        Args:
            query: ``(N, L, E)`` if ``batch_first`` else ``(L, N, E)``; unbatched ``(L, E)``.
            key: ``(N, S, kdim)``, ``(S, N, kdim)`` or ``(S, kdim)``.
            value: ``(N, S, vdim)``, ``(S, N, vdim)`` or ``(S, vdim)``.
            key_padding_mask: ``(N, S)``, unbatched ``(S)``. Boolean: True is masked out; floating: added to the scores.
            need_weights: also return the attention weights. Costs O(L S) memory; the output is the same kernel's.
            attn_mask: ``(L, S)``, ``(N * H, L, S)`` or broadcastable to ``(N, H, L, S)``; boolean or floating as above.
            average_attn_weights: average the returned weights over the heads.
            is_causal: without ``attn_mask``: query i sees keys ``j <= i``. With one: no effect, the mask is applied.
            window: ``(left, right)``: query i sees keys ``i - left <= j <= i + right`` only; None: unbounded.
                With ``cache``, aligned to the last key.
            cache: :class:`fastattn.KVCache` or :class:`fastattn.PagedKVCache` of this layer (``num_kv_heads`` heads):
                the new keys and values are appended to it, unless key and value are None, and queries see all that it
                holds, causally with ``is_causal``. For inference, without ``attn_mask`` and weights; a boolean
                ``key_padding_mask`` has an entry for each key held, the new ones included.

        Returns:
            ``(out, weights)``: ``out`` of the shape of ``query``; ``weights`` None unless ``need_weights``, else
            ``(N, L, S')`` averaged or ``(N, H, L, S')``, without ``N`` when unbatched, after dropout. ``S'`` is ``S``
            plus one each for ``add_bias_kv`` and ``add_zero_attn``.

        Raises:
            ValueError, TypeError: shapes, types or devices do not fit; the message names the argument.
            NotImplementedError: an input is a NestedTensor in strided layout.
        """
        check_window(window)
        check_flag("is_causal", is_causal)
        unmasked = key_padding_mask is None and attn_mask is None and not need_weights
        if is_nested(query, key, value):
            return attend_nested(self, query, key, value, unmasked, is_causal, window), None
        if cache is not None:
            if attn_mask is not None or need_weights:
                raise ValueError("with a cache there is no attn_mask, and need_weights must be False")
            if key is not None or value is not None:
                self._check_inputs(query, key, value)
            return attend_to_cache(self, query, key, value, cache, key_padding_mask, is_causal, window), None
        self._check_inputs(query, key, value)
        assert key is not None and value is not None
        batched = query.dim() == 3
        if not batched:
            query, key, value = self._add_batch(query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)

        q, k, v = self._project(query, key, value)
        batch, _, seqlen_q, _ = q.shape
        shape = (batch, self.num_heads, seqlen_q, k.shape[2])
        masks = [
            expand_padding_mask(key_padding_mask, shape, q),
            expand_attn_mask(attn_mask, shape, q),
        ]
        causal = is_causal and attn_mask is None
        k, v, appended = self._append_keys(k, v)
        if appended:
            masks = [pad_keys(mask, shape[3], appended) for mask in masks]
            if causal or window is not None:  # no diagonal leaves the appended keys visible to every query
                masks.append(hidden_by_window(seqlen_q, shape[3], appended, causal, window, q.device))
                causal, window = False, None
        mask, bias = merge_masks(masks)
        dropout_p = float(self.dropout) if self.training else 0.0
        call: dict[str, Any] = {
            "mask": mask,
            "bias": bias,
            "causal": causal,
            "window": window,
            "offset": 0,
            "dropout_p": dropout_p,
            "dropout_seed": draw_dropout_seed(q.device) if dropout_p else None,
        }
        out, lse = attention(q, k, v, return_lse=True, **call)
        out = self._merge(out)
        out = out if batched else out.squeeze(0 if self.batch_first else 1)
        if not need_weights:
            return out, None
        weights = attention_weights(q, k, lse, average_heads=average_attn_weights, **call)
        return out, weights if batched else weights.squeeze(0)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Batched inputs to ``q (N, H, L, D)``, ``k, v (N, H_kv, S, D)``: views of as few products as possible."""
        if self.in_proj_weight is not None and query is key and key is value:
            proj = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            kv_dim = self.num_kv_heads * self.head_dim
            q, k, v = proj.split([self.embed_dim, kv_dim, kv_dim], dim=-1)
            return self._split_heads(q), self._split_heads(k), self._split_heads(v)
        return self._project_query(query), *self._project_key_value(key, value)

    def _project_query(self, query: Tensor) -> Tensor:
        """``(N, L, E)`` or ``(L, N, E)`` to ``q (N, H, L, D)``."""
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight[: self.embed_dim]
        bias = None if self.in_proj_bias is None else self.in_proj_bias[: self.embed_dim]
        return self._split_heads(F.linear(query, weight, bias))

    def _project_key_value(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, S, kdim), (N, S, vdim)`` (or sequence first) to ``k, v (N, H_kv, S, D)``."""
        kv_dim = self.num_kv_heads * self.head_dim
        bias = None if self.in_proj_bias is None else self.in_proj_bias[self.embed_dim :]
        if self.in_proj_weight is not None and key is value:
            k, v = F.linear(key, self.in_proj_weight[self.embed_dim :], bias).split(kv_dim, dim=-1)
            return self._split_heads(k), self._split_heads(v)
        if self.in_proj_weight is None:
            weight_k, weight_v = self.k_proj_weight, self.v_proj_weight
        else:
            weight_k, weight_v = self.in_proj_weight[self.embed_dim :].split(kv_dim)
        bias_k, bias_v = (None, None) if bias is None else bias.split(kv_dim)
        return self._split_heads(F.linear(key, weight_k, bias_k)), self._split_heads(F.linear(value, weight_v, bias_v))

    def _split_heads(self, x: Tensor) -> Tensor:
        """``(N, seq, heads * D)`` or ``(seq, N, heads * D)`` to a view ``(N, heads, seq, D)``."""
        x = x.unflatten(-1, (-1, self.head_dim))
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merge(self, out: Tensor) -> Tensor:
        """``(N, H, L, D)`` through the output projection to ``(N, L, E)`` or ``(L, N, E)``."""
        out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        return self.out_proj(out.flatten(2))

    def _append_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Append ``bias_k``/``bias_v`` and the zero row to ``k, v``; the number of rows appended."""
        ks, vs = [k], [v]
        one = (k.shape[0], self.num_kv_heads, 1, self.head_dim)
        if self.bias_k is not None and self.bias_v is not None:
            for rows, row in ((ks, self.bias_k), (vs, self.bias_v)):
                rows.append(row.to(k.dtype).view(1, self.num_kv_heads, 1, self.head_dim).expand(one))
        if self.add_zero_attn:
            ks.append(k.new_zeros(one))
            vs.append(v.new_zeros(one))
        if len(ks) == 1:
            return k, v, 0
        return torch.cat(ks, dim=2), torch.cat(vs, dim=2), len(ks) - 1

    def _add_batch(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give unbatched inputs a batch of one; inputs that are one tensor stay one tensor."""
        dim = 0 if self.batch_first else 1
        q = query.unsqueeze(dim)
        k = q if key is query else key.unsqueeze(dim)
        v = k if value is key else value.unsqueeze(dim)
        return q, k, v

    def _check_inputs(self, query: Tensor, key: Any, value: Any) -> None:
        inputs = (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim))
        for name, x, dim in inputs:
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
            if x.layout is not torch.strided:
                raise TypeError(f"{name} must be a dense (strided) tensor, got layout {x.layout}")
            if x.dim() not in (2, 3) or x.dim() != query.dim():
                raise ValueError(
                    "query, key and value must all be 3-D (batched) or all 2-D (unbatched); got shapes "
                    f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
                )
            if x.shape[-1] != dim:
                raise ValueError(f"{name} must have {dim} features in its last dimension, got shape {tuple(x.shape)}")
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        if not (query.dtype == key.dtype == value.dtype == weight.dtype) and not torch.is_autocast_enabled(
            query.device.type
        ):
            raise TypeError(
                f"query, key and value must have the parameters' dtype {weight.dtype} outside autocast; got "
                f"query {query.dtype}, key {key.dtype}, value {value.dtype}"
            )
        if not query.device == key.device == value.device == weight.device:
            raise ValueError(
                f"query, key and value must be on the parameters' device {weight.device}; got query {query.device}, "
                f"key {key.device}, value {value.device}"
            )
        batch = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1] or (query.dim() == 3 and query.shape[batch] != key.shape[batch]):
            order = "(batch, seq, features)" if self.batch_first else "(seq, batch, features)"
            raise ValueError(
                f"key and value must have one length, and all three one batch, in {order} order; got shapes "
                f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
            )

    def extra_repr(self) -> str:
        parts = [f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"]
        if self.num_kv_heads != self.num_heads:
            parts.append(f"num_kv_heads={self.num_kv_heads}")
        if self.kdim != self.embed_dim or self.vdim != self.embed_dim:
            parts.append(f"kdim={self.kdim}, vdim={self.vdim}")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        if self.in_proj_bias is None:
            parts.append("bias=False")
        if self.bias_k is not None:
            parts.append("add_bias_kv=True")
        if self.add_zero_attn:
            parts.append("add_zero_attn=True")
        return ", ".join([*parts, f"batch_first={self.batch_first}"])


def check_swappable(module: nn.Module) -> None:
    """Raise ``TypeError`` unless ``module`` is an ``nn.MultiheadAttention`` whose behaviour is torch's."""
    if not isinstance(module, nn.MultiheadAttention):
        raise TypeError(f"module must be a torch.nn.MultiheadAttention, got {type(module).__name__}")
    cls = type(module)
    own = cls.__mro__[: cls.__mro__.index(nn.MultiheadAttention)]
    defined = sorted({name for c in own for name in vars(c) if not name.startswith("__")})
    if defined and not isinstance(module, MultiHeadAttention):
        raise TypeError(
            f"cannot swap a {cls.__module__}.{cls.__qualname__}: it defines {', '.join(defined)}, which would be lost; "
            "only torch.nn.MultiheadAttention, or a subclass that adds a constructor alone, is accepted"
        )


def adopt(module: nn.MultiheadAttention) -> MultiHeadAttention:
    """Turn ``module`` itself into a :class:`MultiHeadAttention`: its parameters, hooks and identity are kept."""
    if not isinstance(module, MultiHeadAttention):
        module.__class__ = MultiHeadAttention
        module.num_kv_heads = module.num_heads
        module._qkv_same_embed_dim = False
    assert isinstance(module, MultiHeadAttention)
    return module


def _check_constructor(
    embed_dim: int, num_heads: int, num_kv_heads: int, dropout: float, kdim: int | None, vdim: int | None
) -> None:
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    sizes |= {name: size for name, size in (("kdim", kdim), ("vdim", vdim)) if size is not None}
    for name, size in sizes.items():
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if size <= 0:
            raise ValueError(f"{name} must be greater than 0, got {size}")
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim must be divisible by num_heads, got embed_dim={embed_dim}, num_heads={num_heads}")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be divisible by num_kv_heads, got num_heads={num_heads}, num_kv_heads={num_kv_heads}"
        )
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(f"dropout must be a float, got {dropout!r}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")
