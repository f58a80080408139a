"""The PyTorch side of nanogpt.py: runs in a Python that has torch, on a clone of karpathy/nanoGPT;
one JSON command a line on standard input, one JSON answer a line on standard output. Started by
nanogpt.py.
"""

import json
import math
import sys
import time


def main(
    clone: str, layers: int, embed: int, heads: int, block: int, batch: int, seed: int
) -> None:
    sys.path.insert(0, clone)
    import numpy as np
    import torch
    from model import GPT, GPTConfig

    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(
            block_size=block,
            vocab_size=65,
            n_layer=layers,
            n_head=heads,
            n_embd=embed,
            dropout=0.0,
            bias=False,
        )
    )
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

    def answer(value):
        return print(json.dumps(value), file=replies, flush=True)

    def step(tokens, targets, rate: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate
        _, loss = model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def heldout(ids, steps: int) -> dict:
        """Trains as config/train_shakespeare_char.py does with its CPU settings; the loss over
        all of the last tenth, and nanoGPT's own estimates of it, each from 20 random batches."""
        ids = torch.from_numpy(ids).long()
        train, held = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]

        def draw(data):
            starts = torch.randint(len(data) - block, (batch,))
            return tuple(torch.stack([data[i + a : i + a + block] for i in starts]) for a in (0, 1))

        for i in range(steps):
            done = (i - 100) / (steps - 100)
            rate = (
                1e-3 * (i + 1) / 101
                if i < 100
                else 1e-4 + 0.5 * (1 + math.cos(math.pi * done)) * 9e-4
            )
            step(*draw(train), rate)
        model.eval()
        with torch.no_grad():
            rows = (len(held) - 1) // block
            x, y = (held[a : a + rows * block].view(rows, block) for a in (0, 1))
            whole = (
                sum(
                    float(model(x[r : r + 64], y[r : r + 64])[1]) * len(x[r : r + 64])
                    for r in range(0, rows, 64)
                )
                / rows
            )
            estimates = [
                sum(float(model(*draw(held))[1]) for _ in range(20)) / 20 for _ in range(5)
            ]
        model.train()
        return {"whole": whole, "estimates": estimates}

    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "weights":
            np.savez(
                command["file"],
                **{k: v.numpy() for k, v in model.state_dict().items() if "attn.bias" not in k},
            )
            answer({"torch": torch.__version__, "threads": torch.get_num_threads()})
        elif command["do"] == "losses":
            data = np.load(command["file"])
            batches = zip(
                torch.from_numpy(data["tokens"]).long(),
                torch.from_numpy(data["targets"]).long(),
                data["rates"],
                strict=False,
            )
            answer([step(x, y, float(rate)) for x, y, rate in batches])
        elif command["do"] == "heldout":
            answer(heldout(np.load(command["file"])["tokens"], command["steps"]))
        elif command["do"] == "time":
            tokens = torch.randint(0, 65, (batch, block))
            step(tokens, tokens, 1e-3)
            began = time.perf_counter()
            for _ in range(command["steps"]):
                step(tokens, tokens, 1e-3)
            answer((time.perf_counter() - began) / command["steps"])


if __name__ == "__main__":
    replies, sys.stdout = (
        sys.stdout,
        sys.stderr,
    )  # nanoGPT prints; answers have standard output to themselves
    main(sys.argv[1], *map(int, sys.argv[2:]))
