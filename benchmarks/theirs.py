"""PyTorch's side of the benchmark: the same step and the same chain, as one writes them for speed.

    python -m benchmarks.theirs --task=train|sample --folder=DIR --threads=N [--compile]

Channels-last memory, fused Adam, multi-tensor clip and EMA, inference mode; with --compile the
network goes through torch.compile. What `ours` left in the folder is what it starts from.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import torch_adm, turns
from cfg_jax.runtime import memory


def nchw(images: np.ndarray) -> torch.Tensor:
    """[B, H, W, C] numpy -> [B, C, H, W], a view that is channels-last."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def sinusoid_input(lam: torch.Tensor) -> torch.Tensor:
    """What the sinusoid is told of lambda [B]: 1000 arctan(e^(-lambda / 2)) / (pi / 2)."""
    return 1000 * torch.arctan(torch.exp(-0.5 * lam.clamp(-20, 20))) / (0.5 * math.pi)


def cosine_lambda(u: torch.Tensor, lambda_min: float, lambda_max: float) -> torch.Tensor:
    """u in [0, 1] -> lambda = -2 log tan(a u + b), section 2 of the paper."""
    b = math.atan(math.exp(-0.5 * lambda_max))
    a = math.atan(math.exp(-0.5 * lambda_min)) - b
    return -2 * torch.log(torch.tan(a * u.double() + b)).float()


class Theirs:
    """The step or the sampler of the config in the folder."""

    def __init__(self, task: str, folder: str, threads: int, compile: bool):
        self.base_mib = turns.resident_mib()
        memory.keep()  # as ours does
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.folder, self.task, self.compiles = Path(folder), task, compile
        self.config = json.loads((self.folder / "config.json").read_text())
        self.inputs = dict(np.load(self.folder / "inputs.npz"))
        self.params = dict(np.load(self.folder / "params.npz"))
        self.rows = {"image": self.inputs["image"], "label": self.inputs["label"].astype(np.int64)}
        self.null_label = len(self.params["label/table"]) - 1
        self.network = self._network().train(task == "train")
        self.apply = torch.compile(self.network) if compile else self.network
        if task == "train":
            self.optimizer, self.ema, self.t = *self._fresh(self.network), 0

    def _network(self) -> torch.nn.Module:
        size, _, channels = self.inputs["image"].shape[1:]
        fields = {k: v for k, v in self.config["model"].items() if k not in ("name", "remat")}
        if fields.pop("dtype") != "float32":
            raise ValueError("the two sides are compared in float32")
        network = torch_adm.UNet(
            image_size=size,
            num_classes=self.null_label,
            in_channels=channels,
            out_channels=channels,
            **fields,
        )
        torch_adm.load(network, self.params)
        return network

    def _fresh(self, network: torch.nn.Module):
        fields = self.config["optimizer"]
        betas = (fields["b1"], fields["b2"])
        optimizer = torch.optim.Adam(network.parameters(), betas=betas, fused=True)
        return optimizer, [p.detach().clone() for p in network.parameters()]

    def _update(self, network, optimizer, ema, t: int) -> None:
        """What follows the backward pass at step t: clip, warm-up, Adam, EMA."""
        fields = self.config["optimizer"]
        params = list(network.parameters())
        torch.nn.utils.clip_grad_norm_(params, fields["clip_norm"])
        warm = min(1.0, (t + 1) / max(fields["warmup_steps"], 1))
        optimizer.param_groups[0]["lr"] = fields["learning_rate"] * warm
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            rate = 1 - min(self.config["ema"]["decay"], (1 + t) / (10 + t))
            torch._foreach_lerp_(ema, params, rate)

    def _step(self) -> torch.Tensor:
        """Algorithm 1, then the update."""
        x = nchw(self.rows["image"]).float() / 127.5 - 1
        label = torch.from_numpy(self.rows["label"])
        p_uncond = self.config["loss"]["p_uncond"]
        label = torch.where(torch.rand(len(label)) < p_uncond, self.null_label, label)
        u = torch.rand(len(x))
        if self.config["loss"]["stratified"]:
            u = (torch.arange(len(x)) + u) / len(x)
        schedule = self.config["schedule"]
        lam = cosine_lambda(u, schedule["lambda_min"], schedule["lambda_max"])
        eps = torch.randn_like(x)
        level = lam[:, None, None, None]
        z = torch.sigmoid(level).sqrt() * x + torch.sigmoid(-level).sqrt() * eps
        loss = torch.mean((self.apply(z, sinusoid_input(lam), label) - eps) ** 2)
        loss.backward()
        self._update(self.network, self.optimizer, self.ema, self.t)
        self.t += 1
        return loss.detach()

    @torch.inference_mode()
    def _chain(self, w: float, noise=None) -> np.ndarray:
        """Algorithm 2 with eq. (6), x clipped; -> uint8 [B, H, W, C]."""
        lams = torch.from_numpy(self.inputs["lams"]).double()
        v = self.config["sample"]["sampler"]["v"]
        label = torch.from_numpy(self.rows["label"])
        null = torch.full_like(label, self.null_label)
        like = nchw(self.inputs["z"])
        draw = noise or (lambda i: torch.randn_like(like))
        z = draw(0)
        for t, lam in enumerate(lams):
            s = sinusoid_input(lam).float().expand(len(label))
            eps = (1 + w) * self.apply(z, s, label) - w * self.apply(z, s, null)
            alpha, sigma = torch.sigmoid(lam).sqrt().item(), torch.sigmoid(-lam).sqrt().item()
            x = ((z - sigma * eps) / alpha).clamp(-1, 1)
            if t + 1 == len(lams):
                break
            after = lams[t + 1]
            alpha_next = torch.sigmoid(after).sqrt().item()
            shrink = torch.exp(lam - after).item()
            log_var = (1 - v) * torch.log(torch.sigmoid(-after)) + v * torch.log(
                torch.sigmoid(-lam)
            )
            std = math.sqrt(1 - shrink) * math.exp(0.5 * log_var.item())
            mean = shrink * alpha_next / alpha * z + (1 - shrink) * alpha_next * x
            z = mean + std * draw(t + 1)
        out = ((x + 1) * 127.5).round().to(torch.uint8)
        return out.permute(0, 2, 3, 1).numpy()

    def run(self, count: int) -> float:
        """Seconds that `count` steps, or batches of images, take, from numpy rows to the end."""
        start = time.perf_counter()
        for _ in range(count):
            self._step() if self.task == "train" else self._chain(1.0)
        return time.perf_counter() - start

    def prepare(self) -> dict:
        """The first call, and the memory of later ones."""
        first = self.run(1)
        memory.fill_holes()  # as ours does, once it has compiled
        again = self.run(1)
        turns.reset_peak()
        self.run(2)
        return {
            "compile_s": first - again,
            "base_mib": self.base_mib,
            "peak_mib": turns.resident_mib(),
            "parallel": f"{torch.get_num_threads()} threads",
        }

    def check(self) -> dict:
        """{name: [largest difference to ours, largest of ours, relative error in the L2 norm]}."""
        ours = dict(np.load(self.folder / "outputs.npz"))
        if self.task == "sample":
            noise = torch.from_numpy(self.inputs["noise"]).permute(0, 1, 4, 2, 3)
            images = self._chain(1.0, noise=lambda i: noise[i])
            return {"images": _errors(ours["images"], images)}
        network = self._network().eval()
        apply = torch.compile(network) if self.compiles else network
        optimizer, ema = self._fresh(network)
        z, s, label = (self.inputs[name] for name in ("z", "s", "label"))
        out = apply(nchw(z), torch.from_numpy(s), torch.from_numpy(label).long())
        target = nchw(self.rows["image"]).float() / 127.5 - 1
        torch.mean((out - target) ** 2).backward()
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        theirs = {"gradient": {n: p.grad.clone() for n, p in network.named_parameters()}}
        self._update(network, optimizer, ema, 0)
        theirs["moved"] = {n: p.detach() - before[n] for n, p in network.named_parameters()}
        names = [name for name, _ in network.named_parameters()]
        theirs["ema moved"] = {n: e - before[n] for n, e in zip(names, ema)}
        errors = {"output": _errors(ours["output"].transpose(0, 3, 1, 2), out.detach().numpy())}
        for what, tensors in theirs.items():
            pairs = []
            for path, array in ours.items():
                if path.startswith(what + "/"):
                    name, array = torch_adm.translated(path.removeprefix(what + "/"), array)
                    pairs.append((array.ravel(), tensors.pop(name).numpy().ravel()))
            if tensors:
                raise ValueError(f"{what}: {sorted(tensors)} are not among ours")
            errors[what] = _errors(*(np.concatenate(side) for side in zip(*pairs)))
        memory.fill_holes()  # this may have compiled too
        return errors

    def peak(self) -> float:
        """FLOP/s of the convolution that `Ours.peak` has."""
        size, side, width, repeats = 8 * torch.get_num_threads(), 32, 256, 5
        x, kernel = torch.ones(size, width, side, side), torch.ones(width, width, 3, 3)
        x, kernel = (a.to(memory_format=torch.channels_last) for a in (x, kernel))
        best = math.inf
        with torch.inference_mode():
            for _ in range(repeats):
                start = time.perf_counter()
                torch.nn.functional.conv2d(x, kernel, padding=1)
                best = min(best, time.perf_counter() - start)
        return 2 * (3 * side - 2) ** 2 * size * width**2 / best

    def versions(self) -> dict:
        """{"torch": its version}."""
        return {"torch": torch.__version__}


def _errors(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    gap = ours - theirs
    largest = np.abs(ours).max()
    return [np.abs(gap).max(), largest, np.linalg.norm(gap) / np.linalg.norm(ours)]


def main() -> None:
    """Serves one side of a comparison to `turns.Worker`, until its input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", choices=("train", "sample"), required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--compile", action="store_true")
    turns.serve(Theirs(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
