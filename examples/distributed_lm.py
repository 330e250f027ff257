"""Does a run use the same masks on one device and on many, in one process and in several, killed and resumed?

Trains a character model on Python's own ``pydoc_data.topics`` over a mesh (data, model), using ``jax.distributed`` for
several processes. The key of a mask is derived from the layer, the step, and the index of the example in the data set.
A mask therefore does not depend on device, process, batch, or run, and there is no generator state to save. The data
order depends only on the step. After Orbax commits a checkpoint, SHA-256 sums of its files are written next to it, in
the format of ``sha256sum``, and checked before it is restored. If a checkpoint is missing, truncated, or corrupt, the
run reports it and uses the previous one. All processes must have access to the same folders.

``--processes 2 --devices 2`` starts two processes with two CPU devices each on this machine. They communicate over
loopback (gloo listens at the address of the host name). If one dies, the others end too, and with
``--checkpoints out/checkpoints`` the same command resumes the run. On a cluster, start one process per host with
``--cluster``, and JAX finds the others. ``--dump-masks`` writes the masks of each step.

    python examples/distributed_lm.py

Expect, after 20 seconds on one device (2-core CPU, Python 3.11, jax 0.10.2), with losses in nats per character:

    last training loss    | 2.453631
    validation loss       | 2.428583
    characters per second | 15,992
    SHA-256 of weights    | depends on the machine

The SHA-256 of the weights is the same in every run on one machine, after any number of kills. On another layout, sums
round differently: over six steps on 1 x 4, 2 x 2, and 4 x 1 processes x devices, losses differed from those on 1 x 1 by
a relative error of at most 7e-7, and all masks were equal.
"""

import argparse
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jdrop
from jdrop.keys import derive

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TIME, BATCH = 64, 16
VALIDATE = 16  # batches
WIDTH, HEADS, LAYERS = 64, 4, 2
RATE = 0.1
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-3))
STEPS = 300
SPECS = {"qkv": P(None, None, None, "model"), "out": P(None, "model"), "up": P(None, None, "model")}
SPECS["down"] = P(None, "model")  # other weights are replicated


def read() -> tuple[np.ndarray, np.ndarray, int]:
    """Return training examples [n, TIME + 1], validation examples (the last tenth), and the size of the vocabulary."""
    text = "".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    characters, text = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    examples = text[: (len(text) - 1) // TIME * TIME].reshape(-1, TIME)
    examples = np.concatenate([examples, text[TIME::TIME][: len(examples), None]], axis=1).astype(np.int32)
    cut = len(examples) * 9 // 10
    return examples[:cut], examples[cut:], len(characters)


def ids_at(seed: int, step: int, count: int) -> np.ndarray:
    """Return the ids of the examples of a step, in a new order for each epoch."""
    epoch, batch = divmod(step, count // BATCH)
    return np.random.default_rng([seed, epoch]).permutation(count)[batch * BATCH :][:BATCH].astype(np.int32)


def init(seed: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Return the weights, with those of all layers stacked."""
    shapes = {"embed": (vocabulary, WIDTH), "position": (TIME, WIDTH), "head": (WIDTH, vocabulary)}
    shapes |= {"qkv": (LAYERS, 3, WIDTH, HEADS, WIDTH // HEADS), "out": (LAYERS, HEADS, WIDTH // HEADS, WIDTH)}
    shapes |= {"up": (LAYERS, WIDTH, 4 * WIDTH), "down": (LAYERS, 4 * WIDTH, WIDTH)}
    rng = np.random.default_rng([seed, 2**31])  # independent of the data order
    return {name: rng.normal(0, WIDTH**-0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def forward(params: dict, words: jax.Array, key: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Map one example [TIME] to logits and its masks, for dumps; ``key`` is derived from its id and the step."""
    train = key is not None

    def drop(x: jax.Array, *path: str | jax.Array) -> jax.Array:
        return jdrop.dropout(derive(key, *path) if train else None, x, RATE, train=train)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, *path: str | jax.Array) -> jax.Array:
        mask_key = derive(key, *path) if train else None
        return jdrop.dot_product_attention(mask_key, q, k, v, RATE, train=train, is_causal=True)

    def layer(x: jax.Array, at: tuple) -> tuple[jax.Array, dict[str, jax.Array]]:
        p, i = at
        q, k, v = jnp.einsum("tw,cwhd->cthd", jax.nn.standardize(x), p["qkv"])
        h = x + drop(jnp.einsum("thd,hdw->tw", attend(q, k, v, "attention", i), p["out"]), "out", i)
        up = drop(jax.nn.gelu(jax.nn.standardize(h) @ p["up"]), "up", i)  # sharded over "model", and so is its mask
        y = h + drop(up @ p["down"], "down", i)
        masks = {"out": drop(jnp.ones_like(x), "out", i), "up": drop(jnp.ones_like(up), "up", i)}  # only for dumps
        zeros, identity = jnp.zeros([TIME, HEADS, TIME]), jnp.eye(TIME)[:, None].repeat(HEADS, 1)
        attention = attend(zeros, zeros, identity, "attention", i).swapaxes(0, 1)  # [heads, queries, keys]
        masks |= {"down": drop(jnp.ones_like(x), "down", i), "attention": attention}
        return y, masks

    x = drop(params["embed"][words] + params["position"], "embed")
    layers = {name: params[name] for name in ("qkv", "out", "up", "down")}
    y, masks = jax.lax.scan(layer, x, (layers, jnp.arange(LAYERS)))
    masks["embed"] = drop(jnp.ones_like(x), "embed")
    return jax.nn.standardize(y) @ params["head"], {name: mask != 0 for name, mask in masks.items()}


def loss_fn(params: dict, words: jax.Array, keys: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the mean loss of examples [batch, TIME + 1], in nats per character, and their masks."""
    logits, masks = jax.vmap(forward, in_axes=(None, 0, keys if keys is None else 0))(params, words[:, :-1], keys)
    return optax.softmax_cross_entropy_with_integer_labels(logits, words[:, 1:]).mean(), masks


class OnMesh:
    """The state, the compiled functions, and their shardings over a mesh of all devices."""

    def __init__(self, seed: int, vocabulary: int, model: int):
        mesh = jax.make_mesh((jax.device_count() // model, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        self.batch, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        start = {"params": init(seed, vocabulary), "seed": np.uint32(seed)}
        start["state"] = jax.tree.map(np.asarray, OPTIMIZER.init(start["params"]))
        params_sharding = {name: NamedSharding(mesh, SPECS.get(name, P())) for name in start["params"]}
        state_sharding = optax.tree_map_params(
            OPTIMIZER, lambda _, s: s, start["state"], params_sharding, transform_non_params=lambda _: replicated
        )
        self.layout = {"params": params_sharding, "seed": replicated, "state": state_sharding}
        self.start = jax.device_put(start, self.layout)
        self.abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.start)

        def step(now: dict, words: jax.Array, ids: jax.Array, t: jax.Array, dump: bool) -> tuple:
            keys = jdrop.keys.per_example(derive(jax.random.key(seed), "dropout", t), ids)
            (loss, masks), grads = jax.value_and_grad(loss_fn, has_aux=True)(now["params"], words, keys)
            updates, state = OPTIMIZER.update(grads, now["state"])
            now = now | {"params": optax.apply_updates(now["params"], updates), "state": state}
            return now, loss, masks if dump else {}

        out = (self.layout, replicated, None)
        self.step = jax.jit(step, static_argnums=4, out_shardings=out, donate_argnums=0)
        self.evaluate = jax.jit(lambda now, words: loss_fn(now["params"], words, None)[0], out_shardings=replicated)

    def put(self, array: np.ndarray) -> jax.Array:
        """Shard an array over its batch axis; each process reads only its own rows."""
        return jax.make_array_from_callback(array.shape, self.batch, lambda index: array[index])


# ---------------------------------------------------------------------------------- checkpoints


def sums(folder: Path) -> str:
    """Return the SHA-256 of each file in the format of ``sha256sum``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder.parent)}\n" for p in files)


def save(folder: Path, step: int, now: dict, keep: int) -> None:
    """Commit a checkpoint, then its checksums, which make it valid. Of those up to this step, keep ``keep``."""
    path = folder / f"step-{step:08}"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), now, force=True)
    if jax.process_index() == 0:
        part = folder / "sums.part"
        with part.open("w") as file:
            file.write(sums(path))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path.with_suffix(".sha256"))
        steps = {entry.with_suffix("") for entry in folder.glob("step-*")}
        for old in sorted(step for step in steps if step <= path)[:-keep]:  # later ones are damaged: see newest
            old.with_suffix(".sha256").unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)


def newest(folder: Path) -> int:
    """Return the step of the newest valid checkpoint, or 0; print the skipped ones with the reason."""
    for leftover in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(leftover)
    for path in sorted({path.with_suffix("") for path in folder.glob("step-*")}, reverse=True):
        manifest, actual = path.with_suffix(".sha256"), sums(path).splitlines()
        expected = manifest.read_text(errors="replace").splitlines() if manifest.exists() else None
        wrong = sorted({line.split("  ", 1)[-1] for line in set(expected or ()) ^ set(actual)})
        if expected is not None and actual and not wrong:
            return int(path.name.removeprefix("step-"))
        reason = "missing" if not actual else "not finished" if expected is None else f"bad: {', '.join(wrong)}"
        print(f"checkpoint {path}: {reason}; trying the previous one", flush=True)
    print(f"no valid checkpoint in {folder}: starting at step 0", flush=True)
    return 0


# ---------------------------------------------------------------------------------- the run


def size_of_model(devices: int, wanted: int | None) -> int:
    """Return a size of the mesh axis "model" with which the axis "data" divides the batch."""
    for size in (wanted,) if wanted else (2, 1, 4):
        if devices % size == 0 and HEADS % size == 0 and BATCH % (devices // size) == 0:
            return size
    wanted = f" with --model {wanted}" if wanted else ""
    sys.exit(f"{devices} devices{wanted} cannot share a batch of {BATCH} and {HEADS} heads evenly: use a power of two")


def train(args: argparse.Namespace) -> None:
    """Run one process of the training."""
    first = jax.process_index() == 0
    text, held_out, vocabulary = read()
    on_mesh = OnMesh(args.seed, vocabulary, size_of_model(jax.device_count(), args.model))
    now, start, curve = on_mesh.start, 0, args.out / "losses.csv"
    if args.checkpoints:
        start = int(multihost_utils.broadcast_one_to_all(np.int32(newest(args.checkpoints) if first else 0)))
    if start:
        with ocp.StandardCheckpointer() as checkpointer:
            now = checkpointer.restore(args.checkpoints.absolute() / f"step-{start:08}", on_mesh.abstract)
        if int(now["seed"]) != args.seed:
            sys.exit(f"{args.checkpoints} belongs to a run with --seed {int(now['seed'])}")
    if start > args.steps:
        sys.exit(f"{args.checkpoints} belongs to a run that has made {start} steps: pass --steps {start} or more")
    if first and start:
        print(f"resumes at step {start}", flush=True)
    if first:
        args.out.mkdir(parents=True, exist_ok=True)
        lines = curve.read_text().splitlines(keepends=True) if start and curve.exists() else []
        part = curve.with_suffix(".part")
        part.write_text("".join(line for line in lines if int(line.split(",")[0]) < start))
        part.replace(curve)

    losses, started = [], time.time()
    sizes = {"total": args.steps * BATCH * TIME, "initial": start * BATCH * TIME, "unit": "characters"}
    bar = tqdm(**sizes, unit_scale=True, disable=not first)
    for t in range(start, args.steps):
        ids = ids_at(args.seed, t, len(text))
        words, sharded_ids = on_mesh.put(text[ids]), on_mesh.put(ids)
        now, loss, masks = on_mesh.step(now, words, sharded_ids, np.uint32(t), args.dump_masks)
        losses.append((t, loss))
        if args.dump_masks:
            masks = multihost_utils.process_allgather(masks, tiled=True)
            if first:
                np.savez(args.out / f"masks-{t:08}.npz", ids=ids, **masks)
        if (t + 1) % args.every == 0 or t + 1 == args.steps:
            if first:  # reading losses at every step would make the devices wait
                with curve.open("a") as file:
                    file.writelines(f"{at},{float(value)!r}\n" for at, value in losses)
                bar.update(len(losses) * BATCH * TIME)
            losses = []
            if args.checkpoints:
                save(args.checkpoints, t + 1, now, args.keep)
    bar.close()
    speed = (args.steps - start) * BATCH * TIME / (time.time() - started)

    held_out = held_out[: VALIDATE * BATCH].reshape(VALIDATE, BATCH, TIME + 1)
    validation = np.mean([float(on_mesh.evaluate(now, on_mesh.put(words))) for words in held_out])
    params = jax.tree.leaves(multihost_utils.process_allgather(now["params"], tiled=True))
    if first:
        steps, values = np.array([line.split(",") for line in curve.read_text().split()], float).reshape(-1, 2).T
        last = f"{values[-1]:.6f}" if len(values) else f"none in {curve}, and no step is left"
        print(f"last training loss    | {last}\nvalidation loss       | {validation:.6f}")
        print(f"characters per second | {speed:,.0f}")
        print(f"SHA-256 of weights    | {hashlib.sha256(b''.join(p.tobytes() for p in params)).hexdigest()[:16]}")
        fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
        ax.plot(steps, values)
        ax.set(xlabel="step", ylabel="training loss (nats per character)")
        fig.savefig(args.out / "distributed_lm.png", dpi=120)


def launch(args: argparse.Namespace) -> int:
    """Start the processes on this machine; if one dies, end the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, *sys.argv[1:], "--port", str(port), "--process"]
    children = [subprocess.Popen([*command, str(i)], stdin=subprocess.PIPE) for i in range(args.processes)]
    while not any(codes := [child.poll() for child in children]) and None in codes:
        time.sleep(0.1)
    bad = next((i for i, code in enumerate(codes) if code), None)
    if bad is None:
        return 0
    deadline = time.time() + args.heartbeat  # until then, they should notice and exit
    while time.time() < deadline and None in [child.poll() for child in children]:
        time.sleep(0.1)
    for child in children:
        child.kill()
        child.wait()
    how = f"was ended by {signal.Signals(-codes[bad]).name}" if codes[bad] < 0 else f"failed with status {codes[bad]}"
    again = "the same command resumes the run" if args.checkpoints else "nothing to resume without --checkpoints"
    print(f"process {bad} of {args.processes} {how}; all processes were ended; {again}", file=sys.stderr)
    return 1


def end_with_launcher() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> int:
    parser = argparse.ArgumentParser(description="A character model on a mesh, in one process or several.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot, the losses, and the masks")
    parser.add_argument("--processes", type=int, default=1, help="number of processes on this machine")
    parser.add_argument("--devices", type=int, help="CPU devices per process")
    parser.add_argument("--model", type=int, help="size of the mesh axis for weights; the rest is for the batch")
    parser.add_argument("--checkpoints", type=Path, help="folder to write checkpoints to, and to resume from")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--keep", type=int, default=3, help="number of newest checkpoints to keep")
    parser.add_argument("--dump-masks", action="store_true")
    parser.add_argument("--heartbeat", type=int, default=20, help="seconds after which a silent process counts as dead")
    parser.add_argument("--cluster", action="store_true", help="let JAX detect the other processes")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("steps", "processes", "every", "keep"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")

    if args.processes > 1 and args.process is None:
        return launch(args)
    if args.devices:
        jax.config.update("jax_num_cpu_devices", args.devices)
    if args.cluster:
        jax.distributed.initialize(heartbeat_timeout_seconds=args.heartbeat)
    elif args.process is not None:
        threading.Thread(target=end_with_launcher, daemon=True).start()
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        address = f"127.0.0.1:{args.port}"
        options = {"coordinator_bind_address": address, "heartbeat_timeout_seconds": args.heartbeat}
        jax.distributed.initialize(address, args.processes, args.process, **options)
    train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
