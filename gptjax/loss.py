"""Cross-entropy of the output head in pieces, so that the logits of a whole batch never exist at once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from gptjax.flops import device_peak
from gptjax.matmul import matmul
from gptjax.sharding import BATCH_AXES, mesh_in_use, platform_in_use

PIECE_BYTES = 256 << 20  # of float32 logits on a device whose memory is unknown, as a CPU's
PIECE_SHARE = 1 / 16  # of a device's memory otherwise: each further piece reads and writes the head's gradient again
VOCABULARY_PART = 1536  # ids that a v6e scores at a time: the float32 logits of 8,192 rows take 50 MB on the chip
MASKED = -1e30  # the logit of an id that is padding; with -inf the difference of two would be nan


def pieces_of(batch_size: int, length: int, vocab_size: int) -> int:
    """Into how many pieces to split `length` so that the logits of each are small on a device of the mesh in use."""
    mesh = mesh_in_use()
    n_devices, device = (1, None) if mesh.empty else (mesh.size, mesh.abstract_device)
    peak = device_peak(device.device_kind) if device else None
    most = int(PIECE_SHARE * peak.memory) if peak else PIECE_BYTES
    n, limit = 1, max(1, most * n_devices // (4 * batch_size * vocab_size))
    while length // n > limit and length % (2 * n) == 0:
        n *= 2
    return n


def is_bound_by_memory() -> bool:
    """Whether the mesh in use is of TPUs that compute logits twice in less time than they read and write them once."""
    mesh = mesh_in_use()
    peak = device_peak(mesh.abstract_device.device_kind) if platform_in_use() == "tpu" else None
    return peak is not None and peak.memory_bound


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def cross_entropy_sum(
    x_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    vocab_size: int,
    n_pieces: int,
    logit_cap: float = 0.0,
) -> Float[Array, ""]:
    """The summed cross-entropy in nats of the targets under softmax(x headᵀ).

    A target of -1 does not count; ids from vocab_size on are padding with probability zero. With a logit_cap other than
    0 the logits are cap tanh(x headᵀ / cap). Logits are float32, for one of `n_pieces` of T at a time. The gradient is
    computed in the forward pass, while a piece's logits exist, by matmuls in the inputs' dtype accumulated in float32.
    """
    return _on_mesh(x_BTD, head_VD, targets_BT, vocab_size, n_pieces, logit_cap, with_gradient=False)[0]


def _forward(x_BTD: Any, head_VD: Any, targets_BT: Any, vocab_size: int, n_pieces: int, logit_cap: float = 0.0) -> Any:
    nats, *gradients = _on_mesh(x_BTD, head_VD, targets_BT, vocab_size, n_pieces, logit_cap, with_gradient=True)
    return nats, gradients


@jax.named_scope("loss")
def _backward(vocab_size: int, n_pieces: int, logit_cap: float, gradients: Any, scale: jax.Array) -> Any:
    dx_BTD, dhead_VD = gradients
    return (dx_BTD * scale).astype(dx_BTD.dtype), (dhead_VD * scale).astype(dx_BTD.dtype), None


cross_entropy_sum.defvjp(_forward, _backward)


@jax.named_scope("loss")
def _on_mesh(
    x_BTD: Any, head_VD: Any, targets_BT: Any, vocab_size: int, n_pieces: int, logit_cap: float, with_gradient: bool
) -> Any:
    """The loss, and the gradients by x and by the head (None without `with_gradient`), over the mesh in use.

    Each device scans its own rows over its own part of the vocabulary; losses and the head's gradients are summed over
    rows once, at the end. A device keeps the gradient of its own part of the head.
    """
    form = _piece_by_parts if is_bound_by_memory() else _piece
    piece = partial(form, vocab_size=vocab_size, logit_cap=logit_cap, with_gradient=with_gradient)
    scan = partial(_scan, piece, n_pieces, with_gradient)
    mesh = mesh_in_use()
    if mesh.empty or mesh.size == 1:  # a CPU would copy the head's gradient in each collective of one device
        return scan(x_BTD, head_VD, targets_BT)
    split = head_VD.shape[0] % mesh.shape["tensor"] == 0  # a small vocabulary may be whole on each device
    scattered = head_VD.shape[1] % mesh.shape["fsdp"] == 0

    def part(*arrays: Any) -> Any:
        nats, dx_BTD, dhead_VD = scan(*arrays, axis="tensor" if split else None)
        if with_gradient and scattered:
            dhead_VD = jax.lax.psum_scatter(dhead_VD, "fsdp", scatter_dimension=1, tiled=True)
        dhead_VD = jax.lax.psum(dhead_VD, "data" if scattered else BATCH_AXES)
        return jax.lax.psum(nats, BATCH_AXES), dx_BTD, dhead_VD

    rows, head = PartitionSpec(BATCH_AXES), PartitionSpec("tensor" if split else None)
    dhead = PartitionSpec("tensor" if split else None, "fsdp" if scattered else None)
    out = (PartitionSpec(), rows, dhead)
    return jax.shard_map(part, in_specs=(rows, head, rows), out_specs=out, check_vma=False)(x_BTD, head_VD, targets_BT)


def _scan(
    piece: Any, n_pieces: int, with_gradient: bool, x_BTD: Any, head_VD: Any, targets_BT: Any, *, axis: Any = None
) -> Any:
    """`_on_mesh` for one device, whose part of V is along the mesh's `axis`; the head's gradient is float32."""
    piece = partial(piece, head_VD, axis=axis)
    (B, T, D), t = x_BTD.shape, x_BTD.shape[1] // n_pieces
    zero = (jnp.zeros(()), jnp.zeros(head_VD.shape, jnp.float32) if with_gradient else None)
    if n_pieces == 1:
        (nats, dhead_VD), dx_BTD = piece(zero, (x_BTD, targets_BT))
        return nats, dx_BTD, dhead_VD
    pieces = (x_BTD.reshape(B, n_pieces, t, D).swapaxes(0, 1), targets_BT.reshape(B, n_pieces, t).swapaxes(0, 1))
    (nats, dhead_VD), dx_PBtD = jax.lax.scan(piece, zero, pieces)
    return nats, dx_PBtD.swapaxes(0, 1).reshape(B, T, D) if with_gradient else None, dhead_VD


def _piece(
    head_VD: Any,
    total: Any,
    inputs: Any,
    *,
    vocab_size: int,
    logit_cap: float,
    with_gradient: bool,
    axis: str | None,
) -> Any:
    """The totals of loss and head gradient with those of one piece [B, t] added, and the gradient by its x."""
    (nats, dhead_VD), (x_BtD, targets_Bt) = total, inputs
    first = 0 if axis is None else jax.lax.axis_index(axis) * head_VD.shape[0]
    ids_11V = (first + jnp.arange(head_VD.shape[0]))[None, None]
    rows_RD = x_BtD.reshape(-1, x_BtD.shape[-1])  # R = B t
    logits_RV = matmul(rows_RD, head_VD.T, jnp.float32)
    logits_BtV = logits_RV.reshape(*x_BtD.shape[:2], -1)
    if logit_cap:
        tanh_BtV = jnp.tanh(logits_BtV / logit_cap)
        logits_BtV = logit_cap * tanh_BtV
    logits_BtV = jnp.where(ids_11V < vocab_size, logits_BtV, MASKED)
    hit_BtV = ids_11V == targets_Bt[:, :, None]
    counts_Bt = (targets_Bt >= 0).astype(jnp.float32)
    max_Bt1, sum_Bt1, target_Bt1 = statistics(logits_BtV, hit_BtV)
    log_sum_Bt1, target_Bt1 = _over_axis(max_Bt1, sum_Bt1, target_Bt1, axis)
    nats += jnp.sum(counts_Bt * (log_sum_Bt1 - target_Bt1)[:, :, 0])
    if not with_gradient:
        return (nats, dhead_VD), None
    dlogits_BtV = (jnp.exp(logits_BtV - log_sum_Bt1) - hit_BtV) * counts_Bt[:, :, None]
    if logit_cap:
        dlogits_BtV *= 1 - jnp.square(tanh_BtV)
    dlogits_RV = dlogits_BtV.astype(x_BtD.dtype).reshape(logits_RV.shape)
    dx_RD = matmul(dlogits_RV, head_VD)
    dx_RD = dx_RD if axis is None else jax.lax.psum(dx_RD, axis)
    return (nats, dhead_VD + matmul(dlogits_RV.T, rows_RD, jnp.float32)), dx_RD.reshape(x_BtD.shape)


def _piece_by_parts(
    head_VD: Any,
    total: Any,
    inputs: Any,
    *,
    vocab_size: int,
    logit_cap: float,
    with_gradient: bool,
    axis: str | None,
) -> Any:
    """`_piece` for P parts of the vocabulary, one after the other, so that logits stay in a TPU's on-chip memory.

    The gradient needs the sum over all parts, so the logits are computed twice.
    """
    (nats, dhead_VD), (x_BtD, targets_Bt) = total, inputs
    (V, D), rows_RD = head_VD.shape, x_BtD.reshape(-1, x_BtD.shape[-1])
    first = 0 if axis is None else jax.lax.axis_index(axis) * V
    counts_R1, v = targets_Bt.reshape(-1, 1) >= 0, min(VOCABULARY_PART, V)
    logits_of = partial(
        _logits_of_part, rows_RD, targets_Bt.reshape(-1, 1) - first, jnp.minimum(V, vocab_size - first), logit_cap
    )
    head_PvD = jnp.pad(head_VD, [(0, -V % v), (0, 0)]).reshape(-1, v, D)
    parts = head_PvD, jnp.arange(len(head_PvD) * v).reshape(-1, 1, v)

    def add_sums(sums: Any, part: Any) -> Any:
        (max_R1, sum_R1, target_logit_R1), (logits_Rv, hit_Rv, _) = sums, logits_of(*part)
        new_max_R1 = jnp.maximum(max_R1, jnp.max(logits_Rv, axis=1, keepdims=True))
        sum_R1 *= jnp.exp(max_R1 - new_max_R1)
        sum_R1 += jnp.sum(jnp.exp(logits_Rv - new_max_R1), axis=1, keepdims=True)
        return (new_max_R1, sum_R1, target_logit_R1 + jnp.sum(logits_Rv * hit_Rv, axis=1, keepdims=True)), None

    def add_gradients(dx_RD: Any, part: Any) -> Any:
        logits_Rv, hit_Rv, slope_Rv = logits_of(*part)
        dlogits_Rv = ((jnp.exp(logits_Rv - log_sum_R1) - hit_Rv) * counts_R1 * slope_Rv).astype(x_BtD.dtype)
        return dx_RD + matmul(dlogits_Rv, part[0], jnp.float32), matmul(dlogits_Rv.T, rows_RD, jnp.float32)

    zero_R1 = jnp.zeros(counts_R1.shape)
    (max_R1, sum_R1, target_logit_R1), _ = jax.lax.scan(add_sums, (zero_R1 + MASKED, zero_R1, zero_R1), parts)
    log_sum_R1, target_logit_R1 = _over_axis(max_R1, sum_R1, target_logit_R1, axis)
    nats += jnp.sum(counts_R1 * (log_sum_R1 - target_logit_R1))
    if not with_gradient:
        return (nats, dhead_VD), None
    dx_RD, dhead_PvD = jax.lax.scan(add_gradients, jnp.zeros(rows_RD.shape), parts)
    dx_RD = (dx_RD if axis is None else jax.lax.psum(dx_RD, axis)).astype(x_BtD.dtype)
    return (nats, dhead_VD + dhead_PvD.reshape(-1, D)[:V]), dx_RD.reshape(x_BtD.shape)


def _logits_of_part(rows_RD: Any, target_R1: Any, n_ids: Any, logit_cap: float, head_vD: Any, id_1v: Any) -> Any:
    """The logits of the ids `id_1v`, which of them are targets, and the derivative of the cap."""
    logits_Rv, slope_Rv = matmul(rows_RD, head_vD.T, jnp.float32), jnp.ones((1, 1))
    if logit_cap:
        tanh_Rv = jnp.tanh(logits_Rv / logit_cap)
        logits_Rv, slope_Rv = logit_cap * tanh_Rv, 1 - jnp.square(tanh_Rv)
    real_1v = id_1v < n_ids
    return jnp.where(real_1v, logits_Rv, MASKED), real_1v & (id_1v == target_R1), slope_Rv


def _over_axis(max_Rows: Any, sum_Rows: Any, target_Rows: Any, axis: str | None) -> Any:
    """The logarithm of the sum of exp(logit), and the target's logit, from those of each part of V along `axis`."""
    if axis is not None:
        own_Rows, max_Rows = max_Rows, jax.lax.pmax(max_Rows, axis)
        sum_Rows, target_Rows = jax.lax.psum((sum_Rows * jnp.exp(own_Rows - max_Rows), target_Rows), axis)
    return max_Rows + jnp.log(sum_Rows), target_Rows


def statistics(logits_BtV: Float[Array, "B t V"], hit_BtV: Bool[Array, "B t V"]) -> Any:
    """The maximum of the logits over V, the sum of exp(logit - maximum), and the sum of the logits that are hit.

    Elsewhere than on a CPU the logits are read once: "Online normalizer calculation for softmax", algorithm 3.
    """
    return jax.lax.platform_dependent(logits_BtV, hit_BtV, cpu=two_passes, default=one_pass)


def two_passes(logits_BtV: Any, hit_BtV: Any) -> Any:
    """`statistics` from the maximum first, which is faster on a CPU."""
    max_Bt1 = jnp.max(logits_BtV, axis=-1, keepdims=True)
    sum_Bt1 = jnp.sum(jnp.exp(logits_BtV - max_Bt1), axis=-1, keepdims=True)
    return max_Bt1, sum_Bt1, jnp.sum(jnp.where(hit_BtV, logits_BtV, 0.0), axis=-1, keepdims=True)


def one_pass(logits_BtV: Any, hit_BtV: Any) -> Any:
    """`statistics` in one reduction."""

    def combine(left: Any, right: Any) -> Any:
        (max_left, sum_left, target_left), (max_right, sum_right, target_right) = left, right
        ratio, is_left = jnp.exp(-jnp.abs(max_left - max_right)), max_left >= max_right
        total = jnp.where(is_left, sum_left + sum_right * ratio, sum_left * ratio + sum_right)
        return jnp.maximum(max_left, max_right), total, target_left + target_right

    parts = logits_BtV, jnp.ones_like(logits_BtV), jnp.where(hit_BtV, logits_BtV, 0.0)
    start = jnp.float32(MASKED), jnp.float32(0), jnp.float32(0)
    return tuple(x_Bt[:, :, None] for x_Bt in jax.lax.reduce(parts, start, combine, (2,)))
