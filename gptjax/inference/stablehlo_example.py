"""Continue token ids greedily with jax alone: python run.py 15 3 7 prints the 32 ids that follow.

It takes pip install jax flatbuffers.
"""

import json
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

folder = Path(__file__).parent
data = (folder / "weights.safetensors").read_bytes()
start = 8 + int.from_bytes(data[:8], "little")
weights: dict = {}
for path, entry in json.loads(data[8:start]).items():  # each tensor of a safetensors file, in a tree by its path
    *groups, name = path.split("/")
    first, last = (start + offset for offset in entry["data_offsets"])
    node = weights
    for group in groups:
        node = node.setdefault(group, {})
    node[name] = jnp.asarray(np.frombuffer(data[first:last], np.float32).reshape(entry["shape"]))
files = [(folder / f"{name}.jax_export").read_bytes() for name in ("prefill", "decode")]
prefill, decode = (jax.jit(jax.export.deserialize(bytearray(file)).call) for file in files)

ids = [int(word) for word in sys.argv[1:]] or [0]
cache, logits = prefill(weights, jnp.array([ids], jnp.int32))
for position in range(len(ids), len(ids) + 32):  # up to the block_size of programs.json
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    print(int(token[0]), end=" ", flush=True)
    cache, logits = decode(weights, cache, token, jnp.array([position], jnp.int32))
print()
