"""The peers, each as its documentation uses it: batches of views, NT-Xent, a train step."""

import io
import os
import sys

import numpy as np


def torch():
    """Returns PyTorch, after making torchvision importable beside a CPU build: torchvision's compiled operations
    do not load there, and are not needed, but its import looks for their schemas.
    """
    import torch

    if torch.version.cuda:
        return torch
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.kept_library = library
    return torch


def lightly_batches(jpegs: list[bytes], blur: float, batch_size: int):
    """lightly's SimCLR views of JPEGs, by a DataLoader with two processes, without end."""
    t = torch()
    from lightly.transforms import SimCLRTransform
    from PIL import Image

    transform = SimCLRTransform(input_size=224, gaussian_blur=blur)

    class Views(t.utils.data.Dataset):
        def __len__(self):
            return 10**6

        def __getitem__(self, i):
            image = Image.open(io.BytesIO(jpegs[i % len(jpegs)])).convert("RGB")
            first, second = transform(image)
            return first, second

    t.set_num_threads(1)
    for first, _ in t.utils.data.DataLoader(Views(), batch_size=batch_size, num_workers=2):
        yield len(first)


def published_batches(images, size: int, blur: float, strength: float, batch_size: int):
    """Views by the functions of the published TF2 code, run by tf.data as it runs them, without end.

    The code is not in a package: the environment variable SIMCLR names a clone of google-research/simclr.
    It blurs on the accelerator, image by image in a batch; here its blur is part of the map, for half of the
    views.

    Args:
      images: JPEGs, or uint8 arrays of one shape.
      size: height and width of a view, pixels.
      blur: probability of a blur.
      strength: how strong the colour distortion is, 1 in the paper.
      batch_size: images.
    """
    import tensorflow as tf
    from absl import flags

    if "SIMCLR" not in os.environ:
        raise SystemExit("SIMCLR=CLONE is needed, a clone of github.com/google-research/simclr")
    sys.path.insert(0, os.path.join(os.environ["SIMCLR"], "tf2"))
    import data_util

    flags.DEFINE_float("color_jitter_strength", strength, "")
    flags.FLAGS(["benchmark"])

    def view(image):
        x = data_util.preprocess_image(image, size, size, is_training=True)
        return data_util.random_blur(x, size, size, p=blur) if blur else x

    def views(image):
        if image.dtype == tf.string:
            image = tf.io.decode_jpeg(image, channels=3)
        return tf.concat([view(image), view(image)], -1)

    options = tf.data.Options()
    options.deterministic = False
    options.experimental_slack = True
    dataset = (
        tf.data.Dataset.from_tensor_slices(images)
        .with_options(options)
        .repeat()
        .map(views, tf.data.AUTOTUNE)
        .batch(batch_size)
        .prefetch(tf.data.AUTOTUNE)
    )
    for batch in dataset.as_numpy_iterator():
        yield len(batch)


def torch_losses(name: str, pairs: int, width: int):
    """A function that takes one forward and backward pass of NT-Xent over 2 x pairs projections."""
    t = torch()
    t.manual_seed(0)
    z = [t.randn(pairs, width, requires_grad=True) for _ in range(2)]
    if name == "lightly":
        from lightly.loss import NTXentLoss

        loss = NTXentLoss(temperature=0.1)
    else:
        from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

        loss = SelfSupervisedLoss(NTXentLoss(temperature=0.1))

    def run():
        for part in z:
            part.grad = None
        loss(*z).backward()

    return run


def torch_step(batch_size: int, dtype: str, depth: int = 18, size: int = 32, device: str = "cpu"):
    """A SimCLR step, compiled, channels last, SGD; bfloat16 by autocast.

    Args:
      batch_size: images, of which there are two views each.
      dtype: "float32" or "bfloat16".
      depth: layers of the ResNet; at 32 px it has the small stem of the paper's appendix B.9.
      size: height and width of a view, pixels.
      device: "cpu" or "cuda".
    """
    t = torch()
    import torchvision
    from torch import nn

    t.manual_seed(0)
    t.backends.cudnn.benchmark = True  # choose each convolution by measuring, as XLA does
    encoder = getattr(torchvision.models, f"resnet{depth}")()
    width = encoder.fc.in_features
    if size <= 32:
        encoder.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        encoder.maxpool = nn.Identity()
    encoder.fc = nn.Sequential(
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, 128, bias=False),
    )
    encoder = encoder.to(device, memory_format=t.channels_last)
    optimizer = t.optim.SGD(
        encoder.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-6, fused=device == "cuda"
    )
    partner = t.arange(2 * batch_size, device=device) ^ 1

    def loss_of(x):
        z = nn.functional.normalize(encoder(x))
        similarities = (z @ z.T / 0.5).fill_diagonal_(float("-inf"))
        return nn.functional.cross_entropy(similarities, partner)

    compiled = t.compile(loss_of)
    rng = np.random.default_rng(0)
    views = rng.random((2 * batch_size, 3, size, size), np.float32)
    x = t.from_numpy(views).to(device, memory_format=t.channels_last)

    narrow = t.autocast(device, t.bfloat16, enabled=dtype == "bfloat16")

    def run():
        optimizer.zero_grad(set_to_none=True)
        with narrow:
            loss = compiled(x)
        loss.backward()
        optimizer.step()
        if device == "cuda":
            t.cuda.synchronize()

    return run
