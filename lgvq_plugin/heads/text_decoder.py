"""TextDecoder: fill the masked words of a caption from the image's codes (paper section 3.3).

masked text -> self-attention -> cross-attention to code-ViT tokens -> FFN -> vocabulary

Shape and first weights are those of the released code: no positions but those in the guide's
features and in the masked words' vectors, no dropout inside the attention.
"""

import torch
from torch import Tensor, nn

from ._width import check_heads


class TextDecoder(nn.Module):
    """Predict masked words; the output matrix is the guide's own token embedding, frozen.

    Args:
        width: Dt, of the text features and the vocabulary.
        memory_dim: D, of the code-ViT's tokens.
        vocabulary_size: V.
        max_length: T, longest caption in tokens.
        depth, heads, dropout: of the decoder (2, 1 and 0.1 in the released code); the heads must
            divide the width.

    Raises:
        ConfigError: if they do not.

    Example:
        >>> decoder = TextDecoder(8, memory_dim=6, vocabulary_size=11, max_length=5)
        >>> text, memory = torch.zeros(2, 5, 8), torch.zeros(2, 4, 6)
        >>> mask = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 1, 1, 0]]).bool()
        >>> decoder(text, mask, memory, torch.zeros(11, 8)).shape
        torch.Size([3, 11])
    """

    def __init__(
        self,
        width: int,
        *,
        memory_dim: int,
        vocabulary_size: int,
        max_length: int = 30,
        depth: int = 2,
        heads: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(width, heads, of="text decoder")
        # One learned vector a position stands for a masked word; position-specific in the paper.
        self.mask_tokens = nn.Parameter(torch.empty(1, max_length, width).normal_(std=0.01))
        self.enter = nn.Identity() if memory_dim == width else nn.Linear(memory_dim, width)
        self.blocks = nn.ModuleList(_block(width, heads, dropout=dropout) for _ in range(depth))
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(
        self,
        text: Tensor,
        mask: Tensor,
        memory: Tensor,
        vocabulary: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the logits of the M masked positions only, (M, V), in row-major order.

        Args:
            text: token features, (B, T, Dt); those under the mask are never read.
            mask: True at masked tokens, (B, T) bool.
            memory: code-ViT tokens, (B, N, D).
            vocabulary: the guide's token embedding, (V, Dt); detached.
            attention_mask: True at real tokens, (B, T) bool; None attends to padding too, as the
                released code does. A row without a real token attends to all of it: attention
                over nothing is no number.

        Raises:
            ValueError: for captions longer than `max_length`.
        """
        length, longest = text.shape[1], self.mask_tokens.shape[1]
        if length > longest:
            raise ValueError(f"captions of {length} tokens, but max_length is {longest}")
        hidden = torch.where(mask[..., None], self.mask_tokens[:, :length].to(text.dtype), text)
        padding = None
        if attention_mask is not None:
            padding = ~attention_mask & attention_mask.any(dim=1, keepdim=True)
        memory = self.enter(memory)
        for block in self.blocks:
            hidden = block(hidden, memory, tgt_key_padding_mask=padding)
        hidden = self.head(hidden[mask])
        return hidden @ vocabulary.detach().to(hidden.dtype).mT + self.bias


def _block(width: int, heads: int, *, dropout: float) -> nn.TransformerDecoderLayer:
    block = nn.TransformerDecoderLayer(
        width, heads, width, dropout=dropout, layer_norm_eps=1e-12, batch_first=True
    )
    for attention in (block.self_attn, block.multihead_attn):
        attention.dropout = 0.0
        nn.init.normal_(attention.in_proj_weight, std=width**-0.5)
        nn.init.normal_(attention.out_proj.weight, std=width**-0.5)
    for linear in (block.linear1, block.linear2):
        nn.init.normal_(linear.weight, std=width**-0.5)
    return block
