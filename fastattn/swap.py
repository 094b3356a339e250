"""Put fastattn's kernels under an existing model."""

from __future__ import annotations

from torch import nn

from fastattn.modules import MultiHeadAttention, adopt, check_swappable


def swap_attention(model: nn.Module) -> int:
    """Turn every :class:`torch.nn.MultiheadAttention` in ``model``, itself included, into a ``MultiHeadAttention``.

    In place: each module stays the same object, with its parameters, hooks, training mode, and whatever refers to it
    (parents, tied modules, optimizers). State dicts keep their keys. ``nn.TransformerEncoderLayer``'s eval-mode fast
    path, which reads the weights past ``forward``, is no longer taken, and ``nn.TransformerEncoder`` no longer converts
    padded batches to NestedTensor (``use_nested_tensor`` is set to False): both would go round fastattn.

    Args:
        model: any module.

    Returns:
        How many modules were changed; those that are a ``MultiHeadAttention`` already are not counted.

    Raises:
        TypeError: ``model`` is no module; or a subclass of ``nn.MultiheadAttention`` defines more than a constructor
            (quantizable, parametrized, another ``forward``), which the swap would lose. The message names it; nothing
            has been changed then.

    Example::

        >>> model = torch.nn.Transformer(512, 8, batch_first=True)
        >>> fastattn.swap_attention(model)  # 6 encoder layers, 6 decoder layers with two each
        18
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and not isinstance(module, MultiHeadAttention)
    ]
    for name, module in found:
        try:
            check_swappable(module)
        except TypeError as error:
            raise TypeError(f"{name or 'model'}: {error}") from None
    for _, module in found:
        adopt(module)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(
            isinstance(module, MultiHeadAttention) for module in encoder.modules()
        ):
            encoder.use_nested_tensor = False
    return len(found)
