"""--mode=export: the encoder, or a classifier, for programs that do not have this package.

A format is written only if another program can compute the same numbers from it. What that program has to
change is printed, and written into the file if the format has a place for it.
"""

import functools
import shlex

import jax
import jax.export
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.console import say
from simclr_jax.errors import UserError, one_line
from simclr_jax.files import in_bucket, located, quoted, replacing, writing
from simclr_jax.mesh import here
from simclr_jax.modes.hub import about_file, torch_weights, write_repository, write_safetensors
from simclr_jax.pretrained import (
    Classifier,
    Encoder,
    read_classifier,
    read_encoder,
    read_head_variables,
)
from simclr_jax.training.saved import beside, read_newest
from simclr_jax.training.workdir import check_encoder
from simclr_jax.weights.torch_head import head_loading, head_weights
from simclr_jax.weights.torchvision import pytorch_loading

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export(config: ConfigDict, workdir: str, format: str, output: str | None = None) -> None:
    """Writes the newest encoder of a workdir, or of a checkpoint folder, and says how to load it. If the
    folder holds a classifier that was fine-tuned, distilled or imported, the classifier is written too.

    Args:
      config: the run's configuration; its data.image_size, data.eval_crop, data.upright and views.antialias say what
        images the export takes.
      workdir: a run's folder, or a checkpoint folder.
      format: one of FORMATS.
      output: the file, or for "savedmodel" and "huggingface" the folder; None: WORKDIR/encoder.FORMAT, or of a
        checkpoint below a workdir WORKDIR/encoder_step_STEP.FORMAT.

    Raises:
      UserError: the format cannot hold this encoder, it is not of the configuration's model, or the
        output cannot be written.
    """

    def read(checkpoint: epath.Path) -> tuple[Encoder, dict | None]:
        about = check_encoder(config, checkpoint).get("classifier")
        if about is not None and not about.get("online"):
            return read_classifier(checkpoint), None
        encoder = read_encoder(checkpoint)
        if config.model.head == "none":
            return encoder, None
        return encoder, read_head_variables(config, encoder.network, checkpoint, here())

    encoder, head = read_newest(workdir, read)
    encoder.view = assemble.evaluation_view(config)
    encoder.network.check_image_size(encoder.image_size)
    folder, suffix = beside(workdir)
    path = located(output or folder / f"encoder{suffix}.{format}")
    _check_replaceable(path, format)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        loading = FORMATS[format](encoder, path)
        if format == "safetensors":
            loading += _write_head(encoder, head, path)
    say(
        f"the {_names(encoder)[0]} of step {encoder.step}, {encoder.width} numbers an image: {path}"
    )
    say(f"\n{_beginning_local(loading, path, format)}\n")
    if format != "huggingface":  # its program says what images are
        say("Images are numbers in [0, 1]: divided by 255, and not standardised.")
        say(
            f"They have {encoder.view.describe()}: simclr_jax.load_encoder(...).preprocess(path) makes"
        )
        say("exactly these, as uint8.")
        if isinstance(encoder, Classifier) and encoder.classes:
            some, more = encoder.classes[:10], len(encoder.classes) - 10
            rest = f" and {more} more" if more > 0 else ""
            say(f"Classes, in the order of the logits: {', '.join(some)}{rest}")


def _check_replaceable(path: epath.Path, format: str) -> None:
    """Raises a UserError if an export to the file `path` would replace what no export wrote."""
    wrote = {"safetensors": _is_safetensors_of_ours, "stablehlo": _is_stablehlo}
    if format not in wrote or in_bucket(path):
        return
    files = [path, _head_beside(path)] if format == "safetensors" else [path]
    for file in files:
        if file.exists() and not file.is_dir() and not wrote[format](file):
            raise UserError(
                f"--output={path} would replace {file}, which --mode=export --format={format} did not write: expected another name"
            )


def _head_beside(path: epath.Path) -> epath.Path:
    return path.with_name(f"{path.name.removesuffix('.safetensors')}.head.safetensors")


def _is_stablehlo(path: epath.Path) -> bool:
    try:
        jax.export.deserialize(bytearray(path.read_bytes()))
    except Exception:  # whatever a file that is none may lead to
        return False
    return True


def _is_safetensors_of_ours(path: epath.Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "np") as file:
            return "loading" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _beginning_local(loading: str, path: epath.Path, format: str) -> str:
    """Returns the program `loading`, after a command that copies the files if `path` is in a bucket. A SavedModel
    needs no such command: TensorFlow reads it there.
    """
    if "://" not in str(path) or format == "savedmodel":
        return loading
    folder = f"{path.parent}/"
    source = shlex.quote(f"{folder}{path.stem}*")
    return f"# first: gcloud storage cp -r {source} .\n{loading.replace(folder, '')}"


def _write_safetensors(encoder: Encoder, path: epath.Path) -> str:
    """Writes PyTorch's layout under torchvision's names. Returns the program that loads it."""
    network, weights = torch_weights(encoder)
    loading = pytorch_loading(network, encoder.image_size, path, weights)
    metadata = {
        "loading": loading,
        "images": "float32 [N, 3, H, W] in [0, 1]; the program above does the rest",
        "crop": encoder.view.describe(),
        **about_file(encoder, network),
    }
    write_safetensors(path, weights, metadata)
    return loading


def _write_head(encoder: Encoder, head: dict | None, path: epath.Path) -> str:
    """Writes the part that takes h, beside the encoder's file: the projection head, or a classifier on a layer of the
    head together with the layers below it. Returns the program that loads it; "" if there is no such part.

    Args:
      encoder: an encoder or a classifier.
      head: {"params", "batch_stats"} of an encoder's projection head; None: there is none.
      path: the encoder's file, NAME.safetensors; this one is NAME.head.safetensors.
    """
    classifier = None
    if isinstance(encoder, Classifier):
        layers = encoder.network.layer
        head = {kind: encoder.variables[kind]["head"] for kind in ("params", "batch_stats")}
        classifier = encoder.variables["params"]["classifier"]["dense"]
    elif head is not None:
        layers = len(head["batch_stats"])
    beside = _head_beside(path)
    if head is None or not layers:
        beside.unlink(missing_ok=True)  # of an earlier export
        return ""
    weights = head_weights(head, layers, classifier)
    loading = head_loading(weights, beside, is_whole=layers == len(head["batch_stats"]))
    write_safetensors(beside, weights, {"loading": loading, "step": str(encoder.step)})
    return f"\n\n{loading}"


def _write_stablehlo(encoder: Encoder, path: epath.Path) -> str:
    """Writes a program with its weights, for any number of images of the size it was trained on. Returns
    the program that loads it.
    """
    size = encoder.image_size
    (n,) = jax.export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((n, size, size, 3), jnp.float32)
    variables = jax.device_get(encoder.variables)
    program = jax.jit(lambda images: encoder.function(variables, images))
    content = jax.export.export(program, platforms=_PLATFORMS)(images).serialize()
    with replacing(path) as scratch:
        scratch.write_bytes(content)
    name, outputs = _names(encoder)
    return (
        "import jax.export, pathlib\n\n"
        f"{name} = jax.export.deserialize(pathlib.Path({quoted(path)}).read_bytes())\n"
        f"{outputs} = {name}.call(images)  # float32 [N, {size}, {size}, 3]"
    )


def _names(encoder: Encoder) -> tuple[str, str]:
    """Returns what a program calls the network and its outputs."""
    return ("classifier", "logits") if isinstance(encoder, Classifier) else ("encoder", "h")


def _write_savedmodel(encoder: Encoder, path: epath.Path) -> str:
    """Writes a TensorFlow SavedModel, a folder, that TensorFlow runs by its own XLA. Returns the program
    that loads it.
    """
    # Imported here: only this format needs TensorFlow.
    import tensorflow as tf
    from jax.experimental import jax2tf

    tf.config.set_visible_devices([], "GPU")
    size = encoder.image_size
    convert = functools.partial(
        jax2tf.convert, with_gradient=False, native_serialization_platforms=_PLATFORMS
    )
    represent = convert(
        encoder.function,
        polymorphic_shapes=[None, f"(n, {size}, {size}, 3)"],
    )
    module = tf.Module()
    # Variables: a graph with its weights as constants may not pass 2 GB.
    module.weights = jax.tree.map(tf.Variable, jax.device_get(encoder.variables))
    specification = tf.TensorSpec([None, size, size, 3], tf.float32, "images")
    module.__call__ = tf.function(
        lambda images: represent(module.weights, images),
        input_signature=[specification],
        autograph=False,
    )
    try:  # before anything is written, as an earlier export may lie there
        module.__call__(tf.zeros([1, size, size, 3]))
    except tf.errors.InvalidArgumentError as error:  # TensorFlow is older than what JAX writes
        raise UserError(
            f"TensorFlow {tf.__version__} cannot run what JAX {jax.__version__} exports: use "
            "--format=stablehlo, or a newer TensorFlow or an older JAX"
        ) from error
    try:
        tf.saved_model.save(module, str(path), signatures=module.__call__)
    except tf.errors.OpError as error:  # TensorFlow's, in place of an OSError
        raise UserError(f"cannot write {path}: {one_line(error)[:200]}") from error
    name, outputs = _names(encoder)
    return (
        "import tensorflow as tf\n\n"
        f"{name} = tf.saved_model.load({quoted(path)})\n"
        f"{outputs} = {name}(images)  # float32 [N, {size}, {size}, 3]"
    )


FORMATS = {
    "safetensors": _write_safetensors,
    "stablehlo": _write_stablehlo,
    "savedmodel": _write_savedmodel,
    "huggingface": write_repository,
}
