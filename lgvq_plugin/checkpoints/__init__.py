"""Old weights and new ones: safe reading, retrofit, export."""

from pathlib import Path

from ..sockets import ConfigError

FILES = (
    *("checkpoints/last.ckpt", "model.safetensors", "last.ckpt"),
    "diffusion_pytorch_model.safetensors",  # diffusers' save_pretrained
)


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint file at `path`: itself, or that of a run or a saved folder.

    The file is not opened, so that a mistyped path is reported before torch is imported. Raises
    ConfigError if there is none.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix in (".yaml", ".yml"):
            raise ConfigError(f"{str(path)!r} is a config, not a checkpoint; give it with -b")
        return path
    if not path.is_dir():
        raise ConfigError(f"no checkpoint {str(path)!r}")
    steps = sorted((*path.glob("checkpoints/*.ckpt"), *path.glob("*.ckpt")))
    found = [path / name for name in FILES if (path / name).is_file()] or steps[-1:]
    if not found:
        sought = "no checkpoints/last.ckpt, no model.safetensors"
        raise ConfigError(f"folder {str(path)!r} has no checkpoint: {sought}")
    return found[0]
