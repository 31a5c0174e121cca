"""GPT-2 and its training step in PyTorch, in nanoGPT's manner: what gptjax is compared with.

Written from the papers and from nanoGPT's behaviour, and kept apart from gptjax on purpose: fused query-key-value
projection, PyTorch's own attention, no padded vocabulary, torch.optim.AdamW.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from gptjax.config import ModelConfig, OptimizerConfig


class LayerNorm(nn.Module):
    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, dropout: float):
        super().__init__()
        width, bias = config.n_embd, config.bias
        self.n_head, self.dropout = config.n_head, dropout
        self.ln_1, self.ln_2 = LayerNorm(width, bias), LayerNorm(width, bias)
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.attn_proj = nn.Linear(width, width, bias=bias)
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.mlp_proj = nn.Linear(4 * width, width, bias=bias)

    def attend(self, x):
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(width, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.drop(self.attn_proj(y.transpose(1, 2).reshape(batch, length, width)))

    def drop(self, x):
        return F.dropout(x, self.dropout, self.training)

    def forward(self, x):
        x = x + self.attend(self.ln_1(x))
        return x + self.drop(self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")))


class Reference(nn.Module):
    """The model, without dropout unless it is asked for."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, dropout) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.bias)

    def forward(self, tokens):
        return self.hidden(tokens) @ self.wte.weight.T

    def last_logits(self, tokens):
        """Of the token that follows the last one alone."""
        return self.hidden(tokens)[:, -1] @ self.wte.weight.T

    def hidden(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.ln_f(x)

    def loss(self, windows):
        """Mean cross-entropy in nats of each window's tokens after its first."""
        logits, targets = self(windows[:, :-1]), windows[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def as_tree(reference: Reference, read: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """`read(parameter)` of every parameter, as numpy arrays in the shape of gptjax's parameter tree.

    A torch Linear keeps [out, in] where a kernel is [in, out]; heads are the last two axes of query, key and value
    kernels ([D, N, H]) and the first two of the output projection's ([N, H, D]); layers are stacked in front.
    """
    n_head = reference.blocks[0].n_head

    def values(tensor):
        return read(tensor).detach().numpy()

    def linear(layer, *shape):
        tree = {"kernel": values(layer.weight).T.reshape(shape)}
        return tree | ({} if layer.bias is None else {"bias": values(layer.bias)})

    def norm(layer):
        return {"scale": values(layer.weight)} | ({} if layer.bias is None else {"bias": values(layer.bias)})

    def block(layer):
        width = layer.c_attn.in_features
        heads, tree = (n_head, width // n_head), {}
        for i, name in enumerate(("query", "key", "value")):
            rows = slice(i * width, (i + 1) * width)
            tree[name] = {"kernel": values(layer.c_attn.weight)[rows].T.reshape(width, *heads)}
            if layer.c_attn.bias is not None:
                tree[name]["bias"] = values(layer.c_attn.bias)[rows].reshape(heads)
        return {
            "attention": tree | {"out": linear(layer.attn_proj, *heads, width)},
            "attention_norm": norm(layer.ln_1),
            "mlp": {"down": linear(layer.mlp_proj, 4 * width, width), "up": linear(layer.c_fc, width, 4 * width)},
            "mlp_norm": norm(layer.ln_2),
        }

    return {
        "final_norm": norm(reference.ln_f),
        "layers": stack([block(layer) for layer in reference.blocks]),
        "position_embedding": values(reference.wpe.weight),
        "token_embedding": values(reference.wte.weight),
    }


def stack(trees: list[Any]) -> Any:
    if isinstance(trees[0], dict):
        return {name: stack([tree[name] for tree in trees]) for name in trees[0]}
    return np.stack(trees)


@torch.no_grad()
def load(reference: Reference, params: Any) -> None:
    """Copy gptjax's parameters into the reference; rows of padded token ids have no place there."""

    def copy(target: torch.Tensor | None, value: Any) -> None:
        if target is not None:
            target.copy_(torch.from_numpy(np.array(value)).reshape(target.shape))

    def linear(layer: nn.Linear, tree: Any, i: int) -> None:
        copy(layer.weight, np.asarray(tree["kernel"][i]).reshape(layer.in_features, layer.out_features).T)
        copy(layer.bias, tree["bias"][i] if "bias" in tree else None)

    def norm(layer: LayerNorm, scale: Any, bias: Any) -> None:
        copy(layer.weight, scale)
        copy(layer.bias, bias)

    width, layers = reference.wte.embedding_dim, params["layers"]
    copy(reference.wte.weight, params["token_embedding"][: reference.wte.num_embeddings])
    copy(reference.wpe.weight, params["position_embedding"])
    norm(reference.ln_f, params["final_norm"]["scale"], params["final_norm"].get("bias"))
    for i, block in enumerate(reference.blocks):
        attention, fused = layers["attention"], [layers["attention"][name] for name in ("query", "key", "value")]
        copy(block.c_attn.weight, np.concatenate([np.asarray(p["kernel"][i]).reshape(width, width).T for p in fused]))
        if block.c_attn.bias is not None:
            copy(block.c_attn.bias, np.concatenate([np.asarray(p["bias"][i]).ravel() for p in fused]))
        linear(block.attn_proj, attention["out"], i)
        linear(block.c_fc, layers["mlp"]["up"], i)
        linear(block.mlp_proj, layers["mlp"]["down"], i)
        for layer, tree in ((block.ln_1, layers["attention_norm"]), (block.ln_2, layers["mlp_norm"])):
            norm(layer, tree["scale"][i], tree["bias"][i] if "bias" in tree else None)


def learning_rate(config: OptimizerConfig, step: int, decay_steps: int) -> float:
    """nanoGPT's get_lr: linear warm-up that does not begin at 0, cosine to the floor, the floor."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if step > decay_steps:
        return config.min_learning_rate
    progress = (step - config.warmup_steps) / (decay_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_learning_rate + cosine * (config.learning_rate - config.min_learning_rate)


class Trainer:
    """nanoGPT's training step: accumulation, clip_grad_norm_, AdamW that decays what has two dimensions or more."""

    def __init__(self, reference: Reference, config: OptimizerConfig, decay_steps: int):
        self.reference, self.config, self.decay_steps, self.step = reference, config, decay_steps, 0
        parameters = list(reference.parameters())
        self.adamw = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
                {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=parameters[0].is_cuda,
        )

    def train(self, micro_batches: Any) -> tuple[float, float, float]:
        """One optimizer step; the loss, the gradient's norm before clipping, and the learning rate."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.decay_steps)
        self.adamw.zero_grad()
        total = 0.0
        for windows in micro_batches:
            loss = self.reference.loss(windows) / len(micro_batches)
            loss.backward()
            total += loss.item()
        limit = self.config.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.reference.parameters(), limit).item()
        self.adamw.step()
        self.step += 1
        return total, norm, self.adamw.param_groups[0]["lr"]
