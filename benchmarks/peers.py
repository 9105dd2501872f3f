"""What others do, each as they document it: batches of views, NT-Xent, a train step."""

import io

import numpy as np


def torch():
    """PyTorch, with torchvision importable beside a CPU build: its compiled operations do not load
    there, and are not needed, but importing it looks for their schemas.
    """
    import torch

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


def tf_image_batches(images, size: int, blur: float, strength: float, batch_size: int):
    """Views by tf.image's operations, one after the other, as the published SimCLR code makes them:
    a crop decoded alone or cut out, bicubic resize, random order of the jitter by branches, blur as
    a depthwise convolution.

    `images` are JPEGs, or uint8 arrays of one shape. Without end.
    """
    import tensorflow as tf

    def cropped(image):
        encoded = image.dtype == tf.string
        shape = tf.io.extract_jpeg_shape(image) if encoded else tf.shape(image)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            shape,
            tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            min_object_covered=0.1,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=100,
            use_image_if_no_bounding_boxes=True,
        )
        top, left, _ = tf.unstack(begin)
        height, width, _ = tf.unstack(extent)
        if encoded:
            cut = tf.image.decode_and_crop_jpeg(
                image, tf.stack([top, left, height, width]), channels=3
            )
        else:
            cut = tf.image.crop_to_bounding_box(image, top, left, height, width)
        return tf.image.resize([cut], [size, size], "bicubic")[0] / 255.0

    def sometimes(probability, function, x):
        return tf.cond(tf.random.uniform([]) < probability, lambda: function(x), lambda: x)

    def jitter(x):
        spread = 0.8 * strength
        operations = [
            lambda x: tf.image.random_brightness(x, spread),
            lambda x: tf.image.random_contrast(x, max(0, 1 - spread), 1 + spread),
            lambda x: tf.image.random_saturation(x, max(0, 1 - spread), 1 + spread),
            lambda x: tf.image.random_hue(x, 0.2 * strength),
        ]
        order = tf.random.shuffle(tf.range(4))
        for place in range(4):
            x = tf.switch_case(order[place], [lambda f=f, x=x: f(x) for f in operations])
            x = tf.clip_by_value(x, 0.0, 1.0)
        return x

    def blurred(x):
        radius = size // 10 // 2
        sigma = tf.random.uniform([], 0.1, 2.0)
        taps = tf.exp(-(tf.range(-radius, radius + 1.0) ** 2) / (2 * sigma**2))
        taps = tf.repeat(tf.reshape(taps / tf.reduce_sum(taps), [-1, 1, 1, 1]), 3, axis=2)
        x = tf.nn.depthwise_conv2d([x], taps, [1, 1, 1, 1], "SAME")
        return tf.nn.depthwise_conv2d(x, tf.transpose(taps, [1, 0, 2, 3]), [1, 1, 1, 1], "SAME")[0]

    def view(image):
        x = tf.image.random_flip_left_right(cropped(image))
        x = sometimes(0.8, jitter, x)
        x = sometimes(0.2, lambda x: tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(x)), x)
        if blur > 0:
            x = sometimes(blur, blurred, x)
        return tf.clip_by_value(tf.reshape(x, [size, size, 3]), 0.0, 1.0)

    dataset = (
        tf.data.Dataset.from_tensor_slices(images)
        .repeat()
        .map(lambda image: tf.concat([view(image), view(image)], -1), tf.data.AUTOTUNE)
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
        compute = lambda: loss(*z)  # noqa: E731
    else:
        from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

        loss = SelfSupervisedLoss(NTXentLoss(temperature=0.1))
        compute = lambda: loss(*z)  # noqa: E731

    def run():
        for part in z:
            part.grad = None
        compute().backward()

    return run


def torch_step(batch_size: int):
    """A SimCLR step of ResNet-18 on 32 px, compiled, channels last, float32, SGD."""
    t = torch()
    import torchvision
    from torch import nn

    t.manual_seed(0)
    encoder = torchvision.models.resnet18()
    encoder.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    encoder.maxpool = nn.Identity()
    encoder.fc = nn.Sequential(
        nn.Linear(512, 512, bias=False),
        nn.BatchNorm1d(512),
        nn.ReLU(),
        nn.Linear(512, 128, bias=False),
    )
    encoder = encoder.to(memory_format=t.channels_last)
    optimizer = t.optim.SGD(encoder.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-6)
    partner = t.arange(2 * batch_size) ^ 1

    def loss_of(x):
        z = nn.functional.normalize(encoder(x))
        similarities = (z @ z.T / 0.5).fill_diagonal_(float("-inf"))
        return nn.functional.cross_entropy(similarities, partner)

    compiled = t.compile(loss_of)
    rng = np.random.default_rng(0)
    views = rng.random((2 * batch_size, 3, 32, 32), np.float32)
    x = t.from_numpy(views).to(memory_format=t.channels_last)

    def run():
        optimizer.zero_grad(set_to_none=True)
        compiled(x).backward()
        optimizer.step()

    return run
