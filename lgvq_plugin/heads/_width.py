"""Whether attention heads fit a width."""

from ..sockets import ConfigError


def check_heads(width: int, heads: int, *, of: str) -> None:
    """Refuse heads that do not share out the width.

    Raises:
        ConfigError: naming the numbers of heads that do.

    Example:
        >>> check_heads(8, 3, of="code-ViT")
        Traceback (most recent call last):
        lgvq_plugin.sockets.ConfigError: heads of the code-ViT: 3 does not divide its width 8; ...
    """
    if heads < 1 or width % heads:
        fitting = ", ".join(str(n) for n in range(1, min(width, 16) + 1) if width % n == 0)
        raise ConfigError(
            f"heads of the {of}: {heads} does not divide its width {width}; take one of {fitting}"
        )
