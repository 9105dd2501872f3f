from simclr_jax import config


def get_config(argument: str = ""):
    """There is no argument."""
    config.parse_argument(argument)
    c = config.default()
    c.data.name = "digits"
    c.data.image_size = 16
    c.data.eval_crop = 1.0
    c.data.batch_size = 64
    c.views.flip = False
    c.views.crop_area = (0.2, 1.0)
    c.views.color_strength = 0.5
    c.views.blur_probability = 0.0
    c.model.depth = 10
    c.model.width = 0.25
    c.model.stem = "strided"
    c.loss.temperature = 0.5
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 2e-3
    c.optimizer.scaling = "none"
    c.optimizer.weight_decay = 1e-4
    c.optimizer.warmup_epochs = 5.0
    c.train.epochs = 120.0
    return c
