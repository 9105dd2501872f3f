from simclr_jax import config


def get_config(argument: str = ""):
    """There is no argument."""
    config.parse_argument(argument)
    c = config.default()
    c.data.name = "fashion_mnist"
    c.data.image_size = 28
    c.data.eval_crop = 1.0
    c.data.batch_size = 256
    c.views.crop_area = (0.4, 1.0)
    c.views.color_strength = 0.5
    c.views.blur_probability = 0.0
    c.model.depth = 10
    c.model.width = 0.375
    c.model.stem = "strided"
    c.loss.temperature = 0.2
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 2e-3
    c.optimizer.scaling = "none"
    c.optimizer.weight_decay = 1e-4
    c.optimizer.warmup_epochs = 1.0
    c.train.epochs = 18.0
    return c
