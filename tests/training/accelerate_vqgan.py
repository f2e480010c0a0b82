"""A plain VQGAN training script: accelerate, diffusers' VQModel, a small critic. No LG-VQ in here.

    accelerate launch accelerate_vqgan.py
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 accelerate_vqgan.py

README shows what LG-VQ changes in it, and test_accelerate.py runs both.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import VQModel
from torch import nn

COLORS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1)}


class Squares(torch.utils.data.Dataset):
    """A square of some color and place on black, with its caption."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        name = [*COLORS][index % 4]
        image, x, y = -torch.ones(3, 16, 16), index // 4 % 4 * 3, index // 16 * 3
        image[:, y : y + 6, x : x + 6] = torch.tensor(COLORS[name])[:, None, None].float()
        return {"image": image, "caption": f"a {name} square"}


def main(steps=16):
    set_seed(0)
    accelerator = Accelerator()
    model = VQModel(
        block_out_channels=(32,) * 2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        num_vq_embeddings=32,
        vq_embed_dim=8,
    )
    critic = nn.Sequential(nn.Conv2d(3, 16, 4, 2), nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(Squares(), batch_size=8, shuffle=True)
    model, critic, optimizer, critic_optimizer, loader = accelerator.prepare(
        model, critic, optimizer, critic_optimizer, loader
    )
    step = 0
    while step < steps:
        for batch in loader:
            images, captions = batch["image"], batch["caption"]
            output = model(images)
            loss = F.l1_loss(output.sample, images) + output.commit_loss.mean()
            loss = loss - 0.1 * critic(output.sample).mean()
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()

            real, fake = critic(images), critic(output.sample.detach())
            critic_optimizer.zero_grad()
            accelerator.backward(F.relu(1 - real).mean() + F.relu(1 + fake).mean())
            critic_optimizer.step()
            step += 1
    accelerator.print(f"step {step}: {loss.item():.3f} for, among others, {captions[0]}")
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
