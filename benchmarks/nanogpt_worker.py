"""The PyTorch side of nanogpt.py: runs in a Python that has torch, on a clone of karpathy/nanoGPT; one JSON command a line
on standard input, one JSON answer a line on standard output. Started by nanogpt.py.
"""

import json
import sys
import time


def main(clone: str, layers: int, embed: int, heads: int, block: int, batch: int) -> None:
    sys.path.insert(0, clone)
    import numpy as np
    import torch
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=block, vocab_size=65, n_layer=layers, n_head=heads, n_embd=embed, dropout=0.0,
                          bias=False))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    answer = lambda value: print(json.dumps(value), file=replies, flush=True)

    def step(tokens, targets, rate: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate
        _, loss = model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "weights":
            np.savez(command["file"], **{k: v.numpy() for k, v in model.state_dict().items() if "attn.bias" not in k})
            answer({"torch": torch.__version__, "threads": torch.get_num_threads()})
        elif command["do"] == "losses":
            data = np.load(command["file"])
            batches = zip(torch.from_numpy(data["tokens"]).long(), torch.from_numpy(data["targets"]).long(), data["rates"])
            answer([step(x, y, float(rate)) for x, y, rate in batches])
        elif command["do"] == "time":
            tokens = torch.randint(0, 65, (batch, block))
            step(tokens, tokens, 1e-3)
            began = time.perf_counter()
            for _ in range(command["steps"]):
                step(tokens, tokens, 1e-3)
            answer((time.perf_counter() - began) / command["steps"])


if __name__ == "__main__":
    replies, sys.stdout = sys.stdout, sys.stderr  # nanoGPT prints; answers have standard output to themselves
    main(sys.argv[1], *map(int, sys.argv[2:]))
