"""`attention` in transformers: ``attn_implementation="mha_fast"``.

>>> import mha_fast.transformers
>>> from transformers import AutoModelForCausalLM, LlamaConfig
>>> config = LlamaConfig(num_hidden_layers=1, hidden_size=16, intermediate_size=16, vocab_size=8,
...                      num_attention_heads=2)
>>> name = mha_fast.transformers.register()
>>> model = AutoModelForCausalLM.from_config(config, attn_implementation=name)
>>> model(model.dummy_inputs["input_ids"] % 8).logits.shape
torch.Size([3, 5, 8])

It needs ``pip install "mha_fast[transformers]"``; ``import mha_fast`` does not load it.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from .attend import attend
from .cache import cache
from .mask import mask

__all__ = ["cache", "register"]

NAME = "mha_fast"


def register():
    """Give transformers' models the name of our attention.

    Returns
    -------
    str
        ``"mha_fast"``, for `attn_implementation` of ``from_pretrained`` and ``from_config`` and for
        ``model.set_attn_implementation``. To call it again changes nothing.

    Notes
    -----
    It names two functions, by transformers' interfaces for that: attention, and what makes masks,
    which describes causal order, windows and padding without a matrix of queries and keys. Models
    run on CPUs; tensors elsewhere, paged caches and sparse attention raise NotImplementedError.

    Examples
    --------
    >>> register()
    'mha_fast'
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    return NAME
